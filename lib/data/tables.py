"""Tables into records: CSV, tab-separated text, and Parquet.

    for pieces in read_csv(file, source, mapping):
        pieces          # Pieces(first=2, raws=[b'{"question":"2+2?","answer":"…"}'], fault=None, text=b'2+2?,"…')

A row becomes the JSON object of its columns, and from there on is read as any other record. The line of a row of CSV
is that where it begins, as a quoted field may run over several; that of a row of Parquet is its number, from 1.
"""

import csv
import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import IO, Any

import polars as pl

from lib.data.json_files import BOM, Pieces
from lib.data.mapping import Mapping, check_columns
from lib.data.sources import Source, open_source, reading
from lib.errors import RequestError
from lib.trace import MAX_BYTES, InvalidTrace, shown

ROWS = 1_000  # of Parquet, held as Python values at a time
TEXT_BYTES = 1_000  # of a row, kept to show it
SEPARATORS = {"csv": ",", "tsv": "\t"}
_MAY_LACK = ("id", "created_at")


def read_csv(file: IO[bytes], source: Source, mapping: Mapping | None) -> Iterator[Pieces]:
    """The rows of a file of CSV (RFC 4180, UTF-8, a header first), every value text.

    An empty `id` or `created_at` is none. Raises RequestError for columns that are not as they should be.
    """
    csv.field_size_limit(MAX_BYTES)  # of the whole process, and too small by default for a long field
    lines = _Lines(file)
    rows = csv.reader(lines, delimiter=SEPARATORS[source.kind], strict=True)
    header = _header(rows, lines, source.name)
    check_columns(header, mapping, source.name)
    wanted, may_lack = _wanted(header, mapping), mapping.own().values() if mapping else _MAY_LACK
    while (row := _next_row(rows, lines)) is not None:
        whole = len(row) == len(header)
        if not (lines.fault or whole) and lines.text.strip():
            lines.fault = InvalidTrace("record", f"{len(header)} fields, as the header has", f"{len(row)}")
        if lines.fault or not whole:
            yield Pieces(lines.first, [lines.text.strip()], lines.fault, lines.text)
            continue
        values = dict(zip(header, row, strict=True))
        kept = {name: values[name] for name in wanted if values[name] or name not in may_lack}
        yield Pieces(lines.first, [_json(kept)], None, lines.text)


def read_parquet(source: Source, mapping: Mapping | None) -> Iterator[Pieces]:
    """The rows of a Parquet file or object, in batches; a null is a field that is not there.

    Raises RequestError for columns that are not as they should be, and for a damaged file.
    """
    first = 1
    with nullcontext(source.name) if source.is_object else open_source(source) as file, reading(source):
        frame = pl.scan_parquet(file, glob=False, hive_partitioning=False)
        schema = frame.collect_schema()
        check_columns(schema.names(), mapping, source.name)
        wanted = _wanted(schema.names(), mapping)
        for name in wanted:
            _check_type(name, schema[name], source.name)
        size = pl.sum_horizontal(_size(pl.col(name), schema[name]) for name in wanted)
        for batch in frame.select(wanted).collect_batches(maintain_order=True, chunk_size=ROWS):
            for part in batch.iter_slices(ROWS):
                for number, row in enumerate(_bounded_rows(part, part.select(size).to_series()), first):
                    yield _parquet_row(number, row)
                first += len(part)


class _Lines:
    """The lines of a text file, as `csv.reader` takes them; what is wrong with those of a row is noted, not raised.

    A row is bounded: of a line, or of lines together, that are over the cap nothing is kept.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.number = 0
        file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
        self.begin()

    def begin(self) -> None:
        """A row begins with the next line."""
        self.first, self.size, self.text = self.number + 1, 0, b""
        self.fault: InvalidTrace | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_BYTES + 2)
        if not line:
            raise StopIteration
        self.number += 1
        self._skip_rest(line)
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        self.size += len(line) + 1
        if self.size > MAX_BYTES + 1:
            self.fault = self.fault or InvalidTrace("record", "at most 1 MiB", "more")
            raise csv.Error("over the cap")  # and the reader begins anew with the next line
        if len(self.text) < TEXT_BYTES:
            self.text += b"\n" + line if self.number > self.first else line
        return self._decoded(line) + "\n"

    def _skip_rest(self, line: bytes) -> None:
        while len(line) == MAX_BYTES + 2 and not line.endswith(b"\n"):
            line = self.file.readline(MAX_BYTES + 2)
            self.size += len(line)

    def _decoded(self, line: bytes) -> str:
        """The line, in which a replacement stands for what is no text, so that the row still ends where it should."""
        if b"\0" in line:
            self.fault = self.fault or InvalidTrace("record", "text without NUL", f"NUL at byte {line.index(0)}")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            got = f"byte 0x{line[error.start]:02x} at offset {error.start}"
            self.fault = self.fault or InvalidTrace("record", "valid UTF-8", got)
            return line.decode(errors="replace")


def _header(rows: Iterator[list[str]], lines: _Lines, name: str) -> list[str]:
    try:
        header = next(rows)
        while not header:
            header = next(rows)
    except StopIteration:
        raise RequestError(f"{name}: holds no trace; expected a header line with the names of the columns") from None
    except csv.Error as error:
        raise RequestError(f"{name}: is no CSV text ({lines.fault or _csv_fault(str(error))})") from None
    if lines.fault:
        raise RequestError(f"{name}: is no CSV text ({lines.fault})")
    return header


def _next_row(rows: Iterator[list[str]], lines: _Lines) -> list[str] | None:
    """The fields of the next row, empty where it has none or `lines.fault` says why; None at the end."""
    lines.begin()
    try:
        return next(rows, None)
    except csv.Error as error:
        lines.fault = lines.fault or InvalidTrace("record", "a row of CSV", _csv_fault(str(error)))
        return []


def _csv_fault(sentence: str) -> str:
    """What `csv` says, in words for who wrote the file."""
    if sentence == "unexpected end of data":
        return "a quote that is never closed"
    return sentence


def _wanted(columns: list[str], mapping: Mapping | None) -> list[str]:
    return [name for name in columns if not mapping or name not in mapping.ignore]


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")


def _check_type(name: str, kind: pl.DataType, where: str) -> None:
    if kind.is_nested():
        for inner in [field.dtype for field in kind.fields] if isinstance(kind, pl.Struct) else [kind.inner]:
            _check_type(name, inner, where)
    elif not (kind.is_integer() or kind.is_float() or kind in _TYPES):
        raise RequestError(
            f"{where}: column {shown(name)}: expected text, numbers, booleans, or lists or structs of these, got "
            f"{kind}; write it as text, or leave it out by `ignore` in a mapping"
        )


_TYPES = (pl.String, pl.Boolean, pl.Null, pl.Categorical, pl.Enum)


def _size(value: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """How many bytes of text the value holds, at least, found before any of it becomes a Python value."""
    if isinstance(kind, pl.Struct) and kind.fields:
        return pl.sum_horizontal(_size(value.struct.field(field.name), field.dtype) for field in kind.fields)
    if isinstance(kind, pl.List):
        return value.list.eval(_size(pl.element(), kind.inner)).list.sum()
    return (value.str.len_bytes() if kind == pl.String else value.is_null()).cast(pl.Int64)


def _bounded_rows(part: pl.DataFrame, sizes: pl.Series) -> Iterator[dict[str, Any] | None]:
    """The rows as Python values; None for one that is over the cap."""
    if sizes.max() <= MAX_BYTES:
        return part.iter_rows(named=True)
    return (part.row(i, named=True) if size <= MAX_BYTES else None for i, size in enumerate(sizes))


def _parquet_row(number: int, row: dict[str, Any] | None) -> Pieces:
    if row is None:
        return Pieces(number, [b""], InvalidTrace("record", "at most 1 MiB", "more"))
    return Pieces(number, [_json(_without_nulls(row))])


def _without_nulls(value: Any) -> Any:
    """The value without the fields of objects that are null: a column has no other way to lack one."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
