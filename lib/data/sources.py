"""Where traces are read from: files, patterns of files, and objects of an S3 store.

    find_sources(["data/*.jsonl", "s3://lab/traces.parquet"])
    # [Source("data/a.jsonl", "json"), Source("data/b.jsonl", "json"), Source("s3://lab/traces.parquet", "parquet")]

Polars reads the store: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and for other stores than Amazon's
AWS_ENDPOINT_URL, say where and who. A Parquet object is read where it is; the lines of any other are copied into a
temporary file without a name first, and from there on are read as those of a file.
"""

import glob
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import polars as pl
from polars.io._expand_paths import _expand_paths  # the one way to list objects that Polars has

from lib.errors import RequestError
from lib.trace import shown

KINDS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
S3 = "s3://"


@dataclass(frozen=True)
class Source:
    """A file or an object: its name as errors tell it, and its kind (json, csv, tsv or parquet) by its ending."""

    name: str
    kind: str

    @property
    def is_object(self) -> bool:
        """True for an object of a store."""
        return self.name.startswith(S3)


def find_sources(names: Iterable[str | Path]) -> list[Source]:
    """The files and objects of these names, patterns replaced by what they match, sorted, each once.

    Raises RequestError for a pattern that matches nothing, and for a name that is no UTF-8, as the store keeps it with
    the traces. A name that is a file's is that file, whatever is in it.
    """
    found = [match for name in names for match in _matches(str(name))]
    for name in found:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise RequestError(f"{shown(name)}: the name is no UTF-8 text; rename the file")
    return [Source(name, KINDS.get(Path(name).suffix.lower(), "json")) for name in dict.fromkeys(found)]


def open_source(source: Source) -> IO[bytes]:
    """The bytes of the source. Raises RequestError where they cannot be read."""
    return _copy_of(source) if source.is_object else _open(source.name)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """What Polars raises while it reads the source, its panics among it, becomes a RequestError of one line."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise RequestError(f"{_printable(source.name)}: cannot be read ({_reason(error)})") from None


def _matches(name: str) -> list[str]:
    if "://" in name and not name.startswith(S3):
        raise RequestError(f"{shown(name)}: of object stores only {S3} is read")
    if not any(mark in name for mark in "*?["):
        return [name]
    if name.startswith(S3):
        with reading(Source(name, "")):
            matches = _expand_paths(name).collect()["path"].to_list()
    else:
        matches = [name] if _is_there(name) else glob.glob(name, recursive=True)
    if not matches:
        raise RequestError(f"{_printable(name)}: no file matches this pattern")
    return sorted(matches)


def _printable(name: str) -> str:
    return name if name.isprintable() else shown(name)


def _is_there(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError) as error:
        raise RequestError(f"{shown(name)}: cannot be a file's name ({error})") from None


def _open(name: str) -> IO[bytes]:
    path = Path(name)
    try:
        if not path.is_file():
            fault = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
            raise RequestError(f"{_printable(name)}: {fault}; expected a file of traces")
        return open(path, "rb")
    except OSError as error:
        raise RequestError(f"{_printable(name)}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RequestError(f"{shown(name)}: cannot be a file's name ({error})") from None


def _copy_of(source: Source) -> IO[bytes]:
    """The object's lines in a temporary file, each with its line end and without a carriage return before it."""
    file = tempfile.TemporaryFile()
    try:
        with reading(source):
            try:
                _copy(pl.scan_lines(source.name, glob=False), file)
            except pl.exceptions.ComputeError as error:
                if "utf8" not in str(error):
                    raise
                _copy(_lossy_lines(source), file, replaced=True)
        file.seek(0)
        return file
    except BaseException:
        file.close()
        raise


def _lossy_lines(source: Source) -> pl.LazyFrame:
    """The object's lines where some are no UTF-8, with U+FFFD for what is none."""
    return pl.scan_csv(
        source.name,
        glob=False,
        has_header=False,
        separator="\n",
        quote_char=None,
        schema={"line": pl.String},
        empty_string_is_null=False,
        encoding="utf8-lossy",
    )


def _copy(lines: pl.LazyFrame, file: IO[bytes], replaced: bool = False) -> None:
    """Write the lines; `replaced` bytes are written as one that is no UTF-8 either, so that their line is rejected."""
    file.seek(0)
    file.truncate()
    for frame in lines.collect_batches(maintain_order=True):
        for line in frame["line"].cast(pl.Binary):
            file.write(line.replace("\ufffd".encode(), b"\xff") if replaced else line)
            file.write(b"\n")


def _reason(error: BaseException) -> str:
    """Polars' sentence, without the path, which may be that of another object of the store, and its first cause."""
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    sentence, *causes = str(error).strip().split("\n")
    sentence = sentence.partition(" (path: ")[0].partition("<?xml")[0].removeprefix("object-store error: ")
    if causes and isinstance(error, OSError):
        sentence += f": {causes[-1].partition(': ')[2]}; are AWS_ENDPOINT_URL and AWS_ALLOW_HTTP as they should be?"
    return "".join(letter if letter.isprintable() else " " for letter in sentence[:400]) or type(error).__name__
