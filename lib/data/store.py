"""The trace store: a folder of Parquet segments, each named by the SHA-256 of its bytes, none ever changed.

    store = Store(Path("runs/store"))
    store.add(traces)          # Added(added=100, duplicates=0), and one segment more
    store.add(traces)          # Added(added=0, duplicates=100), and nothing written
    store.content_hash()       # the same in every store that holds these traces, however they came in

A segment appears whole or not at all, and is hashed again before anything in it is believed.
"""

import errno
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import polars as pl
from filelock import FileLock, Timeout

from lib.errors import RequestError, RetraceError
from lib.files import atomic_open, sha256_bytes
from lib.trace import Trace, content_sha256, to_json, utc_now

LOCK_SECONDS = 60
COLUMNS = ["id", "content_sha256", "created_at", "record"]

Scalar = str | int | float | bool | None


class Added(NamedTuple):
    """How many traces were new to the store, and how many it (or the same call) held already."""

    added: int
    duplicates: int


class _Row(NamedTuple):
    id: str
    content_sha256: str
    created_at: str
    record: str


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
        rows = [_row(trace, now) for trace in traces]
        if not rows:
            return Added(0, 0)
        with self._locked():
            new = _new_rows(rows, self._known())
            if new:
                _write_segment(self.folder, new)
        return Added(len(new), len(rows) - len(new))

    def scan(self) -> Iterator[Trace]:
        """Every trace, segments in the order of their names. Raises RetraceError for a damaged segment."""
        for path in self._segments():
            for record in _read_segment(path)["record"]:
                yield _DECODER.decode(record)

    def count(self) -> int:
        """The number of traces."""
        return sum(_read_segment(path).height for path in self._segments())

    def content_hash(self) -> str:
        """SHA-256 over the sorted content hashes of all traces."""
        hashes = [sha for path in self._segments() for sha in _read_segment(path)["content_sha256"]]
        return sha256_bytes("\n".join(sorted(hashes)).encode())

    def meta_values(self, limit: int = 20) -> dict[str, dict[Scalar, int]]:
        """For each key of `meta` its most frequent scalar values and how often each comes."""
        counts: defaultdict[str, Counter[Scalar]] = defaultdict(Counter)
        for trace in self.scan():
            for key, value in trace.meta.items():
                if not isinstance(value, dict | list):
                    counts[key][value] += 1
        return {key: dict(counts[key].most_common(limit)) for key in sorted(counts)}

    def _segments(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if path.suffix == ".parquet")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RequestError(f"store {self.folder}: cannot be read ({error.strerror})") from None

    def _known(self) -> dict[str, str]:
        """Content hash by id."""
        known: dict[str, str] = {}
        for path in self._segments():
            known.update(_read_segment(path).select("id", "content_sha256").iter_rows())
        return known

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


_DECODER = msgspec.json.Decoder(Trace)
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP}


def _row(trace: Trace, now: str) -> _Row:
    if not trace.created_at:
        trace = msgspec.structs.replace(trace, created_at=now)
    return _Row(trace.id, content_sha256(trace), trace.created_at, to_json(trace).decode())


def _new_rows(rows: list[_Row], known: dict[str, str]) -> list[_Row]:
    """The first of each content that is not known. `known` holds content hashes by id."""
    known, contents, new = dict(known), set(known.values()), []
    for row in rows:
        if known.get(row.id, row.content_sha256) != row.content_sha256:
            raise RequestError(
                f"trace id {row.id!r} is taken by other content; give this trace another id, or none "
                "(nothing was added)"
            )
        if row.content_sha256 not in contents:
            contents.add(row.content_sha256)
            known[row.id] = row.content_sha256
            new.append(row)
    return new


def _write_segment(folder: Path, rows: list[_Row]) -> None:
    buffer = io.BytesIO()
    pl.DataFrame(rows, schema=dict.fromkeys(COLUMNS, pl.String), orient="row").write_parquet(buffer)
    content = buffer.getvalue()
    with atomic_open(folder / f"{sha256_bytes(content)}.parquet") as file:
        file.write(content)


def _read_segment(path: Path) -> pl.DataFrame:
    """The rows of a segment whose bytes are those it was written with."""
    damaged = f"store segment {path} is damaged: restore it from a copy, or remove it and import its traces again"
    try:
        content = path.read_bytes()
        if sha256_bytes(content) != path.stem:
            raise RetraceError(damaged)
        return pl.read_parquet(io.BytesIO(content), columns=COLUMNS)
    except OSError as error:
        raise RetraceError(f"store segment {path} cannot be read ({error.strerror})") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        raise RetraceError(damaged) from None
