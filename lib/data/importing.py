"""Files of traces, read strictly: every line is accepted, rejected with its reason, or blank.

    for record in read_traces(Path("mine.jsonl")):
        record           # Accepted(line=1, trace=Trace(…))
                         # Rejected(line=2, field="steps[0].i", expected="int", got="'x'", raw=b'{"trace…')
                         # Blank(line=3)

This file keeps the accounts. Where files are found is in sources.py, how they are taken apart in json_files.py and
tables.py, which shapes a record may have in records.py, and what a mapping makes of others in mapping.py.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import msgspec

from lib.data.json_files import Pieces, read_pieces
from lib.data.mapping import UNMAPPED, Mapping, parse_mapped
from lib.data.records import UNKNOWN, parse_record
from lib.data.sources import Source, find_sources, open_source
from lib.data.store import Batch, Store
from lib.data.tables import SEPARATORS, read_csv, read_parquet
from lib.errors import RequestError
from lib.files import atomic_open
from lib.trace import MAX_BYTES, Entry, InvalidTrace, Trace, read_entries, to_entry, utc_now

SHOWN_RECORDS = 5
RAW_BYTES = 500
R = TypeVar("R")


class Accepted(NamedTuple):
    """A good record, and the line where it begins."""

    line: int
    trace: Trace


class Rejected(NamedTuple):
    """A bad record: the field at fault, what it should hold, what it holds, and its text cut to 500 bytes."""

    line: int
    field: str
    expected: str
    got: str
    raw: bytes


class Blank(NamedTuple):
    """A line with nothing on it."""

    line: int


Record = Accepted | Rejected | Blank


@dataclass(frozen=True)
class ImportReport:
    """What became of every line (accepted + rejected + blank = lines), and of the accepted in the store."""

    lines: int
    accepted: int
    rejected: int
    blank: int
    added: int
    duplicates: int
    rejects_file: Path | None


def read_traces(path: str | Path, mapping: Mapping | None = None) -> Iterator[Record]:
    """Every record of the file, in order. Raises RequestError for a file that is of none of the known kinds."""
    for source in find_sources([path]):
        for first, records in _records(source, mapping, _reader(mapping), lambda raws: None):
            for line, record in enumerate(records, first):
                yield Accepted(line, record) if isinstance(record, Trace) else record


def import_files(
    store: Store,
    names: Iterable[str | Path],
    on_bad_record: str = "refuse",
    rejects_folder: Path | None = None,
    mapping: Mapping | None = None,
) -> ImportReport:
    """Add the traces of all files to the store: all or nothing, or with `quarantine` all that are good.

    A name is that of a file, a pattern such as `data/*.jsonl`, or a URL of an S3 store; `mapping` holds for all.
    Quarantined records go, with their reasons, to a JSONL file in `rejects_folder` (`rejects` in the store's
    folder where none is given), named by its content. Raises RequestError naming file, line and field.
    """
    if on_bad_record not in ("refuse", "quarantine"):
        raise RequestError(f"on_bad_record: expected refuse or quarantine, got {on_bad_record!r}")
    sources, folder = find_sources(names), rejects_folder or store.folder / "rejects"
    with tempfile.TemporaryFile() as rejects:
        counts = _Counts(rejects=rejects)
        added = store.add_entries(_accepted(counts, sources, mapping, on_bad_record, folder))
    return ImportReport(
        lines=counts.accepted + counts.rejected + counts.blank,
        accepted=counts.accepted,
        rejected=counts.rejected,
        blank=counts.blank,
        added=added.added,
        duplicates=added.duplicates,
        rejects_file=counts.rejects_file,
    )


@dataclass
class _Counts:
    """What was seen so far; each rejected record is a line of `rejects`, the first few are `complaints`."""

    rejects: IO[bytes]
    accepted: int = 0
    rejected: int = 0
    blank: int = 0
    complaints: list[str] = field(default_factory=list)
    rejects_file: Path | None = None


def _accepted(
    counts: _Counts, sources: list[Source], mapping: Mapping | None, on_bad: str, folder: Path
) -> Iterator[Batch]:
    """The good traces of all files; what must happen to the bad ones happens when the last one is read."""
    now, parse = utc_now(), _reader(mapping)

    def read_all(raws: list[bytes]) -> list[Entry] | None:
        return None if mapping else read_entries(raws, now)

    def read(raw: bytes) -> Entry:
        alone = read_all([raw])
        return alone[0] if alone else to_entry(parse(raw), now)

    for source in sources:
        for first, records in _records(source, mapping, read, read_all):
            lines: Sequence[int] = range(first, first + len(records))
            good = [record for record in records if isinstance(record, Entry)]
            counts.accepted += len(good)
            if len(good) < len(records):
                lines = [line for line, record in enumerate(records, first) if isinstance(record, Entry)]
                _count_others(counts, source.name, records)
            yield Batch(good, source.name, lines)
    if counts.rejected and on_bad == "refuse":
        raise RequestError(_complaint(counts))
    if counts.rejected:
        counts.rejects_file = _publish(counts.rejects, folder)


def _count_others(counts: _Counts, name: str, records: list[Entry | Rejected | Blank]) -> None:
    for record in records:
        if isinstance(record, Rejected):
            _count_rejected(counts, name, record)
        elif isinstance(record, Blank):
            counts.blank += 1


def _count_rejected(counts: _Counts, name: str, record: Rejected) -> None:
    counts.rejected += 1
    reason = {"field": record.field, "expected": record.expected, "got": record.got}
    entry = {
        "file": name,
        "line": record.line,
        **reason,
        "raw": record.raw.decode(errors="backslashreplace"),
    }
    counts.rejects.write(msgspec.json.encode(entry) + b"\n")
    fault = f"field {record.field}: expected {record.expected}, got {record.got}"
    same_in_all = record.expected in (UNKNOWN, UNMAPPED)
    if same_in_all and any(name in complaint and fault in complaint for complaint in counts.complaints):
        return  # the same in all records of the file
    if len(counts.complaints) < SHOWN_RECORDS:
        counts.complaints.append(f"{name}:{record.line}: {fault}")


def _complaint(counts: _Counts) -> str:
    rest = counts.rejected - len(counts.complaints)
    outcome = "nothing was imported: correct it, or import with --on-bad-record quarantine"
    if counts.rejected == 1:
        return f"{counts.complaints[0]}; {outcome}"
    summary = f"and {rest} more bad records" if rest else f"{counts.rejected} bad records"
    return "\n".join([*counts.complaints, f"{summary}; {outcome.replace('correct it', 'correct them')}"])


def _publish(rejects: IO[bytes], folder: Path) -> Path:
    rejects.seek(0)
    path = folder / f"rejects-{file_digest(rejects, 'sha256').hexdigest()[:16]}.jsonl"
    rejects.seek(0)
    try:
        with atomic_open(path) as file:
            shutil.copyfileobj(rejects, file)
    except OSError as error:
        raise RequestError(f"{path}: cannot write the rejected records ({error.strerror})") from None
    return path


# ---- files into records -----------------------------------------------------------------------------------

_BLANK = b" \t\r\n"


def _reader(mapping: Mapping | None) -> Callable[[bytes], Trace]:
    return parse_record if mapping is None else lambda raw: parse_mapped(raw, mapping)


def _records(
    source: Source,
    mapping: Mapping | None,
    read: Callable[[bytes], R],
    read_all: Callable[[list[bytes]], list[R] | None],
) -> Iterator[tuple[int, list[R | Rejected | Blank]]]:
    """What `read` makes of the records of the source, some neighbours at a time, with the line of the first.

    `read_all` makes the same of many of them at once, and quicker, or returns None.
    """
    empty = True
    for first, raws, fault, text in _pieces(source, mapping):
        records = None
        if fault is None and sum(map(len, raws)) <= MAX_BYTES:
            records = read_all(raws)
        if records is None:
            records = [_read(line, raw, fault, text, read) for line, raw in enumerate(raws, first)]
        empty = empty and all(isinstance(record, Blank) for record in records)
        yield first, records
    if empty:
        expected = "JSONL, a JSON array, or an object with `traces`" if source.kind == "json" else "rows"
        raise RequestError(f"{source.name}: holds no trace; expected {expected}")


def _pieces(source: Source, mapping: Mapping | None) -> Iterator[Pieces]:
    if source.kind == "parquet":
        yield from read_parquet(source, mapping)
        return
    with open_source(source) as file:
        if source.kind in SEPARATORS:
            yield from read_csv(file, source, mapping)
        else:
            yield from read_pieces(file, source.name)


def _read(
    line: int, raw: bytes, fault: InvalidTrace | None, text: bytes, read: Callable[[bytes], R]
) -> R | Rejected | Blank:
    record = raw.strip(_BLANK)
    try:
        if fault:
            raise fault
        if len(raw) > MAX_BYTES:
            raise InvalidTrace("record", "at most 1 MiB", "more")
        return read(record) if record else Blank(line)
    except InvalidTrace as error:
        return Rejected(line, error.field, error.expected, error.got, (text or record)[:RAW_BYTES])
