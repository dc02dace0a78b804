"""A mapping: which columns of a file, or fields of its records, a trace is made of.

    prompt: Question              # columns of the file stand on the right
    steps: Rationale              # text, a line of it a step, or a list of texts
    final_answer: Answer
    meta: {category: Topic}       # kept, each under its name on the left
    ignore: [Worker]              # left out
    source: my_benchmark          # `meta.source` of every trace; no column

In place of `steps` and `final_answer` there may be one `completion`, and in place of all three `messages`. A column
that the mapping does not name is an error: nothing is left out unsaid.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from lib.config import build, parse_yaml
from lib.data.reasoning import split_steps
from lib.data.records import UNKNOWN, Message, exchange_of, mapping_hint, plain_trace, reasoning_of, shape_of
from lib.errors import RequestError
from lib.trace import InvalidTrace, Trace, read_strictly, shown, trace_from

UNMAPPED = "only fields that the mapping names, those to leave out under `ignore`"
MAX_MAPPING = 1 << 15


@dataclass(frozen=True)
class Mapping:
    """The columns that the parts of a trace come from; of the first five, one of the three combinations above."""

    prompt: str = ""
    steps: str = ""
    final_answer: str = ""
    completion: str = ""
    messages: str = ""
    # Where a record has none of its own, the id is that of its content, and the time that of the import.
    id: str = ""
    created_at: str = ""
    # Key of `meta` → column; any JSON value is kept as it is.
    meta: dict = field(default_factory=dict)
    # Columns to leave out.
    ignore: list = field(default_factory=list)
    # What `meta.source` says.
    source: str = ""

    def required(self) -> list[str]:
        """The columns without which there is no trace."""
        return [name for name in (self.prompt, self.steps, self.final_answer, self.completion, self.messages) if name]

    def columns(self) -> list[str]:
        """Every column that something is made of."""
        return [*self.required(), *self.own().values(), *self.meta.values()]

    def own(self) -> dict[str, str]:
        """The columns of what a record may have of its own, and else is given."""
        return {name: column for name, column in (("id", self.id), ("created_at", self.created_at)) if column}


def load_mapping(path: Path) -> Mapping:
    """The mapping in a YAML file. Raises RequestError naming file and key."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_MAPPING + 1)
        if len(text) > MAX_MAPPING:
            raise RequestError(f"{path}: expected a mapping of at most {MAX_MAPPING >> 10} KiB")
        mapping = build(Mapping, parse_yaml(text.decode("utf-8-sig"), str(path)), str(path))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8 text'})") from None
    _check(mapping, str(path))
    return mapping


def check_columns(columns: list[str], mapping: Mapping | None, where: str) -> None:
    """Raise RequestError where a table has columns that are not meant for, or lacks some. Once a file, for all rows."""
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise RequestError(f"{where}: columns: expected each name once, got twice: {_named(twice)}")
    if mapping:
        known = [*mapping.columns(), *mapping.ignore]
        missing = [column for column in known if column not in columns]
    else:
        fields = msgspec.structs.fields(shape_of(columns))
        known = [field.name for field in fields]
        missing = [field.name for field in fields if field.required and field.name not in columns]
        if missing:
            raise RequestError(f"{where}: columns {_named(columns)}: expected {UNKNOWN}")
    if missing:
        raise RequestError(f"{where}: columns: the mapping names {_named(missing)}, the file has {_named(columns)}")
    if unknown := [column for column in columns if column not in known]:
        hint = mapping_hint(unknown[0])
        raise RequestError(f"{where}: columns: nothing says what becomes of {_named(unknown)}; {hint}")


def parse_mapped(raw: bytes, mapping: Mapping) -> Trace:
    """The trace that the mapping finds in one JSON object; raises InvalidTrace naming the object's own field."""
    record = read_strictly(raw, dict[str, Any])
    if unknown := sorted(record.keys() - {*mapping.columns(), *mapping.ignore}):
        raise InvalidTrace("record", UNMAPPED, f"beside them {_named(unknown)}")
    for column in mapping.required():
        if column not in record:
            raise InvalidTrace(column, "this required field", "nothing")
    prompt, steps, answer = _parts(record, mapping)
    meta = {key: record[column] for key, column in mapping.meta.items() if column in record}
    if mapping.source:
        meta["source"] = mapping.source
    given = {name: _spelt(record, column) for name, column in mapping.own().items() if column in record}
    try:
        return trace_from(plain_trace(prompt, steps, answer, meta, **given))
    except InvalidTrace as error:
        raise InvalidTrace(_column(error.field, mapping), error.expected, error.got) from None


def _check(mapping: Mapping, where: str) -> None:
    """What no key of the file can tell by itself."""
    given = [name for name in ("prompt", "steps", "final_answer", "completion", "messages") if getattr(mapping, name)]
    if given not in (["prompt", "steps", "final_answer"], ["prompt", "completion"], ["messages"]):
        raise RequestError(
            f"{where}: expected prompt, steps and final_answer, or prompt and completion, or messages; "
            f"got {' and '.join(given) or 'none of them'}"
        )
    named = [*mapping.columns(), *mapping.ignore]
    if wrong := [column for column in named if not isinstance(column, str)]:
        raise RequestError(f"{where}: meta, ignore: expected names of columns, got {shown(wrong[0])}")
    if twice := sorted({column for column in named if named.count(column) > 1}):
        raise RequestError(f"{where}: expected each column once, got twice: {_named(twice)}")
    if mapping.source and "source" in mapping.meta:
        raise RequestError(f"{where}: source: expected nothing beside meta.source, got {shown(mapping.source)}")


def _parts(record: dict[str, Any], mapping: Mapping) -> tuple[str, list[Any], str]:
    if mapping.messages:
        messages = _messages(record[mapping.messages], mapping.messages)
        prompt, completion = exchange_of(mapping.messages, messages)
        field = f"{mapping.messages}[{len(messages) - 1}].content"
        return prompt, *reasoning_of(field, completion)
    if mapping.completion:
        completion = record[mapping.completion]
        if not isinstance(completion, str):
            raise InvalidTrace(mapping.completion, "text", shown(completion))
        return record[mapping.prompt], *reasoning_of(mapping.completion, completion)
    steps = record[mapping.steps]
    if not isinstance(steps, str | list):
        raise InvalidTrace(mapping.steps, "text, or a list of texts", shown(steps))
    steps = split_steps(steps) if isinstance(steps, str) else steps
    return record[mapping.prompt], steps, _spelt(record, mapping.final_answer)


def _messages(value: Any, column: str) -> list[Message]:
    try:
        return read_strictly(msgspec.json.encode({"messages": value}), _Chat).messages
    except InvalidTrace as error:
        raise InvalidTrace(error.field.replace("messages", column, 1), error.expected, error.got) from None


class _Chat(msgspec.Struct, frozen=True):
    messages: list[Message]


def _spelt(record: dict[str, Any], column: str) -> Any:
    """The value, an integer as its digits: it has one spelling, and a float several."""
    value = record[column]
    if isinstance(value, float):
        raise InvalidTrace(column, "text or an integer (a float has no one spelling)", shown(value))
    return str(value) if type(value) is int else value


def _column(field: str, mapping: Mapping) -> str:
    """The column that a field of the trace came from, as errors name it."""
    name, dot, rest = field.partition(".")
    if name == "meta" and (column := mapping.meta.get(rest)):
        return column
    if name.startswith("steps"):
        column = mapping.steps or mapping.completion or mapping.messages
        return column + name.removeprefix("steps")
    if name == "prompt":
        return mapping.prompt or mapping.messages
    if name == "final_answer":
        return mapping.final_answer or mapping.completion or mapping.messages
    return {"id": mapping.id, "created_at": mapping.created_at}.get(name) or field


def _named(columns: Iterable[str]) -> str:
    names = [shown(column) for column in columns]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
