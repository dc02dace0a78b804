"""A dataset: traces chosen from the store by a request, kept under a key that never means anything else.

    request = DatasetConfig("quickstart", "v1", filters={"game": "high_card_duel"}, limit=50)
    dataset = build_dataset(store, request, reserved={}, folder=home() / "datasets")
    dataset.manifest["trace_count"], dataset.manifest["content_sha256"]
    for trace in dataset.traces: ...

A trace whose question an eval set asks never enters: `reserved` maps each such question's group key to the
name of its eval set. The folder holds `traces.parquet`, the small `tokenizer.json` trained on these traces,
`dropped.parquet` with what matched the filters and was left out, each for one reason, and `manifest.json`; it
appears whole. However many traces there are, only what orders them is held in memory.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from filelock import FileLock, Timeout

from lib.cards import card
from lib.config import CurationConfig, DatasetConfig, TracesConfig
from lib.data.frames import PART_ROWS, read_frames, write_frames
from lib.data.renderer import Example, render_conversation, render_example
from lib.data.selection import Selection, select
from lib.data.store import COLUMNS, Store, contents_of, hash_of_lines, sorted_parts, traces_in
from lib.data.tokenizer import TEXTS_TO_TRAIN_ON, Tokenizer, train_tokenizer
from lib.data.validation import lengths_record, measure_lengths, spread
from lib.errors import RequestError, RetraceError
from lib.files import atomic_open, child, is_sealed, sealed, sha256_file, write_json
from lib.trace import TRACE_VERSION, Trace

SCHEMA_VERSION = "1.0"
IDS_IN_MANIFEST = 10_000  # where there are more, the column `id` of traces.parquet tells them
MEASURED = 100_000  # examples whose lengths the manifest tells, spread over the dataset where it has more
# What must be equal for a key to mean the same dataset, and what a manifest must have at least.
COMPARED = (
    "dataset_name", "dataset_version", "filters", "curation", "selection_strategy", "seed", "limit", "trace_count",
    "content_sha256",
)  # fmt: skip
MANIFEST_KEYS = {"dataset_key", "created_at", "split", "matched", "dropped", "lengths", "files", *COMPARED}


@dataclass(frozen=True)
class Traces:
    """The traces of a dataset, in its order: read from its file each time they are gone through."""

    file: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Trace]:
        for frame in read_frames(self.file, "record"):
            yield from traces_in(frame, str(self.file))

    def facts(self) -> Iterator[tuple[str, str]]:
        """The id of each, and JSON of its Facts."""
        for frame in read_frames(self.file, "id", "facts"):
            yield from frame.iter_rows()

    def spread(self, count: int) -> Iterator[Trace]:
        """So many of them at even distances, or all where they are no more."""
        start, wanted = 0, np.array(sorted(spread(len(self), count)))
        for frame in read_frames(self.file, "record"):
            first, last = np.searchsorted(wanted, (start, start + len(frame)))
            yield from traces_in(frame[wanted[first:last] - start], str(self.file))
            start += len(frame)


class Dataset(NamedTuple):
    """A built dataset: its folder, what its manifest says, and its traces in the manifest's order.

    dataset = load_dataset(Path("runs/datasets"), "quickstart-v1")
    dataset                       # Dataset('quickstart-v1', 1612 traces)
    next(iter(dataset.traces))    # Trace('7c2f…', 'High Card Duel: you hold …', 5 steps, answer 'win')

    In a notebook it shows itself as a card.
    """

    folder: Path
    manifest: dict[str, Any]
    traces: Traces

    @property
    def key(self) -> str:
        return self.manifest["dataset_key"]

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    def __repr__(self) -> str:
        return f"Dataset({self.key!r}, {len(self.traces)} traces)"

    def _repr_html_(self) -> str:
        manifest = self.manifest
        facts = {
            "traces": len(self.traces),
            "of which": {side.replace("_", " "): count for side, count in manifest["split"].items()},
            "left out": manifest["dropped"],
            "filters": manifest["filters"],
            "content": f"sha256 {manifest['content_sha256'][:16]}",
            "built": manifest["created_at"],
        }
        return card(f"Dataset {self.key}", facts)


def dataset_key(request: DatasetConfig) -> str:
    return f"{request.dataset_name}-{request.dataset_version}"


def build_dataset(
    store: Store,
    request: DatasetConfig,
    reserved: dict[str, str],
    folder: Path,
    generated: TracesConfig | None = None,
) -> Dataset:
    """The dataset of this request, built in `folder`, or found there where it is built already.

    Where `generated` says what the configuration plays, traces of that game that it does not play are left out,
    so that the dataset does not depend on what else the store holds. Raises RequestError where nothing matches,
    and where the key already means other content.
    """
    target = child(folder, dataset_key(request))
    with tempfile.TemporaryDirectory(prefix="retrace-") as scratch:
        chosen = select(store, request, reserved, generated, Path(scratch))
        manifest = _manifest(request, chosen)
        if target.exists():
            return _same_or_refuse(load_dataset(folder, dataset_key(request)), manifest)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if target.exists():  # another process was first
                return _same_or_refuse(load_dataset(folder, target.name), manifest)
            _remove_strays(folder)
            try:
                with tempfile.TemporaryDirectory(
                    dir=folder, prefix=f".{target.name}.", suffix=".tmp", ignore_cleanup_errors=True
                ) as new:
                    _write(Path(new), manifest, chosen)
                    os.rename(new, target)
            except OSError as error:
                error.filename = str(target)
                raise
    return load_dataset(folder, target.name)


def sweep_datasets(folder: Path) -> None:
    """Remove what was left by processes that were killed while they built here; nothing while another one builds."""
    if folder.is_dir():
        with suppress(Timeout, OSError), FileLock(folder / ".lock", timeout=0):
            _remove_strays(folder)


def _remove_strays(folder: Path) -> None:
    for stray in folder.glob(".*.????????.tmp/"):
        shutil.rmtree(stray)


def load_dataset(folder: Path, key: str) -> Dataset:
    """A built dataset, each file compared with the manifest before it is read. Raises RequestError, RetraceError."""
    place, manifest = child(folder, key), read_manifest(folder, key)
    for name, recorded in manifest["files"].items():
        if not (place / name).is_file() or sha256_file(place / name) != recorded["sha256"]:
            raise RetraceError(f"{place / name}: not what the manifest recorded; delete the folder and build it again")
    return Dataset(place, manifest, Traces(place / "traces.parquet", manifest["trace_count"]))


def read_manifest(folder: Path, key: str) -> dict[str, Any]:
    """What the manifest of a built dataset says. Raises RequestError, RetraceError."""
    place = child(folder, key)
    if not (place / "manifest.json").is_file():
        raise RequestError(f"dataset {key}: not built; datasets here: {', '.join(list_datasets(folder)) or 'none'}")
    try:
        content = (place / "manifest.json").read_bytes()
        manifest = json.loads(content)
        version = manifest["dataset_schema_version"]
        if version == SCHEMA_VERSION and not is_sealed(content):
            raise ValueError("edited after it was written")
        if missing := MANIFEST_KEYS - manifest.keys():
            raise KeyError(min(missing))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RetraceError(f"{place}/manifest.json: damaged ({error}); delete the folder and build it again") from None
    if version != SCHEMA_VERSION:
        raise RequestError(f"{place}: dataset_schema_version {version!r} is not known, only {SCHEMA_VERSION!r}")
    return manifest


def list_datasets(folder: Path) -> list[str]:
    """Keys of the datasets that are built."""
    return sorted(path.parent.name for path in folder.glob("[!.]*/manifest.json"))


def dataset_tokenizer(examples: Iterable[Example]) -> Tokenizer:
    """The small tokenizer of a dataset, learned from the conversations of its first examples."""
    texts = [render_conversation(example) for _, example in zip(range(TEXTS_TO_TRAIN_ON), examples, strict=False)]
    return train_tokenizer(texts)


def _manifest(request: DatasetConfig, chosen: Selection) -> dict[str, Any]:
    contents, order = contents_of(chosen.segments), chosen.order  # others may have come to the store meanwhile
    content = hash_of_lines(contents[order[start : start + PART_ROWS]] for start in range(0, len(chosen), PART_ROWS))
    facts = chosen.facts
    held_out = int(facts["held_out"].sum())
    return {
        "dataset_key": dataset_key(request),
        "build_id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"retrace:dataset:{dataset_key(request)}:{content}")),
        "dataset_name": request.dataset_name,
        "dataset_version": request.dataset_version,
        "dataset_schema_version": SCHEMA_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "filters": request.filters,
        "curation": _rules(request.curation),
        "selection_strategy": request.selection_strategy,
        "seed": request.seed,
        "limit": request.limit,
        "trace_ids": _ids(chosen),
        "trace_count": len(chosen),
        "stats": {
            "avg_step_count": facts["steps"].mean(),
            "min_step_count": facts["steps"].min(),
            "max_step_count": facts["steps"].max(),
            "avg_total_chars": facts["characters"].mean(),
        },
        "split": {"train": len(chosen) - held_out, "held_out": held_out},
        "matched": chosen.matched,
        "dropped": chosen.dropped,
        "content_sha256": content,
        "provenance": {
            "trace_version": TRACE_VERSION,
            "store_content_sha256": hash_of_lines(sorted_parts(contents)),
            "sources": chosen.sources,
        },
    }


def _rules(curation: CurationConfig) -> dict[str, Any]:
    """The rules; those of scripts only where there are any, as datasets were built before these were known."""
    rules = asdict(curation)
    return rules if curation.scripts else {name: rules[name] for name in rules if "scripts" not in name}


def _ids(chosen: Selection) -> list[str] | None:
    """The ids in order, where they are few."""
    if len(chosen) > IDS_IN_MANIFEST:
        return None
    return [id for frame in chosen.frames("id") for id in frame["id"]]


def _write(folder: Path, manifest: dict[str, Any], chosen: Selection) -> None:
    _write_parquet(folder / "traces.parquet", chosen.frames(*COLUMNS))
    _write_parquet(folder / "dropped.parquet", chosen.left_out())
    traces = Traces(folder / "traces.parquet", len(chosen))
    tokenizer = dataset_tokenizer(map(render_example, traces))
    tokenizer.save(folder / "tokenizer.json")
    lengths = measure_lengths(map(render_example, traces.spread(MEASURED)), tokenizer)
    names = sorted(path.name for path in folder.iterdir())
    files = {name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names}
    manifest |= {"lengths": lengths_record(lengths, "trace_sft_v1"), "files": files}
    write_json(folder / "manifest.json", sealed(manifest))
    os.chmod(folder, 0o755)


def _write_parquet(path: Path, frames: Iterator[pl.DataFrame]) -> None:
    with atomic_open(path) as file:
        write_frames(frames, file, str(path))


def _same_or_refuse(found: Dataset, wanted: dict[str, Any]) -> Dataset:
    """What is there, where it is what was asked for; the key of other content is refused with the difference."""
    differs = [
        f"{name} {_short(there)} there, {_short(here)} asked for"
        for name, there, here in differing(found.manifest, wanted, COMPARED)
    ]
    if differs:
        raise RequestError(
            f"dataset {found.key}: already built and never changed; {'; '.join(differs)}. Give another dataset_version"
        )
    return found


def differing(there: dict[str, Any], here: dict[str, Any], names: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """By which of these two manifests differ, each rule of curation by itself."""
    there, here = (
        manifest | {f"curation.{rule}": value for rule, value in manifest["curation"].items()}
        for manifest in (there, here)
    )
    rules = [name for name in there | here if name.startswith("curation.")]
    apart = [one for name in names for one in (rules if name == "curation" else [name])]
    return [(name, there.get(name), here.get(name)) for name in apart if there.get(name) != here.get(name)]


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else f"{text[:12]}…"
