"""A dataset: traces chosen from the store by a request, kept under a key that never means anything else.

    request = DatasetConfig("quickstart", "v1", filters={"game": "high_card_duel"}, limit=50)
    dataset = build_dataset(store, request, reserved={}, folder=home() / "datasets")
    dataset.manifest["trace_count"], dataset.manifest["content_sha256"]

A trace whose question an eval set asks never enters: `reserved` maps each such question's group key to the
name of its eval set, and the manifest's `dropped` counts what was left out for it. The folder holds
`traces.parquet`, the small `tokenizer.json` trained on these traces, and `manifest.json`, and appears whole.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from filelock import FileLock

from lib.config import DatasetConfig, TracesConfig
from lib.data.renderer import Example, render_conversation, render_example
from lib.data.store import Store
from lib.data.tokenizer import TEXTS_TO_TRAIN_ON, Tokenizer, train_tokenizer
from lib.errors import RequestError, RetraceError
from lib.files import atomic_write, child, is_sealed, sealed, sha256_file, write_json
from lib.tasks import group_keys
from lib.trace import TRACE_VERSION, Trace, content_sha256, parse_trace, shown, to_json

SCHEMA_VERSION = "1.0"
HELD_OUT_PERCENT = 5
NOT_PLAYED = "of another seed, count or engine than traces asks for"
# What must be equal for a key to mean the same dataset, and what a manifest must have at least.
COMPARED = (
    "dataset_name", "dataset_version", "filters", "selection_strategy", "seed", "limit", "trace_count",
    "content_sha256",
)  # fmt: skip
MANIFEST_KEYS = {"dataset_key", "created_at", "split", "dropped", "files", *COMPARED}


class Dataset(NamedTuple):
    """A built dataset: its folder, what its manifest says, and its traces in the manifest's order."""

    folder: Path
    manifest: dict[str, Any]
    traces: list[Trace]

    @property
    def key(self) -> str:
        return self.manifest["dataset_key"]

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"


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
    traces, dropped = choose(store, request, reserved, generated)
    manifest = _manifest(store, request, traces, dropped)
    if target.exists():
        return _same_or_refuse(load_dataset(folder, dataset_key(request)), manifest)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if target.exists():  # another process was first
            return _same_or_refuse(load_dataset(folder, target.name), manifest)
        for stray in folder.glob(".*/"):  # of a process that was killed
            shutil.rmtree(stray)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}.", ignore_cleanup_errors=True) as new:
                _write(Path(new), manifest, traces)
                os.rename(new, target)
        except OSError as error:
            error.filename = str(target)
            raise
    return load_dataset(folder, target.name)


def load_dataset(folder: Path, key: str) -> Dataset:
    """A built dataset, each file compared with the manifest before it is read. Raises RequestError, RetraceError."""
    place, manifest = child(folder, key), read_manifest(folder, key)
    for name, recorded in manifest["files"].items():
        if not (place / name).is_file() or sha256_file(place / name) != recorded["sha256"]:
            raise RetraceError(f"{place / name}: not what the manifest recorded; delete the folder and build it again")
    records = pl.read_parquet(place / "traces.parquet")["record"]
    return Dataset(place, manifest, [parse_trace(record.encode()) for record in records])


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


def choose(
    store: Store, request: DatasetConfig, reserved: dict[str, str], generated: TracesConfig | None = None
) -> tuple[list[Trace], Counter]:
    """The traces of a request, in order, and how many matched but were left out, by reason."""
    matching = [trace for trace in store.scan() if _matches(trace, request.filters)]
    if not matching:
        raise RequestError(f"dataset {dataset_key(request)}: {_nothing_matches(store, request)}")
    dropped: Counter = Counter()
    free = []
    for trace in matching:
        if generated is not None and _not_played(trace, generated):
            dropped[NOT_PLAYED] += 1
            continue
        held = [reserved[key] for key in trace_groups(trace) if key in reserved]
        if held:
            dropped[f"asked in eval set {min(held)}"] += 1
        else:
            free.append(trace)
    if not free:
        reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise RequestError(
            f"dataset {dataset_key(request)}: all {len(matching)} traces that match are left out ({reasons}); "
            "generate or import others, or change the filters"
        )
    ordered = _ordered(free, request)
    if request.limit is not None and len(ordered) > request.limit:
        dropped["over the limit"] = len(ordered) - request.limit
    return ordered[: request.limit], dropped


def trace_groups(trace: Trace) -> set[str]:
    """Group keys of a trace's question; see `lib.tasks.group_keys`."""
    return group_keys(trace.prompt, str(trace.meta.get("game", "")), trace.meta.get("state"))


def is_held_out(prompt: str) -> bool:
    """Whether examples that ask this are kept for the held-out loss: the same question is always on one side."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def dataset_tokenizer(examples: Iterable[Example]) -> Tokenizer:
    """The small tokenizer of a dataset, learned from the conversations of its first examples."""
    texts = [render_conversation(example) for _, example in zip(range(TEXTS_TO_TRAIN_ON), examples, strict=False)]
    return train_tokenizer(texts)


def _not_played(trace: Trace, generated: TracesConfig) -> bool:
    meta = trace.meta
    if meta.get("game") != generated.game or meta.get("source") not in ("builtin", "ungar"):
        return False
    if meta["source"] != generated.engine:
        return True
    return meta.get("seed") != generated.seed or not meta.get("episode_index", -1) < generated.count


def _ordered(traces: list[Trace], request: DatasetConfig) -> list[Trace]:
    if request.selection_strategy == "random":
        return sorted(traces, key=lambda trace: _sha(f"{request.seed}:{content_sha256(trace)}"))
    by_id = sorted(traces, key=lambda trace: trace.id)
    return sorted(by_id, key=lambda trace: trace.created_at, reverse=True)


def _matches(trace: Trace, filters: dict[str, Any]) -> bool:
    return all(
        key in trace.meta
        and any(type(trace.meta[key]) is type(item) and trace.meta[key] == item for item in _as_list(wanted))
        for key, wanted in filters.items()
    )


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _nothing_matches(store: Store, request: DatasetConfig) -> str:
    total = store.count()
    if not total:
        return f"the store {store.folder} is empty; generate or import traces first (python -m lib traces --help)"
    asked = ", ".join(f"{key}={' or '.join(map(shown, _as_list(item)))}" for key, item in request.filters.items())
    values = store.meta_values()
    held = "; ".join(_held(key, values) for key in request.filters)
    return f"none of {total} traces matches {asked}; the store holds {held}"


def _held(key: str, values: dict[str, dict]) -> str:
    if key not in values:
        return f"no key {key}, only {', '.join(values) or 'none'}"
    return f"{key}: {', '.join(map(shown, list(values[key])[:8]))}"


def _manifest(store: Store, request: DatasetConfig, traces: list[Trace], dropped: Counter) -> dict[str, Any]:
    hashes = [content_sha256(trace) for trace in traces]
    content = _sha("\n".join(hashes))
    steps = [len(trace.steps) for trace in traces]
    held_out = sum(is_held_out(trace.prompt) for trace in traces)
    return {
        "dataset_key": dataset_key(request),
        "build_id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"retrace:dataset:{dataset_key(request)}:{content}")),
        "dataset_name": request.dataset_name,
        "dataset_version": request.dataset_version,
        "dataset_schema_version": SCHEMA_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "filters": request.filters,
        "selection_strategy": request.selection_strategy,
        "seed": request.seed,
        "limit": request.limit,
        "trace_ids": [trace.id for trace in traces],
        "trace_count": len(traces),
        "stats": {
            "avg_step_count": sum(steps) / len(steps),
            "min_step_count": min(steps),
            "max_step_count": max(steps),
            "avg_total_chars": sum(map(_characters, traces)) / len(traces),
        },
        "split": {"train": len(traces) - held_out, "held_out": held_out},
        "dropped": dict(sorted(dropped.items())),
        "content_sha256": content,
        "provenance": {
            "trace_version": TRACE_VERSION,
            "store_content_sha256": store.content_hash(),
            "sources": dict(sorted(Counter(str(trace.meta.get("source", "unknown")) for trace in traces).items())),
        },
    }


def _write(folder: Path, manifest: dict[str, Any], traces: list[Trace]) -> None:
    content = io.BytesIO()
    pl.DataFrame(
        {
            "id": [trace.id for trace in traces],
            "content_sha256": [content_sha256(trace) for trace in traces],
            "created_at": [trace.created_at for trace in traces],
            "record": [to_json(trace).decode() for trace in traces],
        }
    ).write_parquet(content)
    atomic_write(folder / "traces.parquet", content.getvalue())
    dataset_tokenizer(render_example(trace) for trace in traces).save(folder / "tokenizer.json")
    names = ("traces.parquet", "tokenizer.json")
    files = {name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names}
    write_json(folder / "manifest.json", sealed(manifest | {"files": files}))
    os.chmod(folder, 0o755)


def _same_or_refuse(found: Dataset, wanted: dict[str, Any]) -> Dataset:
    """What is there, where it is what was asked for; the key of other content is refused with the difference."""
    differs = [
        f"{name} {_short(found.manifest[name])} there, {_short(wanted[name])} asked for"
        for name in COMPARED
        if found.manifest[name] != wanted[name]
    ]
    if differs:
        raise RequestError(
            f"dataset {found.key}: already built and never changed; {'; '.join(differs)}. Give another dataset_version"
        )
    return found


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else f"{text[:12]}…"


def _characters(trace: Trace) -> int:
    return len(trace.prompt) + len(trace.final_answer) + sum(len(step.content) for step in trace.steps)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
