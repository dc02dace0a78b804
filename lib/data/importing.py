"""Files of traces, read strictly: every line is accepted, rejected with its reason, or blank.

    for record in read_traces(Path("mine.jsonl")):
        record           # Accepted(line=1, trace=Trace(…))
                         # Rejected(line=2, field="steps[0].i", expected="int", got="'x'", raw=b'{"trace…')
                         # Blank(line=3)

A file is JSONL, a JSON array, or an object with the key `traces` (scalars beside that key describe the file
and are not read). All are streamed: a record over 1 MiB is rejected without being held in memory, and in
the last two kinds an element counts as a line. A record may have the shape of a trace, of one of our
exports, or of an evaluation output; each shape is as strict as the trace itself.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct

from lib.data.renderer import parse_conversation, parse_response
from lib.data.store import Store
from lib.errors import RequestError
from lib.files import atomic_open
from lib.trace import (
    MAX_BYTES,
    TRACE_VERSION,
    Entry,
    Identifier,
    InvalidTrace,
    StepText,
    Text,
    Trace,
    parse_trace,
    read_entries,
    read_strictly,
    shown,
    to_entry,
    trace_from,
    utc_now,
)

BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 20
LINES_CHUNK = 1 << 16  # so small that what is made of its lines stays in the processor's cache
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


def read_traces(path: Path) -> Iterator[Record]:
    """Every record of the file, in order. Raises RequestError for a file that is none of the three kinds."""
    for first, records in _records(path, parse_record, lambda raws: None):
        for line, record in enumerate(records, first):
            yield Accepted(line, record) if isinstance(record, Trace) else record


def import_files(
    store: Store,
    paths: Iterable[Path],
    on_bad_record: str = "refuse",
    rejects_folder: Path | None = None,
) -> ImportReport:
    """Add the traces of all files to the store: all or nothing, or with `quarantine` all that are good.

    Quarantined records go, with their reasons, to a JSONL file in `rejects_folder` (`rejects` in the store's
    folder where none is given), named by its content. Raises RequestError naming file, line and field.
    """
    if on_bad_record not in ("refuse", "quarantine"):
        raise RequestError(f"on_bad_record: expected refuse or quarantine, got {on_bad_record!r}")
    with tempfile.TemporaryFile() as rejects:
        counts = _Counts(rejects=rejects)
        added = store.add_entries(_accepted(counts, paths, on_bad_record, rejects_folder or store.folder / "rejects"))
    return ImportReport(
        lines=counts.accepted + counts.rejected + counts.blank,
        accepted=counts.accepted,
        rejected=counts.rejected,
        blank=counts.blank,
        added=added.added,
        duplicates=added.duplicates,
        rejects_file=counts.rejects_file,
    )


def parse_record(raw: bytes) -> Trace:
    """The trace in one record, whichever of the known shapes it has; raises InvalidTrace."""
    try:
        keys = _KEYS.decode(raw).keys()
    except (ValueError, RecursionError):
        return parse_trace(raw)  # which says what is wrong
    if "messages" in keys:
        return _from_messages(read_strictly(raw, _Messages))
    if "response" in keys:
        return _from_training_example(read_strictly(raw, _TrainingExample))
    if "trace_steps" in keys:
        return _from_trace_export(read_strictly(raw, _TraceExport))
    if "prompts" in keys:
        return _from_tunix_sft(read_strictly(raw, _TunixSft))
    if not _SCORED.isdisjoint(keys):
        return _from_evaluation(read_strictly(raw, _Evaluation))
    return parse_trace(raw)


# ---- shapes of a record -----------------------------------------------------------------------------------


class _Export(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    id: Identifier = ""
    metadata: dict[str, Any] = {}


class _TraceExport(_Export, kw_only=True):
    prompts: Text
    trace_steps: Annotated[list[StepText], Meta(min_length=1, max_length=1000)]
    final_answer: Text


class _TunixSft(_Export, kw_only=True):
    prompts: str
    final_answer: Text


class _TrainingExample(_Export, kw_only=True):
    prompt: Text
    response: str


class _Message(Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str


class _Messages(_Export, kw_only=True):
    messages: list[_Message]


class _Evaluation(Trace, kw_only=True):
    completion: str
    score: Annotated[int, Meta(ge=0, le=1)] | None
    verdict: Literal["correct", "wrong", "unscored", "truncated"]
    num_tokens: Annotated[int, Meta(ge=0)]
    logprob: Annotated[float, Meta(le=0)]


_SCORED = frozenset({"completion", "score", "verdict", "num_tokens", "logprob"})
_KEYS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _from_trace_export(record: _TraceExport) -> Trace:
    return _trace(record, record.prompts, record.trace_steps, record.final_answer)


def _from_tunix_sft(record: _TunixSft) -> Trace:
    try:
        prompt, response = parse_conversation(record.prompts)
    except ValueError as error:
        raise InvalidTrace("prompts", str(error), shown(record.prompts)) from None
    steps, answer = _reasoning("prompts", response)
    if answer != record.final_answer:
        raise InvalidTrace("final_answer", f"the conversation's {shown(answer)}", shown(record.final_answer))
    return _trace(record, prompt, steps, answer, marks=("format",))


def _from_training_example(record: _TrainingExample) -> Trace:
    steps, answer = _reasoning("response", record.response)
    source = record.metadata.get("source_trace_id", record.id)
    return _trace(record, record.prompt, steps, answer, marks=("source_trace_id",), id=source)


def _from_messages(record: _Messages) -> Trace:
    roles = [message.role for message in record.messages]
    if roles != ["user", "assistant"]:
        got = shown(", ".join(roles)) if roles else "none"
        raise InvalidTrace("messages", "one of role user, then one of role assistant", got)
    user, assistant = record.messages
    return _trace(record, user.content, *_reasoning("messages[1].content", assistant.content))


def _from_evaluation(record: _Evaluation) -> Trace:
    """The scores are kept in `meta` under their own names."""
    fields = msgspec.to_builtins(record)
    scores = {name: fields.pop(name) for name in sorted(_SCORED)}
    if both := sorted(_SCORED & record.meta.keys()):
        raise InvalidTrace(f"meta.{both[0]}", "no such field beside that of the record", shown(record.meta[both[0]]))
    return trace_from(fields | {"meta": record.meta | scores})


def _reasoning(name: str, response: str) -> tuple[list[str], str]:
    steps, answer = parse_response(response)
    if not steps:
        raise InvalidTrace(name, "numbered steps of reasoning", shown(response))
    if answer is None:
        raise InvalidTrace(name, "a line that begins with `Answer: `", shown(response))
    return steps, answer


def _trace(
    record: _Export, prompt: str, steps: list[str], answer: str, marks: tuple[str, ...] = (), id: str = ""
) -> Trace:
    """The trace of an export: `metadata` is its `meta`, but for version, time, step types and the format's marks."""
    meta = {key: value for key, value in record.metadata.items() if key not in marks}
    given = {
        "id": id or record.id,
        "created_at": meta.pop("created_at", ""),
        "trace_version": meta.pop("trace_version", TRACE_VERSION),
    }
    types = _step_types(meta.pop("step_types", ["step"] * len(steps)), len(steps))
    content = {
        "prompt": prompt,
        "steps": [{"i": i, "type": types[i], "content": step} for i, step in enumerate(steps)],
        "final_answer": answer,
        "meta": meta,
    }
    try:
        return trace_from(content | {name: value for name, value in given.items() if value != ""})
    except InvalidTrace as error:
        inside = "metadata." if error.field in ("created_at", "trace_version") else ""
        raise InvalidTrace(inside + error.field, error.expected, error.got) from None


def _step_types(types: Any, count: int) -> list[str]:
    if not isinstance(types, list) or not all(isinstance(name, str) and 1 <= len(name) <= 64 for name in types):
        raise InvalidTrace("metadata.step_types", "a list of texts of 1 to 64 characters", shown(types))
    if len(types) != count:
        raise InvalidTrace("metadata.step_types", f"one type for each of the {count} steps", f"{len(types)}")
    return types


# ---- accounting -------------------------------------------------------------------------------------------


@dataclass
class _Counts:
    """What was seen so far; each rejected record is a line of `rejects`, the first few are `complaints`."""

    rejects: IO[bytes]
    accepted: int = 0
    rejected: int = 0
    blank: int = 0
    complaints: list[str] = field(default_factory=list)
    rejects_file: Path | None = None


def _accepted(counts: _Counts, paths: Iterable[Path], on_bad: str, folder: Path) -> Iterator[list[Entry]]:
    """The good traces of all files; what must happen to the bad ones happens when the last one is read."""
    now = utc_now()

    def read_all(raws: list[bytes]) -> list[Entry] | None:
        return read_entries(raws, now)

    def read(raw: bytes) -> Entry:
        alone = read_all([raw])
        return alone[0] if alone else to_entry(parse_record(raw), now)

    for path in paths:
        for _, records in _records(path, read, read_all):
            good = [record for record in records if isinstance(record, Entry)]
            counts.accepted += len(good)
            if len(good) < len(records):
                _count_others(counts, path, records)
            yield good
    if counts.rejected and on_bad == "refuse":
        raise RequestError(_complaint(counts))
    if counts.rejected:
        counts.rejects_file = _publish(counts.rejects, folder)


def _count_others(counts: _Counts, path: Path, records: list[Entry | Rejected | Blank]) -> None:
    for record in records:
        if isinstance(record, Rejected):
            _count_rejected(counts, path, record)
        elif isinstance(record, Blank):
            counts.blank += 1


def _count_rejected(counts: _Counts, path: Path, record: Rejected) -> None:
    counts.rejected += 1
    reason = {"field": record.field, "expected": record.expected, "got": record.got}
    entry = {
        "file": str(path),
        "line": record.line,
        **reason,
        "raw": record.raw.decode(errors="backslashreplace"),
    }
    counts.rejects.write(msgspec.json.encode(entry) + b"\n")
    if len(counts.complaints) < SHOWN_RECORDS:
        counts.complaints.append(
            f"{path}:{record.line}: field {record.field}: expected {record.expected}, got {record.got}"
        )


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


class _Pieces(NamedTuple):
    """The bytes of records that stand on neighbouring lines, the number of the first line, and what is wrong there.

    Each is at most a little over the cap.
    """

    first: int
    raws: list[bytes]
    fault: InvalidTrace | None = None


_BLANK = b" \t\r\n"
_STRING = rb'"(?:[^"\\]|\\.)*+"'
_MEMBER = _STRING + rb"\s*+:\s*+(?:" + _STRING + rb"|[\w.+-]++)"
_OPENING = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*+(?:\[|\{\s*+(?:" + _MEMBER + rb'\s*+,\s*+)*?"traces"\s*+:\s*+\[)', re.DOTALL
)
_CLOSING = re.compile(rb"\s*+(?:,\s*+" + _MEMBER + rb"\s*+)*+\}\s*+", re.DOTALL)
_NOTHING = re.compile(rb"\s*+")
_OUTSIDE = re.compile(rb'[\[{]++|[\]}]++|,|"|[^\[\]{},"]++')
_INSIDE = re.compile(rb'"|(?:[^"\\]++|\\.)++|\\\Z', re.DOTALL)
_ESCAPED = re.compile(rb".", re.DOTALL)


def _records(
    path: Path, read: Callable[[bytes], R], read_all: Callable[[list[bytes]], list[R] | None]
) -> Iterator[tuple[int, list[R | Rejected | Blank]]]:
    """What `read` makes of the records of the file, some neighbours at a time, with the line of the first.

    `read_all` makes the same of many of them at once, and quicker, or returns None.
    """
    empty = True
    with _open(path) as file:
        for first, raws, fault in _pieces(file, _head(file, path)):
            records = None
            if fault is None and sum(map(len, raws)) <= MAX_BYTES:
                records = read_all(raws)
            if records is None:
                records = [_read(line, raw, fault, read) for line, raw in enumerate(raws, first)]
            empty = empty and all(isinstance(record, Blank) for record in records)
            yield first, records
    if empty:
        raise RequestError(f"{path}: holds no trace; expected JSONL, a JSON array, or an object with `traces`")


def _read(line: int, raw: bytes, fault: InvalidTrace | None, read: Callable[[bytes], R]) -> R | Rejected | Blank:
    text = raw.strip(_BLANK)
    try:
        if fault:
            raise fault
        if len(raw) > MAX_BYTES:
            raise InvalidTrace("record", "at most 1 MiB", "more")
        return read(text) if text else Blank(line)
    except InvalidTrace as error:
        return Rejected(line, error.field, error.expected, error.got, text[:RAW_BYTES])


def _open(path: Path) -> IO[bytes]:
    try:
        if not path.is_file():
            fault = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
            raise RequestError(f"{path}: {fault}; expected a file of traces")
        return open(path, "rb")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None


def _head(file: IO[bytes], path: Path) -> bytes:
    head = file.read(1 << 16)
    if b"\0" in head and not head.removeprefix(BOM).lstrip().startswith((b"{", b"[")):
        raise RequestError(f"{path}: is no UTF-8 text; expected JSONL, a JSON array, or an object with `traces`")
    return head


def _pieces(file: IO[bytes], head: bytes) -> Iterator[_Pieces]:
    if opening := _OPENING.match(head):
        file.seek(opening.end())
        return _elements(file, 1 + opening[0].count(b"\n"), _CLOSING if b"{" in opening[0] else _NOTHING)
    file.seek(len(BOM) if head.startswith(BOM) else 0)
    return _lines(file)


def _lines(file: IO[bytes]) -> Iterator[_Pieces]:
    """The lines of a JSONL file; what a line holds past the cap is passed over."""
    first = 1
    while chunk := file.read(LINES_CHUNK):
        if not chunk.endswith(b"\n"):
            chunk += _rest_of_line(file)
        lines = [line.removesuffix(b"\r") for line in chunk.removesuffix(b"\n").split(b"\n")]
        yield _Pieces(first, lines)
        first += len(lines)


def _rest_of_line(file: IO[bytes]) -> bytes:
    most = MAX_BYTES + 2  # one too many for the cap, and the line end
    rest = more = file.readline(most)
    while len(more) == most and not more.endswith(b"\n"):
        more = file.readline(most)
    return rest


def _elements(file: IO[bytes], line: int, closing: re.Pattern[bytes]) -> Iterator[_Pieces]:
    """The elements of a JSON array, from behind its bracket on: what stands between its commas.

        {"prompt": "a, b"}, {"prompt": …}]      gives `{"prompt": "a, b"}` and `{"prompt": …}`

    Only brackets, commas and strings are looked at, so that one bad element does not spoil the next.
    """
    piece, begin, depth, elements = bytearray(), line, 0, 0
    tokens = _tokens(file)
    for text, bare in tokens:
        if bare and text[0] in b"[{":
            depth += len(text)
        elif bare and text[0] in b"]}":
            if len(text) > depth:
                piece += text[:depth]
                if piece or elements:
                    yield _element(begin, piece)
                yield from _ending(line, text[depth:], tokens, closing)
                return
            depth -= len(text)
        elif bare and text == b"," and depth == 0:
            yield _element(begin, piece)
            elements += 1
            piece.clear()
            begin = line
            continue
        if not piece:
            line += text.count(b"\n", 0, len(text) - len(text.lstrip()))
            text, begin = text.lstrip(), line
        line += text.count(b"\n")
        if len(piece) <= MAX_BYTES:
            piece += text
    yield _Pieces(begin, [bytes(piece)], InvalidTrace("record", "the array's closing ]", "the end of the file"))


def _element(begin: int, piece: bytearray) -> _Pieces:
    fault = None if piece else InvalidTrace("record", "a trace between the commas", "nothing")
    return _Pieces(begin, [bytes(piece)], fault)


def _ending(
    line: int, text: bytes, tokens: Iterator[tuple[bytes, bool]], closing: re.Pattern[bytes]
) -> Iterator[_Pieces]:
    """Nothing, if the array closes and only what belongs there comes after it."""
    for more, _ in tokens:
        text += more if len(text) <= MAX_BYTES else b""
    if text[:1] != b"]":
        yield _Pieces(line, [text], InvalidTrace("record", "the array's closing ]", shown(text[:1].decode())))
    elif not closing.fullmatch(text, 1):
        got = shown(text[1:200].decode(errors="replace"))
        yield _Pieces(line, [text], InvalidTrace("record", "the end of the file after the array", got))


def _tokens(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The whole text in pieces: runs of opening or closing brackets, commas, and what is between them.

    The flag is True outside strings. A piece never spans two chunks of the file, a string may.
    """
    pattern = _OUTSIDE
    while chunk := file.read(CHUNK):
        at = 0
        while at < len(chunk):
            text = pattern.match(chunk, at)[0]
            at += len(text)
            yield text, pattern is _OUTSIDE
            if pattern is _ESCAPED:
                pattern = _INSIDE
            elif text == b'"':
                pattern = _INSIDE if pattern is _OUTSIDE else _OUTSIDE
            elif pattern is _INSIDE and text == b"\\":  # the chunk ends between it and what it escapes
                pattern = _ESCAPED
