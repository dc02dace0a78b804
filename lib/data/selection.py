"""Which traces of the store a dataset is made of, in which order, and why each of the others is not.

    chosen = select(store, request, reserved={}, generated=None, scratch=folder)
    chosen.matched, len(chosen), chosen.dropped       # 1000, 988, {"asked in eval set duel_v1": 12}
    for frame in chosen.frames("record"): ...         # the chosen, in order, a batch at a time

Every trace that matches the filters is chosen, or left out for one reason: the first that applies, in the order in
which `_Judge.reason` looks for them, then duplicates, then the limit. The store is streamed: of each trace some forty
bytes stay in memory, whatever its texts.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from lib.config import CurationConfig, DatasetConfig, TracesConfig
from lib.data.duplicates import NearDuplicates
from lib.data.frames import in_order
from lib.data.renderer import CONTROL_IN_JSON, refuse_control_tokens_in
from lib.data.store import Store, read_segment, traces_in
from lib.errors import RequestError
from lib.tasks import TASKS, group_keys
from lib.trace import Trace, shown

HELD_OUT_PERCENT = 5
NOT_PLAYED = "of another seed, count or engine than traces asks for"
OVER_LIMIT, DUPLICATE, NEAR_DUPLICATE = "over the limit", "a duplicate of another", "nearly a duplicate of another"
UNCHECKED, UNTRUE = "no engine can check its steps", "an engine finds it untrue"
CHOSEN, NO_MATCH = 0, 255  # codes beside those of the reasons


class Selection(NamedTuple):
    """What was chosen. `places` and `codes` have an entry for each trace of the segments, in the order of a scan.

    places   int32, its place in the dataset, negative where it has none
    codes    uint8, 0 for the chosen, 255 for what the filters do not match, else a number of `reasons`, from 1 on
    facts    steps, characters, held_out and source of each of the chosen, in their order
    """

    segments: list[Path]
    scratch: Path
    places: np.ndarray
    codes: np.ndarray
    reasons: list[str]
    facts: pl.DataFrame

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def matched(self) -> int:
        return int((self.codes != NO_MATCH).sum())

    @property
    def dropped(self) -> dict[str, int]:
        """How many match and are left out, by reason; in the order of the names."""
        counts = np.bincount(self.codes, minlength=256)
        found = {reason: int(counts[code]) for code, reason in enumerate(self.reasons, 1)}
        return {reason: count for reason, count in sorted(found.items()) if count}

    def frames(self, *columns: str) -> Iterator[pl.DataFrame]:
        """Columns of the chosen, in their order."""
        return in_order(frames_of(self.segments, *columns), self.places, self.scratch)

    def left_out(self) -> Iterator[pl.DataFrame]:
        """`id`, `content_sha256` and `reason` of each that matches and was left out."""
        names = pl.Series([None, *self.reasons, *[None] * (255 - len(self.reasons))], dtype=pl.String)
        start = 0
        for frame in frames_of(self.segments, "id", "content_sha256"):
            codes = self.codes[start : start + len(frame)]
            start += len(frame)
            reason = names.gather(codes.astype(np.uint32)).rename("reason")
            yield frame.with_columns(reason).drop_nulls("reason")


def select(
    store: Store, request: DatasetConfig, reserved: dict[str, str], generated: TracesConfig | None, scratch: Path
) -> Selection:
    """What the request chooses from the store; files larger than memory are made in the folder `scratch`.

    `reserved` and `generated` are those of `build_dataset`. Raises RequestError where nothing is chosen, and for a
    control token in a text of what is.
    """
    name, segments = f"{request.dataset_name}-{request.dataset_version}", store.segments()
    judge = _Judge(request, reserved, generated)
    index = pl.concat([_NOTHING, *map(judge.judged, frames_of(segments, *_READ))]).with_row_index("at")
    codes = index["code"].to_numpy(writable=True)
    if not (codes != NO_MATCH).any():
        raise RequestError(f"dataset {name}: {_nothing_matches(store, request)}")
    chosen = _sorted(index.filter(pl.col("code") == CHOSEN).drop("code"), request, segments)
    if request.curation.unique:
        first = chosen.select(pl.struct("text", "text_too").is_first_distinct()).to_series()
        chosen = _without(chosen, first, codes, judge.code(DUPLICATE))
    if request.curation.near_duplicates is not None:
        found = NearDuplicates(request.curation.near_duplicates)
        places = _places(chosen, len(codes))
        records = in_order(frames_of(segments, "record"), places, scratch)
        apart = [not found.seen(trace) for frame in records for trace in traces_in(frame, store.folder)]
        chosen = _without(chosen, pl.Series(apart, dtype=pl.Boolean), codes, judge.code(NEAR_DUPLICATE))
    if request.limit is not None:
        within = pl.int_range(len(chosen), eager=True) < request.limit
        chosen = _without(chosen, within, codes, judge.code(OVER_LIMIT))
    facts = chosen.select("steps", "characters", "held_out", source=judge.sources_of(chosen["source"]))
    made = Selection(segments, scratch, _places(chosen, len(codes)), codes, judge.reasons, facts)
    if not len(made):
        reasons = "; ".join(f"{count} {reason}" for reason, count in made.dropped.items())
        raise RequestError(
            f"dataset {name}: all {made.matched} traces that match are left out ({reasons}); "
            "generate or import others, or change the filters"
        )
    if len(suspects := chosen.filter("suspect")):
        for frame in in_order(frames_of(segments, "record"), _places(suspects, len(codes)), scratch):
            for trace in traces_in(frame, store.folder):
                refuse_control_tokens_in(trace)
    return made


def frames_of(segments: list[Path], *columns: str) -> Iterator[pl.DataFrame]:
    """Columns of every trace of the segments, in the order of a scan."""
    for path in segments:
        yield from read_segment(path, *columns)


def trace_groups(trace: Trace) -> set[str]:
    """Group keys of a trace's question; see `lib.tasks.group_keys`."""
    return group_keys(trace.prompt, str(trace.meta.get("game", "")), trace.meta.get("state"))


def is_held_out(prompt: str) -> bool:
    """Whether examples that ask this are kept for the held-out loss: the same question is always on one side."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


_READ = ("id", "content_sha256", "created_at", "record")
_SCHEMA = {
    "code": pl.UInt8, "created": pl.Int64, "key": pl.UInt64, "key_too": pl.UInt64, "text": pl.UInt64,
    "text_too": pl.UInt64, "steps": pl.UInt16, "characters": pl.UInt32, "held_out": pl.Boolean, "source": pl.UInt16,
    "suspect": pl.Boolean,
}  # fmt: skip
_NOTHING = pl.DataFrame(schema=_SCHEMA)


class _Judge:
    """What is told of each trace before they are put in order."""

    def __init__(self, request: DatasetConfig, reserved: dict[str, str], generated: TracesConfig | None):
        self.request, self.reserved, self.generated = request, reserved, generated
        self.reasons: list[str] = []
        self._codes: dict[str, int] = {}
        self._sources: dict[str, int] = {}

    def judged(self, frame: pl.DataFrame) -> pl.DataFrame:
        """A row for each trace: whether it is left out, what it is ordered by, and what is counted of it."""
        traces = list(traces_in(frame, "the store"))
        unique = self.request.curation.unique
        keys = self._keys(frame)
        texts = _big_endian([_text_digest(trace) for trace in traces]) if unique else np.zeros((len(frame), 2))
        return pl.DataFrame(
            {
                "code": list(map(self._code_of, traces)),
                "created": frame["created_at"].str.to_datetime("%Y-%m-%dT%H:%M:%S%.6fZ", time_unit="us").cast(int),
                "key": keys[:, 0],
                "key_too": keys[:, 1],
                "text": texts[:, 0],
                "text_too": texts[:, 1],
                "steps": [len(trace.steps) for trace in traces],
                "characters": list(map(characters, traces)),
                "held_out": [is_held_out(trace.prompt) for trace in traces],
                "source": [self._source_of(trace) for trace in traces],
                "suspect": frame["record"].str.contains(CONTROL_IN_JSON),
            },
            schema=_SCHEMA,
        )

    def code(self, reason: str) -> int:
        """The number by which a reason goes."""
        if reason not in self._codes:
            self.reasons.append(reason)
            self._codes[reason] = len(self.reasons)
        return self._codes[reason]

    def sources_of(self, codes: pl.Series) -> pl.Series:
        return pl.Series(list(self._sources), dtype=pl.String).gather(codes.cast(pl.UInt32))

    def _source_of(self, trace: Trace) -> int:
        return self._sources.setdefault(str(trace.meta.get("source", "unknown")), len(self._sources))

    def _keys(self, frame: pl.DataFrame) -> np.ndarray:
        """The 16 bytes that decide the order: of a hash of seed and content, or the first of the id."""
        if self.request.selection_strategy == "random":
            seed = self.request.seed
            return _big_endian([hashlib.sha256(f"{seed}:{of}".encode()).digest() for of in frame["content_sha256"]])
        return _big_endian([id.encode() for id in frame["id"]])

    def _code_of(self, trace: Trace) -> int:
        if not _matches(trace, self.request.filters):
            return NO_MATCH
        reason = self.reason(trace)
        return self.code(reason) if reason else CHOSEN

    def reason(self, trace: Trace) -> str:
        """Why a trace that matches is left out for what it is; empty where it is not."""
        if self.generated is not None and _not_played(trace, self.generated):
            return NOT_PLAYED
        if held := [self.reserved[key] for key in trace_groups(trace) if key in self.reserved]:
            return f"asked in eval set {min(held)}"
        return unfit(trace, self.request.curation)


def unfit(trace: Trace, rule: CurationConfig) -> str:
    """The first rule that the trace does not keep to; empty where it keeps to all."""
    length, steps = characters(trace), len(trace.steps)
    if length < rule.min_characters:
        return f"of fewer than {rule.min_characters} characters"
    if rule.max_characters is not None and length > rule.max_characters:
        return f"of more than {rule.max_characters} characters"
    if steps < rule.min_steps:
        return f"of fewer than {rule.min_steps} steps"
    if rule.max_steps is not None and steps > rule.max_steps:
        return f"of more than {rule.max_steps} steps"
    if rule.min_ascii and ascii_share(trace) < rule.min_ascii:
        return f"of less than {rule.min_ascii:g} ASCII characters"
    if rule.verified:
        game = TASKS.get(str(trace.meta.get("game", "")))
        if game is None or "state" not in trace.meta:
            return UNCHECKED
        if game.verify(trace):
            return UNTRUE
    return ""


def characters(trace: Trace) -> int:
    """Of the prompt, the steps and the answer."""
    return len(trace.prompt) + len(trace.final_answer) + sum(len(step.content) for step in trace.steps)


def ascii_share(trace: Trace) -> float:
    """The share of those characters that are ASCII: a plain test for text in another script."""
    texts = [trace.prompt, trace.final_answer, *(step.content for step in trace.steps)]
    return sum(sum(map(str.isascii, text)) for text in texts) / sum(map(len, texts))


def _text_digest(trace: Trace) -> bytes:
    """The same for the same question, steps and answer, whatever their `meta`."""
    texts = [trace.prompt, *(step.content for step in trace.steps), trace.final_answer]
    return hashlib.sha256("\0".join(texts).encode()).digest()


def _big_endian(texts: list[bytes]) -> np.ndarray:
    """uint64[texts, 2]: the first 16 bytes of each, so that numbers and texts have one order."""
    return np.array([text[:16] for text in texts], dtype="S16").view(">u8").reshape(-1, 2).astype(np.uint64)


def _sorted(chosen: pl.DataFrame, request: DatasetConfig, segments: list[Path]) -> pl.DataFrame:
    """In the order of the request: by the hash of seed and content, or the newest first and ties by id."""
    if request.selection_strategy == "random":
        return chosen.sort("key", "key_too")
    order = {"by": ["created", "key", "key_too"], "descending": [True, False, False]}
    chosen = chosen.sort(**order)
    same = pl.all_horizontal([pl.col(name) == pl.col(name).shift() for name in order["by"]]).fill_null(False)
    tied = chosen.select(same | same.shift(-1, fill_value=False)).to_series()
    if tied.any():  # of those that begin alike the rest is looked at, and they share out their places anew
        ids = _ids_of(chosen.filter(tied)["at"], segments)
        again = chosen.filter(tied).join(ids, on="at").sort([*order["by"], "id"], descending=[True, *[False] * 3])
        places = pl.int_range(len(chosen), eager=True)
        order_again = pl.concat([places.filter(~tied), places.filter(tied)]).arg_sort()
        chosen = pl.concat([chosen.filter(~tied), again.drop("id")])[order_again]
    return chosen


def _ids_of(at: pl.Series, segments: list[Path]) -> pl.DataFrame:
    """The ids of the traces with these numbers."""
    start, found = 0, []
    for frame in frames_of(segments, "id"):
        found.append(frame.with_row_index("at", offset=start).filter(pl.col("at").is_in(at.implode())))
        start += len(frame)
    return pl.concat(found)


def _without(chosen: pl.DataFrame, stays: pl.Series, codes: np.ndarray, code: int) -> pl.DataFrame:
    """Those that stay; of the others the code is noted."""
    codes[chosen["at"].filter(~stays).to_numpy()] = code
    return chosen.filter(stays)


def _places(chosen: pl.DataFrame, total: int) -> np.ndarray:
    places = np.full(total, -1, np.int32)
    places[chosen["at"].to_numpy()] = np.arange(len(chosen), dtype=np.int32)
    return places


def _not_played(trace: Trace, generated: TracesConfig) -> bool:
    meta = trace.meta
    if meta.get("game") != generated.game or meta.get("source") not in ("builtin", "ungar"):
        return False
    if meta["source"] != generated.engine:
        return True
    return meta.get("seed") != generated.seed or not meta.get("episode_index", -1) < generated.count


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
