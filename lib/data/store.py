"""The trace store: a folder of Parquet segments, each named by the SHA-256 of its bytes, none ever changed.

    store = Store(Path("runs/store"))
    store.add(traces)          # Added(added=100, duplicates=0), and one segment more
    store.add(traces)          # Added(added=0, duplicates=100), and nothing written
    store.content_hash()       # the same in every store that holds these traces, however they came in

A segment appears whole or not at all, and is hashed again before anything in it is believed.

Traces stream, in and out: of each that has passed, some fifty bytes stay in memory. What is added is staged as
it comes, in a temporary file that has no name and so vanishes with the process, however that ends. Only then is
the lock taken, to see what of it is new and to copy that into a segment: a writer keeps others waiting for
seconds, not for as long as its traces take to come.
"""

import errno
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest, sha256
from operator import attrgetter
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import numpy as np
import polars as pl
from filelock import FileLock, Timeout

from lib.data.frames import read_frames, write_frames
from lib.errors import RequestError, RetraceError
from lib.files import atomic_open
from lib.trace import TRACE_VERSION, Entry, Facts, Trace, to_entry, utc_now

LOCK_SECONDS = 60
COLUMNS = [*Entry.__struct_fields__, "file", "line"]
BATCH_TRACES, BATCH_CHARACTERS = 4_000, 1 << 23  # what is staged at a time
PART_TRACES = 250_000  # whose keys are joined at a time

Scalar = str | int | float | bool | None


class Added(NamedTuple):
    """How many traces were new to the store, and how many it (or the same call) held already."""

    added: int
    duplicates: int


class Batch(NamedTuple):
    """Entries that come together, the file that they stand in and the line of each; generated ones stand in none."""

    entries: list[Entry]
    file: str | None = None
    lines: Sequence[int | None] = ()


@dataclass(frozen=True)
class Store:
    """The traces in `folder`; a folder that is not there is an empty store, and reading creates nothing."""

    folder: Path

    def add(self, traces: Iterable[Trace]) -> Added:
        """Add what is new, as one segment in the order given, all or nothing.

        A trace without `created_at` gets the present moment. Raises RequestError where an id is taken by
        other content, or the folder cannot be written.
        """
        now = utc_now()
        return self.add_entries(Batch([to_entry(trace, now)], None, [None]) for trace in traces)

    def add_entries(self, batches: Iterable[Batch]) -> Added:
        """`add`, for entries that come some at a time."""
        with tempfile.TemporaryFile() as staged:
            keys = _stage(batches, staged)
            if keys.is_empty():
                return Added(0, 0)
            with self._locked():
                fresh = self._fresh(keys, staged)
                if fresh.any():
                    self._publish(staged, fresh)
        return Added(fresh.sum(), len(fresh) - fresh.sum())

    def scan(self) -> Iterator[Trace]:
        """Every trace, segments in the order of their names. Raises RetraceError for a damaged segment."""
        for path in self.segments():
            for frame in read_segment(path, "record"):
                yield from traces_in(frame, f"store segment {path}")

    def count(self) -> int:
        """The number of traces."""
        return sum(frame.item() for path in self.segments() for frame in read_segment(path, pl.len()))

    def content_hash(self) -> str:
        """SHA-256 over the sorted content hashes of all traces."""
        return hash_of_lines(sorted_parts(self.contents()))

    def contents(self) -> np.ndarray:
        """uint8[traces, 32]: the content hash of each trace, in the order of a scan."""
        contents = bytearray()
        for path in self.segments():
            for frame in read_segment(path, "content_sha256"):
                contents += b"".join(frame["content_sha256"])
        return np.frombuffer(contents, np.uint8).reshape(-1, 32)

    def meta_values(self, limit: int = 20) -> dict[str, dict[Scalar, int]]:
        """For each key of `meta` its most frequent scalar values and how often each comes."""
        counts: defaultdict[str, Counter[Scalar]] = defaultdict(Counter)
        for trace in self.scan():
            for key, value in trace.meta.items():
                if not isinstance(value, dict | list):
                    counts[key][value] += 1
        return {key: dict(counts[key].most_common(limit)) for key in sorted(counts)}

    def segments(self) -> list[Path]:
        """The files of the store, in the order in which its traces are read. Raises RequestError."""
        try:
            return sorted(path for path in self.folder.iterdir() if path.suffix == ".parquet")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RequestError(f"store {self.folder}: cannot be read ({error.strerror})") from None

    def _known(self) -> pl.DataFrame:
        """The keys of all traces of the store."""
        return pl.concat([_NO_KEYS, *(keys for path in self.segments() for keys in read_segment(path, *_KEYS))])

    def _fresh(self, keys: pl.DataFrame, staged: IO[bytes]) -> pl.Series:
        """True for the first of each content that is not known; raises RequestError where an id is taken."""
        known = self._known()
        fresh = _first_of_each(keys["content"])
        if len(known):
            fresh &= ~keys["content"].is_in(known["content"].implode())
        if len(suspects := _suspects(keys, known, fresh)):
            self._refuse_taken(suspects, staged, fresh)
        return fresh

    def _refuse_taken(self, suspects: pl.Series, staged: IO[bytes], fresh: pl.Series) -> None:
        """Raise RequestError at the first trace whose id is that of other content, here or earlier in the file.

        `suspects` are the hashes of the ids to look at; it is the ids themselves that are compared.
        """
        suspected, columns = _ID.is_in(suspects.implode()), ("id", "content_sha256")
        owners: dict[str, str] = {}
        for path in self.segments():
            for frame in read_segment(path, *columns):
                owners.update(frame.filter(suspected).iter_rows())
        for frame in _with_flags(read_frames(staged, *columns, "file", "line"), fresh):
            for id, content, file, line, is_fresh in frame.filter(suspected).iter_rows():
                if owners.get(id, content) != content:
                    raise RequestError(
                        f"{f'{file}:{line}: ' * (file is not None)}trace id {id!r} is taken by other content; "
                        "give this trace another id, or none (nothing was added)"
                    )
                if is_fresh:
                    owners[id] = content

    def _publish(self, staged: IO[bytes], fresh: pl.Series) -> None:
        """Make a segment of what is fresh."""
        if fresh.all():
            return self._copy(staged)
        with tempfile.TemporaryFile() as chosen:
            frames = _with_flags(read_frames(staged, *COLUMNS), fresh)
            write_frames((frame.filter("fresh").drop("fresh") for frame in frames), chosen, _temporary())
            self._copy(chosen)

    def _copy(self, file: IO[bytes]) -> None:
        file.seek(0)
        path = self.folder / f"{file_digest(file, 'sha256').hexdigest()}.parquet"
        file.seek(0)
        with atomic_open(path) as segment:
            shutil.copyfileobj(file, segment, 1 << 20)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The only writer, for as long as the block runs; whatever a killed writer left is swept away."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", timeout=LOCK_SECONDS):
                for stray in self.folder.glob(".*.tmp"):
                    stray.unlink()
                yield
        except Timeout:
            raise RequestError(
                f"store {self.folder}: another process is writing to it; try again when that has ended"
            ) from None
        except OSError as error:
            kind = RequestError if error.errno in _NOT_ALLOWED else RetraceError
            raise kind(f"store {self.folder}: cannot be written ({error.strerror}); nothing was added") from None


_DECODER, _FACTS_DECODER = msgspec.json.Decoder(Trace), msgspec.json.Decoder(Facts)
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP}
_SCHEMA = dict.fromkeys(COLUMNS, pl.String) | {"content_sha256": pl.Binary, "line": pl.UInt64}

# What stays in memory of a trace: a short hash of its id, and all 32 bytes of the hash of its content.
_ID = pl.col("id").hash()
_KEYS = (_ID, pl.col("content_sha256").alias("content"))
_NO_KEYS = pl.DataFrame(schema={"id": pl.UInt64, "content": pl.Binary})


def traces_in(frame: pl.DataFrame, place: str) -> Iterator[Trace]:
    """The traces whose records a frame holds, unread but for their version. Raises RequestError for another one."""
    for trace in map(_DECODER.decode, frame["record"]):
        _check_version(trace.trace_version, place)
        yield trace


def read_facts(facts: str, place: str) -> Facts:
    """What the column `facts` tells of a trace. Raises RequestError for a trace of another version."""
    read = _FACTS_DECODER.decode(facts)
    _check_version(read.trace_version, place)
    return read


def _check_version(version: str, place: str) -> None:
    if version != TRACE_VERSION:
        raise RequestError(f"{place}: trace_version {version!r} is not known, only {TRACE_VERSION!r}")


def hash_of_lines(contents: Iterable[np.ndarray]) -> str:
    """SHA-256 over content hashes, uint8[traces, 32] at a time, as lines of hexadecimal digits."""
    hashed, between = sha256(), ""
    for part in contents:
        hashed.update((between + part.tobytes().hex("\n", 32)).encode())
        between = "\n"
    return hashed.hexdigest()


def sorted_parts(contents: np.ndarray) -> Iterator[np.ndarray]:
    """uint8[traces, 32] in the order of the bytes, those at a time that begin alike."""
    begins = contents[:, 0].copy()
    for begin in range(256):
        if len(some := contents[begins == begin]):
            keys = np.ascontiguousarray(some[:, :8]).view(">u8").ravel().astype(np.uint64)
            order = np.argsort(keys)  # ten times as fast as sorting the bytes
            alike = (keys[order[1:]] == keys[order[:-1]]).any()  # which no two hashes are by chance
            yield some[order] if not alike else np.sort(some.view("S32"), axis=0).view(np.uint8)


def _first_of_each(contents: pl.Series) -> pl.Series:
    if contents.hash().n_unique() == len(contents):  # the usual case, found out ten times faster
        return pl.repeat(True, len(contents), eager=True)
    return contents.is_first_distinct()


def _suspects(keys: pl.DataFrame, known: pl.DataFrame, fresh: pl.Series) -> pl.Series:
    """Hashes of the ids that may stand for two contents: none is missing, and usually there is none.

    An id belongs to the content it is known with, or first comes with. It is suspected where two share it, or
    where it comes again with a content that is in the store, but not with it.
    """
    suspects = [_NO_KEYS["id"]]
    parts = 1 + (len(known) + len(keys)) // PART_TRACES
    for part in range(parts):
        here = pl.col("id") % parts == part
        owners = pl.concat([known.filter(here), keys.filter(fresh, here)])
        suspects.append(owners["id"].filter(owners["id"].is_duplicated()))
        strange = keys.filter(~fresh, here).join(owners, on=["id", "content"], how="anti")
        suspects.append(strange.join(owners, on="id", how="semi")["id"])
    return pl.concat(suspects)


def _stage(batches: Iterable[Batch], file: IO[bytes]) -> pl.DataFrame:
    """Write the entries to the file as they come; returns their keys."""
    keys = [_NO_KEYS]

    def frames() -> Iterator[pl.DataFrame]:
        for together in _together(batches):
            frame = pl.concat(list(map(_frame, together)))
            keys.append(frame.select(_KEYS))
            yield frame

    write_frames(frames(), file, _temporary())
    return pl.concat(keys)


def _temporary() -> str:
    return f"temporary folder {tempfile.gettempdir()}"


def _frame(batch: Batch) -> pl.DataFrame:
    columns = {name: list(map(attrgetter(name), batch.entries)) for name in Entry.__struct_fields__}
    return pl.DataFrame(columns | {"file": [batch.file] * len(batch.entries), "line": batch.lines}, schema=_SCHEMA)


def _together(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """The same entries, those of one file in one batch, about as many at a time as make a frame."""
    held: list[Batch] = []
    count, size = 0, 0
    for batch in batches:
        if held and held[-1].file == batch.file:
            held[-1].entries.extend(batch.entries)
            held[-1].lines.extend(batch.lines)
        elif batch.entries:
            held.append(Batch(list(batch.entries), batch.file, list(batch.lines)))
        count += len(batch.entries)
        size += sum(len(entry.record) + len(entry.facts) for entry in batch.entries)
        if count >= BATCH_TRACES or size >= BATCH_CHARACTERS:
            yield held
            held, count, size = [], 0, 0
    if held:
        yield held


def read_segment(path: Path, *columns: str | pl.Expr) -> Iterator[pl.DataFrame]:
    """Columns of a segment whose bytes are those it was written with, in batches. Raises RetraceError."""
    damaged = f"store segment {path} is damaged: restore it from a copy, or remove it and import its traces again"
    try:
        with open(path, "rb") as file:
            if file_digest(file, "sha256").hexdigest() != path.stem:
                raise RetraceError(damaged)
            file.seek(0)
            if dict(pl.read_parquet_schema(file)) != _SCHEMA:
                raise RequestError(f"store segment {path}: written by another version; import its traces again")
            yield from read_frames(file, *columns)
    except OSError as error:
        raise RetraceError(f"store segment {path} cannot be read ({error.strerror})") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        raise RetraceError(damaged) from None


def _with_flags(frames: Iterable[pl.DataFrame], fresh: pl.Series) -> Iterator[pl.DataFrame]:
    """The frames with their part of `fresh`, which has a flag for each of their rows, as one more column."""
    start = 0
    for frame in frames:
        yield frame.with_columns(fresh.slice(start, len(frame)).alias("fresh"))
        start += len(frame)
