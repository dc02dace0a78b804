"""The card of a dataset: README.md with a header for the Hub, each figure from the manifest.

    dataset_card(dataset.manifest, exports_in(folder, dataset))

What the manifest does not say is not said: nothing here has a licence or a language, so none is named.
Header: https://github.com/huggingface/hub-docs/blob/main/datasetcard.md. What others wrote is text: inline or
fenced, never markup.
"""

import json
import shlex
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lib.config import DatasetConfig, to_yaml
from lib.data.dataset import Dataset
from lib.data.export import detect_format, export_lines
from lib.data.selection import NOT_PLAYED, SOURCES
from lib.data.validation import Lengths, recorded_lengths
from lib.errors import RequestError
from lib.experiments.markdown import fenced, inline, table
from lib.files import NAME, sha256_file

PARQUET = "traces.parquet"
# The Hub's words for how many examples there are, by the first number that is too many.
SIZES = {
    1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M",
    100_000_000: "10M<n<100M", 1_000_000_000: "100M<n<1B",
}  # fmt: skip
# Entries of a manifest that have a place of their own on the card, or are too long for it.
TOLD = {"dataset_key", "trace_ids", "trace_count", "dropped", "split", "stats", "lengths", "files", "provenance"}
MAX_SHOWN = 600


class Export(NamedTuple):
    """A file of the whole dataset that lies beside the card, and its format."""

    file: str
    format: str

    @property
    def name(self) -> str:
        """By which the Hub loads it."""
        return Path(self.file).stem


def dataset_card(manifest: dict[str, Any], exports: list[Export]) -> str:
    """The card as Markdown. `exports` are the files beside it that the Hub is to show, see `exports_in`."""
    count, request = manifest["trace_count"], _request(manifest)
    sections = [
        _header(manifest, exports),
        f"# {inline(manifest['dataset_key'])}",
        f"{count:,} reasoning traces: each is a question, the steps that lead to its answer, and the answer.",
        "## Where the traces come from",
        _shares("source", manifest["provenance"]["sources"], count),
        "## How they were chosen",
        _facts({name: value for name, value in request.items() if name != "filters"}),
        *_filters(manifest["filters"]),
        "## What was left out",
        *_left_out(manifest["dropped"], count),
        "## Split",
        _shares("side", manifest["split"], count),
        "Traces with the same prompt are on one side, by its SHA-256. The files hold both sides; training keeps the "
        "held-out one for the held-out loss.",
        "## Statistics",
        _facts(manifest["stats"]),
        "## Tokens",
        *_tokens(manifest),
        "## Provenance",
        _facts({name: value for name, value in manifest.items() if name not in TOLD | request.keys()}),
        "`sha256` is of this manifest, `content_sha256` of the traces in their order: the same on every machine.",
        _facts({name: value for name, value in manifest["provenance"].items() if name != "sources"}),
        table(
            ["file", "bytes", "sha256"],
            [[inline(name), about["bytes"], inline(about["sha256"])] for name, about in manifest["files"].items()],
        ),
        "## Use",
        *_use(manifest, exports),
        "## Build it again",
        *_build(manifest),
        "## Licence",
        "None is recorded, so this card names none.",
    ]
    return "\n\n".join(sections) + "\n"


def exports_in(folder: Path, dataset: Dataset) -> list[Export]:
    """The files of the folder that are exports of this dataset, byte by byte; its Parquet file comes last."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        if NAME.fullmatch(file.name) and (format := _format_of(file, dataset)):
            found.append(Export(file.name, format))
    parquet, recorded = folder / PARQUET, dataset.manifest["files"][PARQUET]["sha256"]
    if parquet.is_file() and sha256_file(parquet) == recorded:
        found.append(Export(PARQUET, "parquet"))
    return found


def _format_of(file: Path, dataset: Dataset) -> str:
    """The format of an export of this dataset with its reasoning; empty for any other file."""
    try:
        with open(file, "rb") as lines:
            format = detect_format(json.loads(lines.readline()))
            lines.seek(0)
            pairs = zip_longest(lines, export_lines(dataset.traces, format))
            return format if all(line == expected for line, expected in pairs) else ""
    except (ValueError, RecursionError, RequestError):
        return ""


def _header(manifest: dict[str, Any], exports: list[Export]) -> str:
    configs = [
        {"config_name": export.name, "data_files": [{"split": "train", "path": export.file}]} for export in exports
    ]
    fields = {
        "pretty_name": f"{manifest['dataset_name']} {manifest['dataset_version']}",
        "size_categories": [next(said for bound, said in SIZES.items() if manifest["trace_count"] < bound)],
        "task_categories": ["text-generation"],
        "tags": ["reasoning-traces", "sft", "retrace"],
        **({"configs": configs} if configs else {}),
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _request(manifest: dict[str, Any]) -> dict[str, Any]:
    return {field.name: manifest[field.name] for field in fields(DatasetConfig) if field.name in manifest}


def _filters(filters: dict[str, Any]) -> list[str]:
    if not filters:
        return ["No filter was set: every trace of the store matched."]
    said = "A trace matched where its `meta` holds each of these keys with that value, or with one of that list:"
    return [said, fenced(_json(filters))]


def _left_out(dropped: dict[str, int], kept: int) -> list[str]:
    if not dropped:
        return [f"Nothing: all {kept:,} traces that match are here."]
    rows = [[inline(reason), count] for reason, count in dropped.items()]
    total = kept + sum(dropped.values())
    return [table(["", "traces"], [["**here**", kept], *rows, ["**all that match**", total]])]


def _tokens(manifest: dict[str, Any]) -> list[str]:
    record = manifest["lengths"]
    lengths = recorded_lengths(record)
    told = {name: value for name, value in record.items() if name not in ("counts", "longest")}
    some = record["examples"] < manifest["trace_count"]
    bands = {f"{low} to {high}" if high > low else str(low): count for (low, high), count in lengths.bands().items()}
    return [
        "Of whole conversations in Gemma's chat template, by `tokenizer.json`, which was learned from these traces; "
        "p95 is the length that 95 % of the examples do not exceed."
        + some
        * f" {record['examples']:,} examples were measured, at even distances.",
        _facts(told),
        _shares("tokens of an example", bands, lengths.examples, "examples"),
        "No example is ever cut: training refuses one that is longer than `model.max_length`.",
        table(["model.max_length", "examples that would not fit"], _limits(lengths)),
    ]


def _limits(lengths: Lengths) -> list[list[int]]:
    """How many would not fit the powers of two that some do not fit, the length of the longest, and the next power."""
    shortest, longest = lengths.percentile(0), lengths.percentile(100)
    powers = {2**power for power in range(longest.bit_length() + 1) if 2**power >= shortest}
    return [[limit, lengths.over(limit)] for limit in sorted({*powers, longest})]


def _use(manifest: dict[str, Any], exports: list[Export]) -> list[str]:
    key = shlex.quote(manifest["dataset_key"])
    load = [f'load_dataset(".", {json.dumps(export.name)}, split="train")  # {export.format}' for export in exports]
    code = ["from datasets import load_dataset", "", *load]
    return [
        *([f"```python\n{chr(10).join(code)}\n```"] if load else []),
        "Where it was built, as JSONL for a trainer (`trace`, `tunix_sft`, `training_example` or `messages`), and "
        "whether every example fits a model:",
        fenced(
            f"python -m lib dataset export {key} --format messages --output {key}.jsonl\n"
            f"python -m lib dataset validate {key} --max-length 512 --tokenizer google/gemma-3-270m-it"
        ),
    ]


def _build(manifest: dict[str, Any]) -> list[str]:
    by_an_engine = manifest["provenance"]["sources"].keys() & set(SOURCES.values())
    only = ""
    if NOT_PLAYED in manifest["dropped"]:
        only = (
            "It was built by a run, which left out what its configuration does not play; only that run builds the same."
        )
    elif by_an_engine and manifest["selection_strategy"] == "latest":
        only = (
            "Where a run built it, and its game had been played at several times, only that run builds the same, as it "
            "takes all that it plays as of one moment."
        )
    return [
        "From a store with the same traces and eval sets with the same questions, this request, as request.yaml, gives "
        f"the same `content_sha256`. {only}".rstrip(),
        fenced(to_yaml(DatasetConfig(**_request(manifest))).rstrip()),
        fenced("python -m lib dataset build --request request.yaml"),
    ]


def _shares(head: str, counts: dict[str, int], total: int, what: str = "traces") -> str:
    rows = [[inline(name), count, f"{100 * count / total:.1f} %"] for name, count in counts.items()]
    return table([head, what, "share"], rows)


def _facts(values: dict[str, Any]) -> str:
    """A table of what is known."""
    rows = [[inline(name), inline(_shown(value))] for name, value in values.items() if value is not None]
    return table(["", ""], rows)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else _json(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text):,} characters)"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
