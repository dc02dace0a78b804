"""The trace store: a folder of Parquet segments, each named by the SHA-256 of its bytes, none ever changed.

    store = Store(Path("runs/store"))
    store.add(traces)          # Added(added=100, duplicates=0), and one segment more
    store.add(traces)          # Added(added=0, duplicates=100), and nothing written
    store.content_hash()       # the same in every store that holds these traces, however they came in

A segment appears whole or not at all, and is hashed again before anything in it is believed.

Traces stream, in and out: of each that has passed, 24 bytes stay in memory. What is added is staged as
it comes, in a temporary file that has no name and so vanishes with the process, however that ends. Only then is
the lock taken, to see what of it is new and to copy that into a segment: a writer keeps others waiting for
seconds, not for as long as its traces take to come.
"""

import errno
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import file_digest, sha256
from operator import attrgetter
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import msgspec
import numpy as np
import polars as pl
from filelock import FileLock, Timeout

from lib.data.frames import GROUP_BYTES, GROUP_ROWS, read_frames, write_frames
from lib.errors import RequestError, RetraceError
from lib.files import atomic_open
from lib.trace import TRACE_VERSION, Entry, Facts, Trace, to_entry, utc_now

LOCK_SECONDS = 60
COLUMNS = [*Entry.__struct_fields__, "file", "line"]
BATCH_TRACES, BATCH_CHARACTERS = GROUP_ROWS, GROUP_BYTES  # what is staged at a time: a row group
KNOWN, SHORT = 100_000, 1_000  # texts of which it is remembered what was found, and characters of each at most
VALUES = 2_000  # of a key of meta, that are counted
T = TypeVar("T")


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
            if not len(keys):
                return Added(0, 0)
            with self._locked():
                fresh = self._fresh(keys, staged)
                if fresh.any():
                    self._publish(staged, fresh)
        added = int(fresh.sum())
        return Added(added, len(fresh) - added)

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
        return hash_of_lines(sorted_parts(contents_of(self.segments())))

    def meta_values(self, limit: int | None = None) -> dict[str, dict[str, int]]:
        """For each key of `meta` its values, or the `limit` most frequent, as JSON, and how often each comes.

        A list counts as `[]` and an object as `{}`. Of a key only the VALUES that come first are counted.
        """
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for trace in self.scan():
            for key, value in trace.meta.items():
                text = msgspec.json.encode(type(value)() if isinstance(value, dict | list) else value).decode()
                if text in counts[key] or len(counts[key]) < VALUES:
                    counts[key][text] += 1
        return {key: dict(counts[key].most_common(limit)) for key in sorted(counts)}

    def segments(self) -> list[Path]:
        """The files of the store, in the order in which its traces are read. Raises RequestError."""
        try:
            return sorted(path for path in self.folder.iterdir() if path.suffix == ".parquet")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RequestError(f"store {self.folder}: cannot be read ({error.strerror})") from None

    def _known(self) -> np.ndarray:
        """The keys of all traces of the store."""
        known = bytearray()
        for path in self.segments():
            for keys in read_segment(path, *_KEYS):
                known.extend(keys.to_numpy().tobytes())
        return _keys(known)

    def _fresh(self, keys: np.ndarray, staged: IO[bytes]) -> np.ndarray:
        """True for the first of each content that is not known; raises RequestError where an id is taken."""
        known = self._known()
        there = len(known)
        every = np.concatenate([known, keys]) if there else keys
        del known
        fresh = first_of_each(every[:, 1], every[:, 2])[there:]
        if len(suspects := _suspects(every)):
            self._refuse_taken(suspects, staged)
        return fresh

    def _refuse_taken(self, suspects: np.ndarray, staged: IO[bytes]) -> None:
        """Raise RequestError at the first trace whose id is that of other content, here or earlier in the file.

        Earlier, a trace owns its id even where its content is there already under another one: else the same file
        would be taken once and refused later. `suspects` are the hashes of the ids to look at; it is the ids
        themselves that are compared.
        """
        suspected, columns = _ID.is_in(pl.Series(suspects).implode()), ("id", "content_sha256")
        owners: dict[str, str] = {}
        for path in self.segments():
            for frame in read_segment(path, *columns):
                owners.update(frame.filter(suspected).iter_rows())
        for frame in read_frames(staged, *columns, "file", "line"):
            for id, content, file, line in frame.filter(suspected).iter_rows():
                if owners.setdefault(id, content) != content:
                    raise RequestError(
                        f"{f'{file}:{line}: ' * (file is not None)}trace id {id!r} is taken by other content; "
                        "give this trace another id, or none, or import into another --home (nothing was added)"
                    )

    def _publish(self, staged: IO[bytes], fresh: np.ndarray) -> None:
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

# What stays in memory of a trace: 8 bytes that stand for its id, and 16 of the 32 of the hash of its content.
_ID = pl.col("id").hash()
_KEYS = (
    _ID,
    *(
        pl.col("content_sha256").bin.slice(start, 8).bin.reinterpret(dtype=pl.UInt64).alias(f"content_{start}")
        for start in (0, 8)
    ),
)


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


def remembering(look_up: Callable[..., T]) -> Callable[..., T]:
    """The same function, of a text and what belongs to it, that remembers what it found of many short texts.

    Generated traces ask and say the same again and again; long texts seldom recur, and so many would fill the memory.
    """
    known = lru_cache(KNOWN)(look_up)
    return lambda text, *more: (known if len(text) <= SHORT else look_up)(text, *more)


def _check_version(version: str, place: str) -> None:
    if version != TRACE_VERSION:
        raise RequestError(f"{place}: trace_version {version!r} is not known, only {TRACE_VERSION!r}")


def contents_of(segments: list[Path]) -> np.ndarray:
    """uint8[traces, 32]: the content hash of each trace, in the order of a scan."""
    contents = bytearray()
    for path in segments:
        for frame in read_segment(path, "content_sha256"):
            contents += b"".join(frame["content_sha256"])
    return np.frombuffer(contents, np.uint8).reshape(-1, 32)


def hash_of_lines(contents: Iterable[np.ndarray]) -> str:
    """SHA-256 over content hashes, uint8[traces, 32] at a time, as lines of hexadecimal digits."""
    hashed, between = sha256(), ""
    for part in contents:
        hashed.update((between + part.tobytes().hex("\n", 32)).encode())
        between = "\n"
    return hashed.hexdigest()


def sorted_parts(contents: np.ndarray) -> Iterator[np.ndarray]:
    """uint8[traces, 32] in the order of the bytes, those at a time that begin alike."""
    keys = np.ascontiguousarray(contents[:, :8]).view(">u8").ravel().astype(np.uint64)
    for rows in _sorted_rows(keys):  # ten times as fast as sorting the bytes
        some, beginning = contents[rows], keys[rows]
        alike = (beginning[1:] == beginning[:-1]).any()  # which no two hashes are by chance
        yield some if not alike else np.sort(some.view("S32"), axis=0).view(np.uint8)


def first_of_each(key: np.ndarray, key_too: np.ndarray) -> np.ndarray:
    """True for the first of those that are equal in both: bool[traces] of uint64[traces], evenly spread.

    first_of_each(np.uint64([7, 5, 7, 7]), np.uint64([1, 1, 2, 1]))      # [True, True, True, False]
    """
    first = np.ones(len(key), bool)
    for rows in _sorted_rows(key):
        if (key[rows[1:]] == key[rows[:-1]]).any():
            rows = rows[np.lexsort((key_too[rows], key[rows]))]  # those that are equal stay in their order
            again, before = rows[1:], rows[:-1]
            first[again[(key[again] == key[before]) & (key_too[again] == key_too[before])]] = False
    return first


def _sorted_rows(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers of the rows, in the order of their keys (and of equal ones, their own), those at a time that begin alike.

    Keys that are evenly spread make parts that fit into a core's cache, and little more is held than the keys.
    """
    begins = (keys >> np.uint64(56)).astype(np.uint8)
    for begin in range(256):
        if len(rows := np.flatnonzero(begins == begin)):
            yield rows[np.argsort(keys[rows], kind="stable")]


def _suspects(keys: np.ndarray) -> np.ndarray:
    """Of the ids, as the keys have them, those that come with more than one content: usually there is none."""
    found = [keys[:0, 0]]
    for rows in _sorted_rows(keys[:, 0]):
        before, after = keys[rows[:-1]], keys[rows[1:]]
        differ = (before[:, 0] == after[:, 0]) & (before != after).any(axis=1)
        found.append(after[differ, 0])
    return np.unique(np.concatenate(found))


def _keys(values: bytearray) -> np.ndarray:
    """uint64[traces, 3]: of the id of each trace, and two of its content."""
    return np.frombuffer(values, np.uint64).reshape(-1, len(_KEYS))


def _stage(batches: Iterable[Batch], file: IO[bytes]) -> np.ndarray:
    """Write the entries to the file as they come; returns their keys."""
    keys = bytearray()

    def frames() -> Iterator[pl.DataFrame]:
        for together in _together(batches):
            frame = pl.concat(list(map(_frame, together)))
            keys.extend(frame.select(_KEYS).to_numpy().tobytes())
            yield frame

    write_frames(frames(), file, _temporary())
    return _keys(keys)


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


def _with_flags(frames: Iterable[pl.DataFrame], fresh: np.ndarray) -> Iterator[pl.DataFrame]:
    """The frames with their part of `fresh`, which has a flag for each of their rows, as one more column."""
    start = 0
    for frame in frames:
        yield frame.with_columns(pl.Series("fresh", fresh[start : start + len(frame)]))
        start += len(frame)
