"""Where a trace came from: the file and line that it was read from, or the game and seed that it was played with.

origins_in_dataset(dataset, ["7c2f…"])["7c2f…"]      # prints as "quiz.csv:3",
origins_in_store(store, "7c2f")[0]                   # or as "high_card_duel, seed 42, episode 17, by builtin"
"""

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import polars as pl

from lib.data.dataset import Dataset
from lib.data.selection import frames_of
from lib.data.store import Store, traces_in
from lib.trace import Trace

_READ = ("id", "record", "file", "line")


class Origin(NamedTuple):
    """A trace, and where it was read; `file` is empty, and `line` 0, where it was not read from a file."""

    trace: Trace
    file: str
    line: int

    def __str__(self) -> str:
        if self.file:
            return f"{self.file}:{self.line}"
        meta = self.trace.meta
        told = [str(meta["game"])] if "game" in meta else []
        told += [f"{name} {meta[key]}" for name, key in (("seed", "seed"), ("episode", "episode_index")) if key in meta]
        return ", ".join([*told, f"by {meta['source']}" if "source" in meta else "of no recorded source"])


def origins_in_dataset(dataset: Dataset, ids: Collection[str]) -> dict[str, Origin]:
    """By its id, each of these traces that the dataset holds."""
    frame = pl.scan_parquet(dataset.folder / "traces.parquet", glob=False)
    found = frame.filter(pl.col("id").is_in(list(ids))).select(_READ)
    return {origin.trace.id: origin for origin in _origins([found.collect()], str(dataset.folder))}


def origins_in_store(store: Store, start: str) -> list[Origin]:
    """Every trace of the store whose id begins so, in the order of ids."""
    chosen = (frame.filter(pl.col("id").str.starts_with(start)) for frame in frames_of(store.segments(), *_READ))
    return sorted(_origins(chosen, str(store.folder)), key=lambda origin: origin.trace.id)


def _origins(frames: Iterable[pl.DataFrame], place: str) -> Iterator[Origin]:
    for frame in frames:
        for trace, file, line in zip(traces_in(frame, place), frame["file"], frame["line"], strict=True):
            yield Origin(trace, file or "", line or 0)
