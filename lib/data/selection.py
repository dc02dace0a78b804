"""Which traces of the store a dataset is made of, in which order, and why each of the others is not.

    chosen = select(store, request, reserved={}, generated=None, scratch=folder)
    chosen.matched, len(chosen), chosen.dropped       # 1000, 988, {"asked in eval set duel_v1": 12}
    for frame in chosen.frames("record"): ...         # the chosen, in order, a batch at a time

Every trace that matches the filters is chosen, or left out for one reason: the first that applies, in the order in
which `_Judge` looks for them, then duplicates, then the limit. The store is streamed: of each trace some forty bytes
stay in memory, whatever its texts.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import polars as pl
from msgspec import Struct

from lib.config import DatasetConfig, TracesConfig
from lib.data.duplicates import NearDuplicates
from lib.data.export import NEEDED
from lib.data.frames import in_order
from lib.data.renderer import CONTROL_IN_JSON, has_control_token
from lib.data.store import Store, first_of_each, read_facts, read_segment, remembering, traces_in
from lib.errors import RequestError
from lib.tasks import TASKS, group_keys, keys_within
from lib.trace import Trace, shown

HELD_OUT_PERCENT = 5
NOT_PLAYED = "of another seed, count or engine than traces asks for"
OVER_LIMIT, DUPLICATE, NEAR_DUPLICATE = "over the limit", "a duplicate of another", "nearly a duplicate of another"
CONTROL = "with a control token of the chat template, such as <eos>, in a text"
NAMED = f"with a key of meta that the file to train on has itself ({', '.join(sorted(NEEDED))})"
UNCHECKED, UNTRUE = "no engine can check its steps", "an engine finds it untrue"
SOURCES = {"builtin": "builtin", "ungar": "ungar", "reasoning-gym": "reasoning_gym"}  # meta.source by engine
TOLD_SOURCES = 100  # by name, as a source may be anything, such as an address for each trace
SHOWN_VALUES = 8  # of a key of meta, where no trace has the one that is asked for
NEEDED_IN_JSON = rf'"({"|".join(sorted(NEEDED))})"\s*:'
HEXADECIMAL = pl.col("content_sha256").bin.encode("hex")
CHOSEN, NO_MATCH = 0, 255  # codes beside those of the reasons


class Selection(NamedTuple):
    """What was chosen. `places` and `codes` have an entry for each trace of the segments, in the order of a scan.

    places   int32, its place in the dataset, negative where it has none
    codes    uint8, 0 for the chosen, 255 for what the filters do not match, else a number of `reasons`, from 1 on
    order    uint32, for each place the number of the trace that has it, in a scan
    facts    steps, characters and held_out of each of the chosen, in the order of a scan
    sources  how many of the chosen come from each, or from the others of many
    """

    segments: list[Path]
    scratch: Path
    places: np.ndarray
    codes: np.ndarray
    order: np.ndarray
    reasons: list[str]
    facts: pl.DataFrame
    sources: dict[str, int]

    def __len__(self) -> int:
        return len(self.order)

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
        named = [HEXADECIMAL if name == "content_sha256" else name for name in columns]
        return in_order(frames_of(self.segments, *named), self.places, self.scratch)

    def left_out(self) -> Iterator[pl.DataFrame]:
        """`id`, `content_sha256` and `reason` of each that matches and was left out."""
        names = pl.Series([None, *self.reasons, *[None] * (255 - len(self.reasons))], dtype=pl.String)
        start = 0
        for frame in frames_of(self.segments, "id", HEXADECIMAL):
            codes = self.codes[start : start + len(frame)]
            start += len(frame)
            reason = names.gather(codes.astype(np.uint32)).rename("reason")
            yield frame.with_columns(reason).drop_nulls("reason")


def select(
    store: Store, request: DatasetConfig, reserved: dict[str, str], generated: TracesConfig | None, scratch: Path
) -> Selection:
    """What the request chooses from the store; files larger than memory are made in the folder `scratch`.

    `reserved` and `generated` are those of `build_dataset`. Raises RequestError where nothing is chosen.
    """
    name, segments = f"{request.dataset_name}-{request.dataset_version}", store.segments()
    judge = _Judge(request, reserved, generated)
    total = sum(frame.item() for frame in frames_of(segments, pl.len()))
    index = _together(map(judge.judged, frames_of(segments, *judge.columns)), total)
    if not index or (index["code"] == NO_MATCH).all():
        raise RequestError(f"dataset {name}: {_nothing_matches(store, request)}")
    codes = index.pop("code")
    order = _order(*map(index.pop, _ORDERED_BY), np.flatnonzero(codes == CHOSEN).astype(np.uint32), segments)
    if request.curation.unique:
        first = first_of_each(index.pop("text")[order], index.pop("text_too")[order])
        order = _without(order, first, codes, judge.code(DUPLICATE))
    if request.curation.near_duplicates is not None:
        found = NearDuplicates(request.curation.near_duplicates)
        records = in_order(frames_of(segments, "record"), _places(order, len(codes)), scratch)
        apart = [not found.seen(trace) for frame in records for trace in traces_in(frame, store.folder)]
        order = _without(order, np.array(apart, bool), codes, judge.code(NEAR_DUPLICATE))
    if request.limit is not None:
        order = _without(order, np.arange(len(order)) < request.limit, codes, judge.code(OVER_LIMIT))
    facts = pl.DataFrame({name: values[codes == CHOSEN] for name, values in index.items()})
    counts = np.bincount(facts.drop_in_place("source").to_numpy(), minlength=len(judge.sources)).tolist()
    sources = _told({source: count for source, count in sorted(zip(judge.sources, counts, strict=True)) if count})
    made = Selection(segments, scratch, _places(order, len(codes)), codes, order, judge.reasons, facts, sources)
    if not len(made):
        reasons = "; ".join(f"{count} {reason}" for reason, count in made.dropped.items())
        raise RequestError(
            f"dataset {name}: all {made.matched} traces that match are left out ({reasons}); "
            "generate or import others, or change the filters"
        )
    return made


def frames_of(segments: list[Path], *columns: str | pl.Expr) -> Iterator[pl.DataFrame]:
    """Columns of every trace of the segments, in the order of a scan."""
    for path in segments:
        yield from read_segment(path, *columns)


def trace_groups(trace: Trace) -> set[str]:
    """Group keys of a trace's question; see `lib.tasks.group_keys`."""
    return group_keys(trace.prompt, str(trace.meta.get("game", "")), trace.meta.get("state"))


def is_held_out(prompt: str) -> bool:
    """Whether examples that ask this are kept for the held-out loss: the same text is always on one side."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


class _Content(Struct, gc=False):
    content: str


class _Texts(Struct, gc=False):
    """What is looked at of a record where the request has rules for texts."""

    prompt: str
    steps: list[_Content]
    final_answer: str


class _WithMeta(Struct):
    """What is looked at of a record where there are filters."""

    meta: dict[str, Any] = {}


_TEXTS, _META = msgspec.json.Decoder(_Texts), msgspec.json.Decoder(_WithMeta)


# What is found out from the facts of a trace: `reserved` is the code of the eval set that asks its question, 0 where
# none does, and `source` the number of its source.
_FOUND = np.dtype([("reserved", "u1"), ("steps", "u2"), ("characters", "u4"), ("source", "u4"), ("held_out", "?")])


class _Judge:
    """What is told of each trace before they are put in order.

    Only what is asked for is decoded of a record, and what depends on the facts alone is looked up once for each of
    them: generated traces ask the same questions again and again.
    """

    def __init__(self, request: DatasetConfig, reserved: dict[str, str], generated: TracesConfig | None):
        self.request, self.reserved, self.generated = request, reserved, generated
        suspect = pl.col("record").str.contains(CONTROL_IN_JSON).alias("suspect")
        named = pl.col("record").str.count_matches(NEEDED_IN_JSON) > 2  # the record has a version and a time of its own
        self.columns = ["record", "facts", suspect, (named | suspect).alias("named"), *_ordering(request)]
        self.reasons: list[str] = []
        self._codes: dict[str, int] = {}
        self.sources: dict[str, int] = {}
        self._letters = _letters(request.curation.scripts)
        self._known = remembering(self._look_up)

    def judged(self, frame: pl.DataFrame) -> dict[str, np.ndarray]:
        """Of each trace: whether it is left out, what it is ordered by, and what is counted of it."""
        found = np.array(list(map(self._known, frame["facts"])), _FOUND)
        rule, texts, metas = self.request.curation, None, None
        if rule.unique or rule.min_ascii or rule.scripts:
            texts = list(map(_TEXTS.decode, frame["record"]))
        if self.request.filters or self.generated is not None:
            metas = [with_meta.meta for with_meta in map(_META.decode, frame["record"])]
        columns = {
            "code": self._codes_of(frame, found, texts, metas),
            **self._keys(frame, metas),
            **{name: found[name] for name in ("steps", "characters", "held_out", "source")},
        }
        if rule.unique:
            digests = np.array(list(map(_text_digest, texts)), "S16").view(">u8").reshape(-1, 2)
            columns |= dict(zip(("text", "text_too"), digests.T.astype(np.uint64), strict=True))
        return columns

    def code(self, reason: str) -> int:
        """The number by which a reason goes."""
        if reason not in self._codes:
            self.reasons.append(reason)
            self._codes[reason] = len(self.reasons)
        return self._codes[reason]

    def _keys(self, frame: pl.DataFrame, metas: list[dict[str, Any]] | None) -> dict[str, np.ndarray]:
        """What the trace is ordered by: a moment, and 16 bytes, of its id or of a hash of seed and content.

        What the configuration plays is of one moment, the newest, whenever some of it was first played.
        """
        if self.request.selection_strategy != "random":
            keys = {name: frame[name].to_numpy() for name in _ORDERED_BY}
            if self.generated is not None:
                own = [_is_of_an_engine(meta, self.generated.game) for meta in metas]
                keys["created"] = np.where(own, np.iinfo(np.int64).max, keys["created"])
            return keys
        seed = f"{self.request.seed}:"
        hashes = b"".join([hashlib.sha256((seed + of).encode()).digest()[:16] for of in frame["content_sha256"]])
        key, key_too = np.frombuffer(hashes, ">u8").reshape(-1, 2).T.astype(np.uint64)
        return {"created": np.zeros(len(frame), np.int8), "key": key, "key_too": key_too}

    def _look_up(self, facts: str) -> tuple[int, int, int, int, bool]:
        """The values of _FOUND."""
        trace = read_facts(facts, "the store")
        keys = chain(group_keys(trace.prompt, trace.game, trace.state), keys_within(trace.prompt))
        held = [self.reserved[key] for key in keys if key in self.reserved]
        reserved = self.code(f"asked in eval set {min(held)}") if held else CHOSEN
        source = self.sources.setdefault(trace.source, len(self.sources))
        return reserved, trace.steps, trace.characters, source, is_held_out(trace.prompt)

    def _codes_of(
        self, frame: pl.DataFrame, found: np.ndarray, texts: list[_Texts] | None, metas: list[dict[str, Any]] | None
    ) -> np.ndarray:
        """Of each trace CHOSEN, NO_MATCH or the code of the first reason why it is left out for what it is."""
        rule, codes = self.request.curation, np.full(len(frame), CHOSEN, np.uint8)
        length, steps = found["characters"], found["steps"]

        def leave_out(where: Any, reason: str) -> None:
            codes[np.asarray(where, bool) & (codes == CHOSEN)] = self.code(reason)

        if metas is not None:
            codes[~np.array([_matches(meta, self.request.filters) for meta in metas], bool)] = NO_MATCH
            if self.generated is not None:
                leave_out([_not_played(meta, self.generated) for meta in metas], NOT_PLAYED)
        codes = np.where(codes == CHOSEN, found["reserved"], codes)
        leave_out(length < rule.min_characters, f"of fewer than {rule.min_characters} characters")
        if rule.max_characters is not None:
            leave_out(length > rule.max_characters, f"of more than {rule.max_characters} characters")
        leave_out(steps < rule.min_steps, f"of fewer than {rule.min_steps} steps")
        if rule.max_steps is not None:
            leave_out(steps > rule.max_steps, f"of more than {rule.max_steps} steps")
        if rule.min_ascii:
            shares = np.array(list(map(ascii_share, texts)))
            leave_out(shares < rule.min_ascii, f"of less than {rule.min_ascii:g} ASCII characters")
        if rule.scripts:
            whole = pl.Series(list(map(_text, texts)))
            letters, known = (whole.str.count_matches(kind).to_numpy() for kind in self._letters)
            reason = f"of less than {rule.min_in_scripts:g} letters in {' or '.join(rule.scripts)}"
            shares = known / np.maximum(letters, 1)
            leave_out((shares < rule.min_in_scripts) & (letters > 0), reason)
        suspects = np.flatnonzero(frame["suspect"].to_numpy() & (codes == CHOSEN))
        for place, trace in zip(suspects, traces_in(frame.select("record")[suspects], "the store"), strict=True):
            codes[place] = self.code(CONTROL) if has_control_token(trace) else CHOSEN
        named = np.flatnonzero(frame["named"].to_numpy() & (codes == CHOSEN))
        for place, with_meta in zip(named, map(_META.decode, frame["record"].gather(named)), strict=True):
            codes[place] = self.code(NAMED) if NEEDED & with_meta.meta.keys() else CHOSEN
        if rule.verified:
            left = np.flatnonzero(codes == CHOSEN)
            untrue = map(_found_by_engine, traces_in(frame.select("record")[left], "the store"))
            for place, reason in zip(left, untrue, strict=True):
                codes[place] = self.code(reason) if reason else CHOSEN
        return codes


def _ordering(request: DatasetConfig) -> list[pl.Expr]:
    """What a trace is ordered by: numbers that have the order of the texts, filled up with zeros."""
    if request.selection_strategy == "random":
        return [HEXADECIMAL]
    moment = pl.col("created_at").str.to_datetime("%Y-%m-%dT%H:%M:%S%.6fZ", time_unit="us").cast(pl.Int64)
    id = pl.col("id").str.pad_end(16, "\0").cast(pl.Binary)
    halves = [id.bin.slice(start, 8).bin.reinterpret(dtype=pl.UInt64, endianness="big") for start in (0, 8)]
    return [moment.alias("created"), halves[0].alias("key"), halves[1].alias("key_too")]


def _found_by_engine(trace: Trace) -> str:
    """Why the trace is left out where all are to be verified; empty where it is not."""
    game = TASKS.get(str(trace.meta.get("game", "")))
    if game is None or "state" not in trace.meta:
        return UNCHECKED
    return UNTRUE if game.verify(trace) else ""


def ascii_share(texts: _Texts) -> float:
    """The share of the characters that are ASCII: a plain test for text in another script."""
    text = _text(texts)
    return len(text.encode("ascii", "ignore")) / len(text)


def _text(texts: _Texts) -> str:
    return "".join([texts.prompt, texts.final_answer, *[step.content for step in texts.steps]])


def _letters(scripts: list[str]) -> tuple[str, str]:
    """Patterns of a letter, and of one of these scripts. Raises RequestError for what is no script.

    A letter that many scripts share, as the mathematical ones do, belongs to none.
    """
    for script in scripts:
        try:
            if not re.fullmatch("[A-Za-z_ ]+", script):
                raise pl.exceptions.ComputeError(script)
            pl.Series([""]).str.count_matches(rf"\p{{Script={script}}}")
        except pl.exceptions.ComputeError:
            raise RequestError(
                f"dataset.curation.scripts: {shown(script)} is no script that Unicode names, "
                "as Latin, Cyrillic, Greek, Arabic, Devanagari, Han, Hiragana, Katakana, Hangul"
            ) from None
    named = "".join(rf"\p{{Script={script}}}" for script in scripts)
    return r"[\p{L}--[\p{Script=Common}\p{Script=Inherited}]]", rf"[\p{{L}}&&[{named}]]"


def _text_digest(texts: _Texts) -> bytes:
    """The same for the same question, steps and answer, whatever their `meta`."""
    parts = [texts.prompt, *[step.content for step in texts.steps], texts.final_answer]
    return hashlib.sha256("\0".join(parts).encode()).digest()[:16]


_ORDERED_BY = ("created", "key", "key_too")


def _together(judged: Iterable[dict[str, np.ndarray]], total: int) -> dict[str, np.ndarray]:
    """The columns of all, which are so many."""
    index: dict[str, np.ndarray] = {}
    start = 0
    for columns in judged:
        index = index or {name: np.empty(total, values.dtype) for name, values in columns.items()}
        for name, values in columns.items():
            index[name][start : start + len(values)] = values
        start += len(columns["code"])
    return index


def _order(
    created: np.ndarray, key: np.ndarray, key_too: np.ndarray, chosen: np.ndarray, segments: list[Path]
) -> np.ndarray:
    """The chosen in the order of the request: the newest first, then by key, and of equal keys by the id.

    The key alone tells nearly all apart, and one moment is often that of all; only what is needed is sorted by. Those
    that tie share out their places anew.
    """
    order = chosen[np.argsort(key[chosen])]
    if len(places := _places_of_ties(_same(key[order]))):
        tied = order[places]
        order[places] = tied[np.lexsort((key_too[tied], key[tied]))]
    if not _same(created[order]).all():
        order = order[np.argsort(-created[order], kind="stable")]
    same = _same(created[order]) & _same(key[order]) & _same(key_too[order])
    if len(places := _places_of_ties(same)):  # of those that begin alike the rest is looked at
        tied = order[places]
        ties = {"created": -created[tied], "key": key[tied], "key_too": key_too[tied], "id": _ids_of(tied, segments)}
        order[places] = tied[pl.DataFrame(ties).select(pl.arg_sort_by(*ties)).to_series().to_numpy()]
    return order


def _same(values: np.ndarray) -> np.ndarray:
    """Of each but the first, whether it is the same as the one before it."""
    return values[1:] == values[:-1]


def _places_of_ties(same: np.ndarray) -> np.ndarray:
    """Of what is in order the places of those that are the same as one beside them, from `_same`."""
    return np.flatnonzero(np.append(same, False) | np.append(False, same))


def _ids_of(at: np.ndarray, segments: list[Path]) -> pl.Series:
    """The ids of the traces with these numbers."""
    start, found, sorted_at = 0, [], np.sort(at)
    for frame in frames_of(segments, "id"):
        first, last = np.searchsorted(sorted_at, (start, start + len(frame)))
        found.append(frame["id"].gather(sorted_at[first:last] - start))
        start += len(frame)
    return pl.concat(found).gather(np.searchsorted(sorted_at, at))


def _without(order: np.ndarray, stays: np.ndarray, codes: np.ndarray, code: int) -> np.ndarray:
    """Those that stay; of the others the code is noted."""
    codes[order[~stays]] = code
    return order[stays]


def _places(order: np.ndarray, total: int) -> np.ndarray:
    places = np.full(total, -1, np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    return places


def _told(sources: dict[str, int]) -> dict[str, int]:
    """The sources, where they are no more than are told; else our engines, the commonest, and the others together."""
    kept = set(sorted(sources, key=lambda source: (source not in SOURCES.values(), -sources[source]))[:TOLD_SOURCES])
    others = [count for source, count in sources.items() if source not in kept]
    told = {source: count for source, count in sources.items() if source in kept}
    return told | ({f"{len(others)} others": sum(others)} if others else {})


def _is_of_an_engine(meta: dict[str, Any], game: str) -> bool:
    """Whether an engine played it: one that the configuration does not ask for is left out."""
    return meta.get("game") == game and meta.get("source") in SOURCES.values()


def _not_played(meta: dict[str, Any], generated: TracesConfig) -> bool:
    if not _is_of_an_engine(meta, generated.game):
        return False
    if meta["source"] != SOURCES[generated.engine]:
        return True
    episode = meta.get("episode_index", -1)
    return meta.get("seed") != generated.seed or type(episode) is not int or episode >= generated.count


def _matches(meta: dict[str, Any], filters: dict[str, Any]) -> bool:
    return all(
        key in meta and any(type(meta[key]) is type(item) and meta[key] == item for item in _as_list(wanted))
        for key, wanted in filters.items()
    )


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _nothing_matches(store: Store, request: DatasetConfig) -> str:
    total = store.count()
    if not total:
        return f"the store {store.folder} is empty; generate or import traces first (python -m lib traces --help)"
    asked = ", ".join(f"{key}={' or '.join(map(shown, _as_list(item)))}" for key, item in request.filters.items())
    values = store.meta_values(SHOWN_VALUES + 1)
    held = "; ".join(_held(key, values) for key in request.filters)
    return f"none of {total} traces matches {asked}; the store holds {held}"


def _held(key: str, values: dict[str, dict[str, int]]) -> str:
    if key not in values:
        return f"no key {key}, only {', '.join(values) or 'none'}"
    found = [shown(json.loads(text)) for text in values[key]]
    return f"{key}: {', '.join(found[:SHOWN_VALUES])}{', …' if len(found) > SHOWN_VALUES else ''}"
