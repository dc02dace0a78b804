"""Tables larger than memory, as Parquet: read, written and put in order a batch at a time."""

import io
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from queue import Full, Queue
from typing import IO, TypeVar

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from lib.errors import RetraceError

GROUP_ROWS, GROUP_BYTES = 4_000, 1 << 23  # a row group of a file has so many of either, where there are so many
PART_ROWS = 25_000  # that are written at a time
PART_BYTES = 1 << 26  # that are put in order at a time, while as many are read, unless PART_ROWS have more
T = TypeVar("T")
PARQUET = {"compression": "zstd", "compression_level": 1, "statistics": False}  # twice as fast as the default


def read_frames(file: IO[bytes] | Path, *columns: str | pl.Expr) -> Iterator[pl.DataFrame]:
    """Columns of a Parquet file, in batches."""
    if not isinstance(file, Path):
        file.seek(0)
    yield from pl.scan_parquet(file, glob=False).select(*columns).collect_batches(lazy=True)


def write_frames(frames: Iterator[pl.DataFrame], file: IO[bytes], place: str) -> None:
    """Write the frames, all of one schema, to the file as Parquet; none at all leave it as it is.

    They are made in this thread and written by another: Polars pulls what it writes, and whoever reads traces
    must be free to raise, to be interrupted, and to use the whole stack of this thread. Raises RetraceError, which
    tells the `place`, where the file cannot be written.
    """
    if (first := _first_group(frames)) is None:
        return
    queue: Queue[pl.DataFrame | None] = Queue(maxsize=1)
    source = register_io_source(lambda *_: _until_none(queue), schema=first.schema)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(source.sink_parquet, file, row_group_size=max(1, len(first)), **PARQUET)
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
        raise RetraceError(f"{place}: cannot be written ({_reason(error, file)}); nothing was added") from None


def _first_group(frames: Iterator[pl.DataFrame]) -> pl.DataFrame | None:
    """The first rows, of as many frames as make a row group: all others of the file will have as many rows.

    Of frames that were filtered little may be left, which is copied, or all that was read with it would stay in memory.
    """
    held: list[pl.DataFrame] = []
    rows = size = 0
    for frame in frames:
        rows, size = rows + len(frame), size + frame.estimated_size()
        if rows >= GROUP_ROWS or size >= GROUP_BYTES:
            return pl.concat([*held, frame])
        held.append(pl.DataFrame(frame.rows(), frame.schema, orient="row"))
    return pl.concat(held) if held else None


def _reason(error: pl.exceptions.PolarsError, file: IO[bytes]) -> str:
    """Why the file cannot be written; the system is asked where Polars tells only that one of its threads was gone.

    It is asked by writing more to the file, which is given up anyway.
    """
    reason = str(error).rpartition(": ")[2]
    if "os error" not in reason:
        try:
            for _ in range(16):  # the first may find some room
                os.write(file.fileno(), bytes(1 << 16))
        except OSError as refused:
            return refused.strerror
    return reason


def in_order(frames: Iterable[pl.DataFrame], places: np.ndarray, folder: Path) -> Iterator[pl.DataFrame]:
    """The rows of the frames in another order: row i goes to `places[i]`, or nowhere where that is negative.

    `places` holds each of 0, 1, … once, as int32[rows]. They come back PART_ROWS at a time. Where they are more, the
    rows are dealt out, by ranges of places, to a temporary file in `folder`, which is one of our own in the system's
    temporary folder, and then read one range after the other; a range is as many times PART_ROWS as PART_BYTES hold. It
    is one file, as making files by the thousand takes longer. Raises RetraceError where there is no room for it.
    """
    total = 1 + int(places.max(initial=-1))
    held = _gathered(_placed(frames, places))
    if total <= PART_ROWS:
        if rows := list(held):
            yield pl.concat(rows).sort("place").drop("place")
        return
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        first = next(held)
        width = PART_ROWS * max(1, PART_BYTES * len(first) // (1 + first.estimated_size()) // PART_ROWS)
        extents: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        dealt = (pool.map(_packed, *_dealt(rows.sort("place"), width)) for rows in chain([first], held))
        for packed in _one_ahead(dealt):
            for part, content in packed:
                extents[part].append((len(content), file.tell()))
                _append(file, content, folder)
        read = (pool.map(partial(_unpacked, file), extents[part]) for part in range(-(-total // width)))
        for rows in _one_ahead(read):
            yield from pl.concat(rows).sort("place").drop("place").iter_slices(PART_ROWS)


def _one_ahead(started: Iterator[T]) -> Iterator[T]:
    """The same, each given out when the next one is started, too."""
    held = list(islice(started, 1))
    for one in started:
        yield held.pop()
        held.append(one)
    yield from held


def _packed(part: int, rows: pl.DataFrame) -> tuple[int, bytes]:
    content = io.BytesIO()
    rows.write_ipc_stream(content, compression="lz4")
    return part, content.getvalue()


def _append(file: IO[bytes], content: bytes, folder: Path) -> None:
    left = memoryview(content)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); set TMPDIR to one with more room"
        raise RetraceError(f"temporary folder {folder.parent}: {reason}") from None


def _unpacked(file: IO[bytes], extent: tuple[int, int]) -> pl.DataFrame:
    """The rows of so many bytes from here on."""
    size, start = extent
    end, most = start + size, 1 << 30  # systems read no more than two at once
    pieces = [os.pread(file.fileno(), min(most, end - at), at) for at in range(start, end, most)]
    return pl.read_ipc_stream(b"".join(pieces))


def _dealt(rows: pl.DataFrame, width: int) -> tuple[list[int], list[pl.DataFrame]]:
    """Rows that are in order of their places, cut at every `width` of these: the number of each cut, and its rows."""
    parts = rows["place"].to_numpy() // width
    starts = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(parts)]
    return parts[starts[:-1]].tolist(), [rows[start:end] for start, end in pairwise(starts)]


def _placed(frames: Iterable[pl.DataFrame], places: np.ndarray) -> Iterator[pl.DataFrame]:
    """The frames with the place of each row, without the rows that have none."""
    start = 0
    for frame in frames:
        here = pl.Series("place", places[start : start + len(frame)])
        start += len(frame)
        found = frame.with_columns(here).filter(pl.col("place") >= 0)
        if 2 * len(found) < len(frame):  # or the texts of all would stay in memory as long as any of them
            found = found.with_columns(pl.col(pl.String) + "")
        if len(found):
            yield found


def _gathered(frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same rows, about as many at a time as are held."""
    held: list[pl.DataFrame] = []
    size = 0
    for frame in frames:
        held.append(frame)
        size += frame.estimated_size()
        if sum(map(len, held)) >= PART_ROWS and size >= PART_BYTES // 2:
            yield pl.concat(held)
            held, size = [], 0
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
