"""Two datasets row by row: what was added, removed and changed. Held are hashes, so that millions of traces fit.

    diff = diff_datasets(before, after)
    diff.same, diff.changed, diff.removed, diff.added        # 1180, 20, 300, 200
    diff.changed_in                                          # {"steps and final_answer": 12, "meta": 8}

Two traces are the same where their content is, whatever their ids. Of the others a trace there and one here are one
row that changed where they have the same id; or else where they ask the same question, by the state of a known game
or by the words (`lib.tasks.group_keys`), the first that does with the first, the second with the second. The id
alone would not do: where nobody gave one it is made of the content, and no generated trace would ever be changed.

Each dataset is read twice: once for the hashes, of 64 bits each, and once for what is shown.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import msgspec
import numpy as np
import polars as pl

from lib.config import DatasetConfig
from lib.data.dataset import Dataset, differing
from lib.data.selection import trace_groups
from lib.trace import Trace, canonical

FIELDS = ("prompt", "steps", "final_answer", "meta")
COLUMNS = ("content", "id", "state", "words", *FIELDS)
PAIRED_BY = {"id": "id", "state": "question", "words": "question"}
# Of meta are counted the keys that have few values: `game`, and not `episode_index`.
MAX_VALUES = 12
MAX_KEYS = 100
MAX_EXAMPLES = 5
MAX_DIFFERENCES = 12
SAME, CHANGED, ONLY_HERE = range(3)


class Difference(NamedTuple):
    """What a part of a trace was and is: `final_answer`, `step 2`, `meta.seed`; None where there is none."""

    part: str
    before: str | None
    after: str | None


class Changed(NamedTuple):
    """A row that changed; `by` says what its two traces have in common, id or question."""

    by: str
    before_id: str
    after_id: str
    question: str
    differences: list[Difference]


class Row(NamedTuple):
    """A trace that was removed or added."""

    id: str
    question: str


class ValueCount(NamedTuple):
    """How many traces have one value of `meta`, as JSON, before and after, and what became of them."""

    key: str
    value: str
    before: int
    after: int
    changed: int
    removed: int
    added: int


class DatasetDiff(NamedTuple):
    """What became of the rows; every trace before is the same, changed or removed, every one after the same, changed
    or added. `reordered` is set where nothing but the order differs. Of the rows the first few are shown; `contents`
    are the content hashes of both."""

    before: str
    after: str
    contents: tuple[str, str]
    same: int
    changed: int
    removed: int
    added: int
    reordered: bool
    changed_in: dict[str, int]
    paired_by: dict[str, int]
    request: list[tuple[str, Any, Any]]
    statistics: list[tuple[str, Any, Any]]
    values: list[ValueCount]
    changed_rows: list[Changed]
    removed_rows: list[Row]
    added_rows: list[Row]
    lengths: tuple[dict[str, Any], dict[str, Any]]


def diff_datasets(before: Dataset, after: Dataset) -> DatasetDiff:
    there, here = _hashes(before.traces), _hashes(after.traces)
    same = _pairs(there, here, "content")
    changed = _changed(_without(there, same, "place"), _without(here, same, "place_here"))
    there_fates, here_fates = _fates(there, same, changed, "place"), _fates(here, same, changed, "place_here")
    shown = changed.sort(pl.col("in") == "meta", "place").head(MAX_EXAMPLES)  # reasoning and answers first
    values = _Values()
    found = values.read(before.traces, there_fates, "removed", set(shown["place"]))
    now = values.read(after.traces, here_fates, "added", set(shown["place_here"]))
    count = Counter({"removed": int((there_fates == ONLY_HERE).sum()), "added": int((here_fates == ONLY_HERE).sum())})
    equal = not (len(changed) or count["removed"] or count["added"])
    return DatasetDiff(
        before=before.key,
        after=after.key,
        contents=(before.manifest["content_sha256"], after.manifest["content_sha256"]),
        same=len(same),
        changed=len(changed),
        removed=count["removed"],
        added=count["added"],
        reordered=equal and before.manifest["content_sha256"] != after.manifest["content_sha256"],
        changed_in=_count(changed["in"]),
        paired_by=_count(changed["by"]),
        request=_request(before.manifest, after.manifest),
        statistics=_statistics(before.manifest, after.manifest),
        values=values.counts(),
        changed_rows=[_example(row, found, now) for row in shown.iter_rows(named=True)],
        removed_rows=found.only_here,
        added_rows=now.only_here,
        lengths=(before.manifest["lengths"], after.manifest["lengths"]),
    )


def _hashes(traces: Iterable[Trace]) -> pl.DataFrame:
    """One row a trace: hashes of the whole, of what it is known by, and of its parts."""
    columns = {name: array("q") for name in COLUMNS}
    for trace in traces:
        groups = trace_groups(trace)
        words = next(key for key in groups if key.startswith("prompt: "))
        state = next((key for key in groups if key != words), words)
        steps = tuple((step.type, step.content) for step in trace.steps)
        meta = msgspec.json.encode(trace.meta, order="sorted")
        parts = (canonical(trace), trace.id, state, words, trace.prompt, steps, trace.final_answer, meta)
        for column, part in zip(columns.values(), parts, strict=True):
            column.append(hash(part))
    frame = pl.DataFrame({name: np.frombuffer(column, np.int64) for name, column in columns.items()})
    return frame.with_row_index("place")


def _pairs(there: pl.DataFrame, here: pl.DataFrame, by: str) -> pl.DataFrame:
    """Places of traces there and here that are alike by a hash, the nth there with the nth here."""
    nth = pl.int_range(pl.len()).over(by).alias("nth")
    return there.select("place", by, nth).join(
        here.select("place", by, nth), on=[by, "nth"], suffix="_here"
    ).select("place", "place_here")  # fmt: skip


def _without(rows: pl.DataFrame, pairs: pl.DataFrame, place: str) -> pl.DataFrame:
    return rows.join(pairs, left_on="place", right_on=place, how="anti")


def _changed(there: pl.DataFrame, here: pl.DataFrame) -> pl.DataFrame:
    """Pairs of those that are not the same, with `by`, what they share, and `in`, the fields that differ."""
    found = []
    for column, by in PAIRED_BY.items():
        pairs = _pairs(there, here, column)
        both = pairs.join(there, on="place").join(here, left_on="place_here", right_on="place", suffix="_here")
        differing = [pl.when(pl.col(name) != pl.col(f"{name}_here")).then(pl.lit(name)) for name in FIELDS]
        text = pl.concat_str(differing, separator=" and ", ignore_nulls=True).alias("in")
        found.append(both.select("place", "place_here", pl.lit(by).alias("by"), text))
        there, here = _without(there, pairs, "place"), _without(here, pairs, "place_here")
    return pl.concat(found).sort("place")


def _fates(rows: pl.DataFrame, same: pl.DataFrame, changed: pl.DataFrame, place: str) -> np.ndarray:
    """What became of each trace, by its place."""
    fates = np.full(len(rows), ONLY_HERE, np.uint8)
    fates[same[place].to_numpy()] = SAME
    fates[changed[place].to_numpy()] = CHANGED
    return fates


class _Read(NamedTuple):
    """Of one dataset: the traces that are to be shown, by place, and the first that the other does not have."""

    traces: dict[int, Trace]
    only_here: list[Row]


class _Values:
    """Counts of the values of meta, over both datasets, as long as a key has few of them."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Counter]] = {}

    def read(self, traces: Iterable[Trace], fates: np.ndarray, gone: str, wanted: set[int]) -> _Read:
        """Count what the traces hold; `gone` is what those are called that the other dataset has not."""
        side = {"removed": "before", "added": "after"}[gone]
        found = _Read({}, [])
        for place, (trace, fate) in enumerate(zip(traces, fates, strict=True)):
            if place in wanted:
                found.traces[place] = trace
            if fate == ONLY_HERE and len(found.only_here) < MAX_EXAMPLES:
                found.only_here.append(Row(trace.id, trace.prompt))
            for key, value in trace.meta.items():
                if isinstance(value, str | int):
                    text = msgspec.json.encode(value).decode()
                    self._add(key, text, side, {ONLY_HERE: gone, CHANGED: f"{side} changed"}.get(int(fate), ""))
        return found

    def counts(self) -> list[ValueCount]:
        """Of the keys with few values; by how much each changed, the most first."""
        rows = [
            ValueCount(key, value, *(found[name] for name in ("before", "after", "after changed", "removed", "added")))
            for key, values in self._found.items()
            for value, found in values.items()
            if len(values) <= MAX_VALUES
        ]
        return sorted(rows, key=lambda row: (-(row.removed + row.added + row.changed), row.key, row.value))

    def _add(self, key: str, value: str, *names: str) -> None:
        if key not in self._found and len(self._found) == MAX_KEYS:
            return
        values = self._found.setdefault(key, {})
        if value in values or len(values) <= MAX_VALUES:  # one more than is shown says that there are too many
            values.setdefault(value, Counter()).update(names)


def _example(row: dict[str, Any], found: _Read, now: _Read) -> Changed:
    before, after = found.traces[row["place"]], now.traces[row["place_here"]]
    differences = [one for one in _differences(before, after) if one.before != one.after]
    return Changed(row["by"], before.id, after.id, after.prompt, differences[:MAX_DIFFERENCES])


def _differences(before: Trace, after: Trace) -> Iterator[Difference]:
    yield Difference("prompt", before.prompt, after.prompt)
    for place in range(max(len(before.steps), len(after.steps))):
        there, here = (
            f"{trace.steps[place].type}: {trace.steps[place].content}" if place < len(trace.steps) else None
            for trace in (before, after)
        )
        yield Difference(f"step {place + 1}", there, here)
    yield Difference("final_answer", before.final_answer, after.final_answer)
    for key in sorted(before.meta.keys() | after.meta.keys()):
        there, here = (
            msgspec.json.encode(trace.meta[key], order="sorted").decode() if key in trace.meta else None
            for trace in (before, after)
        )
        yield Difference(f"meta.{key}", there, here)


def _request(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What was asked for differently, but for the name of the result."""
    names = [field.name for field in fields(DatasetConfig)]
    return differing(before, after, [name for name in names if name not in ("dataset_name", "dataset_version")])


def _statistics(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Each figure of the manifests side by side; None where one has none."""
    there, here = _figures(before), _figures(after)
    return [(name, there.get(name), here.get(name)) for name in there | here]


def _figures(manifest: dict[str, Any]) -> dict[str, Any]:
    found = {"traces": manifest["trace_count"]} | manifest["split"] | manifest["stats"]
    found |= {f"source {name}": count for name, count in manifest["provenance"]["sources"].items()}
    found |= {f"tokens, {name}": manifest["lengths"][name] for name in ("min", "mean", "p95", "max")}
    return found | {f"left out: {reason}": count for reason, count in manifest["dropped"].items()}


def _count(column: pl.Series) -> dict[str, int]:
    """How often each text occurs, the commonest first."""
    return dict(sorted(Counter(column.to_list()).items(), key=lambda item: (-item[1], item[0])))
