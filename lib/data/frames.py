"""Tables larger than memory, as Parquet: read, written and put in order a batch at a time."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from queue import Full, Queue
from typing import IO

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from lib.errors import RetraceError

PART_ROWS = 50_000  # that are held at a time
PARQUET = {"compression": "zstd", "compression_level": 1, "statistics": False}  # twice as fast as the default


def read_frames(file: IO[bytes] | Path, *columns: str | pl.Expr) -> Iterator[pl.DataFrame]:
    """Columns of a Parquet file, in batches."""
    if not isinstance(file, Path):
        file.seek(0)
    yield from pl.scan_parquet(file).select(*columns).collect_batches(lazy=True)


def write_frames(frames: Iterator[pl.DataFrame], file: IO[bytes], place: str) -> None:
    """Write the frames, all of one schema, to the file as Parquet; none at all leave it as it is.

    They are made in this thread and written by another: Polars pulls what it writes, and whoever reads traces
    must be free to raise, to be interrupted, and to use the whole stack of this thread. Raises RetraceError, which
    tells the `place`, where the file cannot be written.
    """
    if (first := next(frames, None)) is None:
        return
    queue: Queue[pl.DataFrame | None] = Queue(maxsize=1)
    source = register_io_source(lambda *_: _until_none(queue), schema=first.schema)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(source.sink_parquet, file, row_group_size=len(first), **PARQUET)
        try:
            for frame in chain([first], frames):
                _put(queue, frame, written)
                if written.done():
                    break
        finally:
            _put(queue, None, written)
    try:
        written.result()
    except pl.exceptions.PolarsError as error:
        reason = str(error).rpartition(": ")[2]
        raise RetraceError(f"{place}: cannot be written ({reason}); nothing was added") from None


def in_order(frames: Iterable[pl.DataFrame], places: np.ndarray, folder: Path) -> Iterator[pl.DataFrame]:
    """The rows of the frames in another order: row i goes to `places[i]`, or nowhere where that is negative.

    `places` holds each of 0, 1, … once, as int32[rows]. Where they are more than are held at a time, the rows are
    dealt out to files in a temporary folder within `folder`, one file for each range of places, which are then read
    one by one.
    """
    parts = 1 + max(0, int(places.max(initial=-1))) // PART_ROWS
    if parts == 1:
        if held := list(_placed(frames, places)):
            yield pl.concat(held).sort("place").drop("place")
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".parts-") as scratch:
        files: defaultdict[int, list[Path]] = defaultdict(list)
        for number, held in enumerate(_gathered(_placed(frames, places))):
            dealt = held.with_columns(part=pl.col("place") // PART_ROWS).partition_by("part", as_dict=True)
            for (part,), some in dealt.items():
                files[part].append(Path(scratch, f"{part}-{number}.arrow"))
                some.drop("part").write_ipc(files[part][-1], compression="lz4")
        for part in range(parts):
            held = pl.concat([pl.read_ipc(file) for file in files[part]])
            for file in files.pop(part):
                os.unlink(file)
            yield held.sort("place").drop("place")


def _placed(frames: Iterable[pl.DataFrame], places: np.ndarray) -> Iterator[pl.DataFrame]:
    """The frames with the place of each row, without the rows that have none."""
    start = 0
    for frame in frames:
        here = pl.Series("place", places[start : start + len(frame)])
        start += len(frame)
        if len(found := frame.with_columns(here).filter(pl.col("place") >= 0)):
            yield found


def _gathered(frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same rows, about as many at a time as are held."""
    held: list[pl.DataFrame] = []
    for frame in frames:
        held.append(frame)
        if sum(map(len, held)) >= PART_ROWS:
            yield pl.concat(held)
            held = []
    if held:
        yield pl.concat(held)


def _until_none(queue: Queue[pl.DataFrame | None]) -> Iterator[pl.DataFrame]:
    while (frame := queue.get()) is not None:
        yield frame


def _put(queue: Queue[pl.DataFrame | None], item: pl.DataFrame | None, written: Future[None]) -> None:
    """Wait until there is room for the item, or nobody left to take it, as where the disk is full."""
    while not written.done():
        with suppress(Full):
            return queue.put(item, timeout=0.1)
