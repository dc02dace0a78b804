"""The trace, schema 1.0: a prompt, ordered reasoning, a final answer. Everything else is made from it.

    line = b'{"trace_version":"1.0","prompt":"2+2?","steps":[{"i":0,"type":"step","content":"2+2=4"}],' \\
           b'"final_answer":"4","meta":{"source":"builtin"}}'
    trace = parse_trace(line)
    trace.id                 # "7c2f…", the same wherever this content is read
    to_json(trace)           # the whole record on one line, with its id
    parse_trace(line[:40])   # InvalidTrace: field record: expected valid JSON, got Unterminated string …

Reading is strict and never repairs: no coercion, no unknown or repeated key, no NaN, no integer beyond 64
bits, no NUL, no lone surrogate, nothing over a bound. It has two ways that agree. The quick one lets
msgspec decode, and gives up at the first doubt; the careful one then decodes with the standard library,
looks at every value, and names the field that is wrong. An import sends many lines at a time the quick way.
A `meta` that nests more than seven deep is always read the careful way.
"""

import json
import math
import re
import uuid
from collections import Counter
from datetime import UTC, datetime
from functools import lru_cache, reduce
from hashlib import sha1, sha256
from operator import is_not
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import replace

from lib.cards import brief, card
from lib.errors import RequestError

TRACE_VERSION = "1.0"
MAX_BYTES = 1 << 20
MAX_DEPTH = 100
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "retrace:trace")

Text = Annotated[str, Meta(min_length=1, max_length=50_000)]
StepText = Annotated[str, Meta(min_length=1, max_length=20_000)]
ShortText = Annotated[str, Meta(min_length=1, max_length=64)]
Identifier = Annotated[str, Meta(min_length=1, max_length=200)]
Index = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Moment = Annotated[datetime, Meta(tz=True)]
S = TypeVar("S")


class Step(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One step of reasoning; `i` is unique in its trace and orders it."""

    i: Index
    type: ShortText
    content: StepText


class Trace(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One trace. `created_at` is UTC, or empty until the trace is stored; it is no part of the content.

    trace = next(Store(Path("runs/store")).scan())
    trace                                  # Trace('7c2f…', 'High Card Duel: you hold …', 5 steps, answer 'win')
    trace.prompt, trace.final_answer       # ('High Card Duel: you hold …', 'win')
    [step.content for step in trace.steps]

    In a notebook it shows itself as a card.
    """

    trace_version: ShortText
    prompt: Text
    steps: Annotated[tuple[Step, ...], Meta(min_length=1, max_length=1000)]
    final_answer: Text
    meta: dict[str, Any] = {}
    id: Identifier = ""
    created_at: Annotated[str, Meta(min_length=1)] = ""

    def __repr__(self) -> str:
        count = len(self.steps)
        return (
            f"Trace({brief(self.id)!r}, {brief(self.prompt)!r}, {count} step{'s' * (count != 1)}, "
            f"answer {brief(self.final_answer, 30)!r})"
        )

    def _repr_html_(self) -> str:
        facts = {"question": self.prompt, "steps": [step.content for step in self.steps], "answer": self.final_answer}
        plain = {key: value for key, value in self.meta.items() if not isinstance(value, dict | list)}
        return card(f"Trace {self.id[:12]}", facts | {"meta": plain, "created": self.created_at})


class Entry(Struct, frozen=True, gc=False):
    """A trace as the store keeps it: `record` is JSON of all of it, with `id` and `created_at`, `facts` of Facts."""

    id: str
    content_sha256: bytes
    created_at: str
    record: str
    facts: str


class Facts(Struct, frozen=True, gc=False, array_like=True):
    """What is looked at of every trace: `["1.0","2+2?","",null,"builtin",1,12]`, a fraction of its record.

    The game and the state are those that the question stands for, where it has them. Traces that ask the same again
    mostly share all of it. `characters` are those of the prompt, the steps and the answer.
    """

    trace_version: str
    prompt: str
    game: str
    state: Any
    source: str
    steps: int
    characters: int


class InvalidTrace(RequestError):
    """A record that is no trace: the field at fault, what it should hold and what it holds."""

    def __init__(self, field: str, expected: str, got: str) -> None:
        super().__init__(f"field {field}: expected {expected}, got {got}")
        self.field, self.expected, self.got = field, expected, got


def parse_trace(line: bytes) -> Trace:
    """The trace in one JSON object, its steps in the order of `i`; raises InvalidTrace.

    Without an `id` it gets UUIDv5 of its canonical content; a `created_at` is brought to UTC.
    """
    if read := _read_quickly([line]):
        [trace], [content], _ = read
        trace = Trace(**{name: getattr(trace, name) for name in Trace.__struct_fields__})
    else:
        trace = _settled(read_strictly(line, Trace))
        content = canonical(trace)
    return trace if trace.id else replace(trace, id=_uuid5(content))


def make_trace(
    prompt: str,
    steps: list[tuple[str, str]],
    final_answer: str,
    meta: dict[str, Any],
    id: str = "",
    created_at: str = "",
) -> Trace:
    """A trace from (type, content) pairs, held to the same bounds as one that is read.

    make_trace("2+2?", [("step", "2+2=4")], "4", {"source": "builtin"})
    """
    record = {
        "trace_version": TRACE_VERSION,
        "prompt": prompt,
        "steps": [{"i": i, "type": type, "content": content} for i, (type, content) in enumerate(steps)],
        "final_answer": final_answer,
        "meta": meta,
        "created_at": created_at or utc_now(),
    }
    return trace_from(record | ({"id": id} if id else {}))


def trace_from(record: dict[str, Any]) -> Trace:
    """The trace in plain Python values, checked as one that is read; raises InvalidTrace."""
    try:
        # NaN is written as NaN here, and refused by name when the line is read.
        line = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidTrace("record", "values that JSON can hold", str(error)) from None
    return parse_trace(line)


def canonical(trace: Trace) -> bytes:
    """What makes two traces the same: compact UTF-8 JSON with sorted keys, without `id` and `created_at`.

    Steps are their [type, content] in order: gaps in the numbering leave no mark. Equal floats are written
    alike (1.0, 1.00 and 1e0 as `1.0`; -0.0 as `0.0`), the integer 1 as `1`; key order and escapes leave no
    mark. An absent `meta` is an empty one.
    """
    steps = [(step.type, step.content) for step in trace.steps]
    content = _Content(trace.final_answer, trace.meta, trace.prompt, steps, trace.trace_version)
    encoded = _CONTENT.encode(content)
    if _MINUS in encoded and b"-0.0" in encoded:
        encoded = _CONTENT.encode(replace(content, meta=_without_negative_zero(trace.meta)))
    return encoded


def content_sha256(trace: Trace) -> str:
    """Hexadecimal SHA-256 of the canonical content."""
    return sha256(canonical(trace)).hexdigest()


def to_json(trace: Trace) -> bytes:
    """The whole record on one line: sorted keys, `id` and `created_at` included where they are set."""
    return _SORTED.encode(trace)


def facts_of(trace: Trace) -> str:
    """JSON of the Facts of the trace."""
    prompt, steps, meta = trace.prompt, [len(step.content) for step in trace.steps], trace.meta
    asked = trace.trace_version, prompt, str(meta.get("game", "")), meta.get("state")
    source, characters = str(meta.get("source", "unknown")), len(prompt) + len(trace.final_answer) + sum(steps)
    return _SORTED.encode((*asked, source, len(steps), characters)).decode()


def to_entry(trace: Trace, now: str) -> Entry:
    """`trace` for the store; without an id it gets that of its content, without a time `now`."""
    content = canonical(trace)
    if not (trace.id and trace.created_at):
        trace = replace(trace, id=trace.id or _uuid5(content), created_at=trace.created_at or now)
    return _entries([trace], [content], [to_json(trace)], now)[0]


def read_entries(lines: list[bytes], now: str) -> list[Entry] | None:
    """The trace on each line, for the store; None at the first doubt about any, for `parse_trace` to say which.

    The record is the line itself, with what it lacks put in front: `{"prompt": …` becomes
    `{"created_at":"2025-…","id":"7c2f…","prompt": …`.
    """
    read = _read_quickly([line.strip(_BLANK) for line in lines])
    return read and _entries(*read, now)


def utc_now() -> str:
    """The present moment, `2025-12-21T10:00:00.000000Z`: fixed width, so that text order is time order."""
    return _rfc3339(datetime.now(UTC))


def read_strictly(line: bytes, shape: type[S]) -> S:
    """One JSON object as the msgspec Struct `shape`, every value looked at; raises InvalidTrace."""
    if len(line) > MAX_BYTES:
        raise InvalidTrace("record", "at most 1 MiB", f"{len(line):,} bytes")
    try:
        record = json.loads(line.decode(), object_pairs_hook=_Object, parse_int=_integer, parse_constant=float)
        _check_values(record, "", 0)
    except RecursionError:
        raise InvalidTrace("record", f"nesting at most {MAX_DEPTH} deep", "deeper nesting") from None
    except UnicodeDecodeError as error:
        got = f"byte 0x{line[error.start]:02x} at offset {error.start}"
        raise InvalidTrace("record", "valid UTF-8", got) from None
    except json.JSONDecodeError as error:
        got = f"{error.msg} at character {error.pos + 1}" if line.strip() else "nothing"
        raise InvalidTrace("record", "valid JSON", got) from None
    return _convert(record, shape)


def shown(value: object) -> str:
    """`value` as an error shows it: at most 80 characters, none of them a raw control character."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if not isinstance(value, str):
        return json.dumps(value)
    text = repr(value[:80])
    if len(value) <= 80 and len(text) <= 80:
        return text
    return f"{text[:50]}… ({len(value):,} characters)"


class _Content(Struct, frozen=True, gc=False):
    """The canonical content, its fields sorted by name, so that none is sorted again each time."""

    final_answer: str
    meta: dict[str, Any]
    prompt: str
    steps: list[tuple[str, str]]
    trace_version: str


_SORTED = msgspec.json.Encoder(order="sorted")
_CONTENT = msgspec.json.Encoder(order="deterministic")  # sorts the keys of objects, and leaves those of a Struct
_BLANK = b" \t\r\n"  # and nothing else: JSON knows fewer blanks than Python does
_COUNTING = list(range(1000))
_INT64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_SCALAR = str | _INT64 | float | bool | None
_NESTED = reduce(lambda inner, _: _SCALAR | dict[str, inner] | list[inner], range(6), _SCALAR)
_BACKSLASH, _MINUS, _QUOTE = b'\\-"'  # as numbers: looking for a number in bytes is three times faster than for bytes
_OUR_TIME = re.compile(r"\d{4}-\d\d-\d\dT([01]\d|2[0-3]):\d\d:\d\d\.\d{6}Z", re.ASCII)
_MISMATCH = re.compile(r"Expected (?P<expected>.*?)(?:, got .*)?", re.DOTALL)
_NO_FIELD = re.compile(r"Object (?P<how>missing required|contains unknown) field `(?P<name>.*)`", re.DOTALL)


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys came twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [] if len(pairs) == len(self) else _repeated(key for key, _ in pairs)


class _QuickTrace(Trace):
    """A trace as the quick way reads it: what `meta` may hold is looked at while it is decoded."""

    meta: dict[str, _NESTED] = {}


_DECODER = msgspec.json.Decoder(_QuickTrace)


def _read_quickly(lines: list[bytes]) -> tuple[list[Trace], list[bytes], list[bytes]] | None:
    """The settled traces, their canonical contents, and the JSON of each; None at the first doubt about any line.

    No key is repeated if the lines hold as many strings as the traces: of values with the same key msgspec keeps
    the last, and every other takes at least the string of its key with it. Quotation marks tell how many there
    are. The canonical content has all strings of a line but three keys of each step, `id` and `created_at`; and
    it has `meta`, even where the line has none.
    """
    text = b"\n".join(lines)
    if len(text) > MAX_BYTES or (_BACKSLASH in text and b"\\u0000" in text):
        return None
    try:
        decoded = list(map(_DECODER.decode, lines))
        traces = list(map(_settled, decoded))
    except (ValueError, RecursionError, InvalidTrace):  # msgspec's own errors are ValueErrors
        return None
    contents = list(map(canonical, traces))
    others = sum(
        [
            3 * len(trace.steps) + 2 * (trace.id != "") + 2 * (trace.created_at != "") - (not trace.meta)
            for trace in traces
        ]
    )
    if _count_quotes(text) != _count_quotes(b"\n".join(contents)) + 2 * others:
        return None
    if any(map(is_not, traces, decoded)):
        lines = list(map(to_json, traces))
    return traces, contents, lines


def _count_quotes(text: bytes) -> int:
    """How many quotation marks begin or end a string: those that no backslash escapes."""
    escaped = 0
    if _BACKSLASH in text:
        text = text.replace(b"\\\\", b"")  # a backslash that is escaped escapes nothing
        escaped = text.count(b'\\"')
    if len(text) < 10_000:
        return text.count(_QUOTE) - escaped
    # numpy takes a moment to begin, and then counts five times as fast.
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == _QUOTE)) - escaped


def _check_values(value: Any, path: str, depth: int) -> None:
    """Refuse, with its path, whatever a JSON parser lets through and a trace may not hold."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, _Object):
        if value.repeated:
            raise InvalidTrace(_join(path, value.repeated[0]), "one value", "the key twice or more")
        for key, item in value.items():
            _check_text(key, f"a key of {path or 'record'}")
            _check_values(item, _join(path, key), depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_values(item, f"{path}[{i}]", depth + 1)
    elif isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidTrace(path, "a finite number", "NaN" if math.isnan(value) else "an infinite number")
    elif type(value) is int and not -(2**63) <= value < 2**63:
        raise InvalidTrace(path, "an integer within 64 bits", str(value))


def _check_text(text: str, path: str) -> None:
    if "\0" in text:
        raise InvalidTrace(path, "text without NUL", shown(text))
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidTrace(path, "text without lone surrogates", shown(text))


def _convert(record: Any, shape: type[S]) -> S:
    if isinstance(record, dict) and isinstance(version := record.get("trace_version"), str) and version:
        if version != TRACE_VERSION:
            raise _unknown_version(version)
    try:
        return msgspec.convert(record, shape)
    except msgspec.ValidationError as error:
        raise _explained(str(error), record) from None


def _explained(message: str, record: Any) -> InvalidTrace:
    """msgspec's sentence as field, expected and got, with the value that is really there."""
    sentence, _, path = message.removesuffix("`").partition(" - at `$")
    path = path.removeprefix(".")
    if match := _NO_FIELD.fullmatch(sentence if path else message):
        field = _join(path, match["name"])
        if match["how"] == "missing required":
            return InvalidTrace(field, "this required field", "nothing")
        return InvalidTrace(field, "no such field", shown(_at(record, path).get(match["name"])))
    match = _MISMATCH.fullmatch(sentence)
    expected = match["expected"].replace("`", "") if match else "a known value"
    return InvalidTrace(path or "record", expected, shown(_at(record, path)))


def _at(record: Any, path: str) -> Any:
    """The value at a path such as `steps[3].i`."""
    for index, key in re.findall(r"\[(\d+)\]|([^.\[\]]+)", path):
        record = record[int(index) if index else key]
    return record


def _entries(traces: list[Trace], contents: list[bytes], lines: list[bytes], now: str) -> list[Entry]:
    """The traces with their lines for records; column by column, which takes less than trace by trace."""
    ids = [trace.id or _uuid5(content) for trace, content in zip(traces, contents, strict=True)]
    hashes = [sha256(content).digest() for content in contents]
    times = [trace.created_at or now for trace in traces]
    records = [_completed(*each, now) for each in zip(traces, ids, lines, strict=True)]
    return list(map(Entry, ids, hashes, times, records, map(facts_of, traces)))


def _completed(trace: Trace, id: str, line: bytes, now: str) -> str:
    """The line with what it lacks put in front."""
    if trace.id and trace.created_at:
        return line.decode()
    given = f'"created_at":"{now}",' * (not trace.created_at) + f'"id":"{id}",' * (not trace.id)
    return f"{{{given}{line[1:].decode()}"


def _settled(trace: Trace) -> Trace:
    """`trace` with its steps in order and its time in UTC; raises InvalidTrace."""
    if trace.trace_version != TRACE_VERSION:
        raise _unknown_version(trace.trace_version)
    order = [step.i for step in trace.steps]
    if order != _COUNTING[: len(order)] and order != sorted(set(order)):
        trace = replace(trace, steps=_in_order(trace.steps))
    if trace.created_at and (created_at := _in_utc(trace.created_at)) != trace.created_at:
        trace = replace(trace, created_at=created_at)
    return trace


def _in_order(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    seen: set[int] = set()
    for place, step in enumerate(steps):
        if step.i in seen:
            raise InvalidTrace(f"steps[{place}].i", "an index no other step has", str(step.i))
        seen.add(step.i)
    return tuple(sorted(steps, key=lambda step: step.i))


@lru_cache(maxsize=16)  # the traces of one file mostly share their time
def _in_utc(text: str) -> str:
    try:
        if _OUR_TIME.fullmatch(text) and datetime.fromisoformat(text):
            return text
        return _rfc3339(msgspec.convert(text, Moment).astimezone(UTC))
    except (ValueError, OverflowError):
        expected = "a time with its zone, such as 2025-12-21T10:00:00Z"
        raise InvalidTrace("created_at", expected, shown(text)) from None


def _rfc3339(moment: datetime) -> str:
    return moment.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def _unknown_version(version: str) -> InvalidTrace:
    return InvalidTrace("trace_version", f"{TRACE_VERSION!r}, the only version known", shown(version))


_NAMESPACE_HASHED = sha1(NAMESPACE.bytes, usedforsecurity=False)
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def _uuid5(content: bytes) -> str:
    """`str(uuid.uuid5(NAMESPACE, content))` (RFC 9562, 5.5), several times faster."""
    hashed = _NAMESPACE_HASHED.copy()
    hashed.update(content)
    text = hashed.hexdigest()
    return f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{_VARIANT[text[16]]}{text[17:20]}-{text[20:32]}"


def _without_negative_zero(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_negative_zero(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_negative_zero(item) for item in value]
    return 0.0 if isinstance(value, float) and value == 0 else value


def _integer(digits: str) -> int:
    return int(digits[:30])  # thirty digits are out of bounds already, and quick to read


def _join(path: str, key: str) -> str:
    key = key if key.isprintable() and len(key) <= 64 else shown(key)
    return f"{path}.{key}" if path else key


def _repeated(keys: Any) -> list[str]:
    return [key for key, count in Counter(keys).items() if count > 1]
