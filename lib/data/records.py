"""The shapes that a record may have, each as strict as the trace itself, and the trace in it.

    parse_record(b'{"question": "2+2?", "answer": "2 and 2 make 4\\n#### 4"}')      # Trace(prompt="2+2?", …)

    {"trace_version", "prompt", "steps", …}      a trace, and the output of an evaluation, which has scores beside it
    {"prompts", "trace_steps", …}                our exports: `trace`, `tunix_sft`, `training_example`
    {"messages": [{"role", "content"}, …]}       our export `messages`, and chats as TRL and hosted APIs read them
    {"prompt", "completion"}                     texts, or lists of messages, as TRL reads them
    {"question", "answer"}                       as GSM8K has them

The last three may have `id` and `metadata` beside, and hold free text: lib/data/reasoning.py splits it. Records with
other fields need a mapping (lib/data/mapping.py).
"""

from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from lib.config import in_line
from lib.data.reasoning import split_completion
from lib.data.renderer import parse_conversation, parse_response, render_prompt
from lib.trace import (
    TRACE_VERSION,
    Identifier,
    InvalidTrace,
    StepText,
    Text,
    Trace,
    parse_trace,
    read_strictly,
    shown,
    trace_from,
)


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a chat."""

    role: str
    content: str


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


class _Messages(_Export, kw_only=True):
    messages: list[Message]


class _PromptCompletion(_Export, kw_only=True):
    prompt: str | list[Message]
    completion: str | list[Message]


class _QuestionAnswer(_Export, kw_only=True):
    question: str
    answer: str


class _Evaluation(Trace, kw_only=True):
    completion: str
    score: Annotated[int, Meta(ge=0, le=1)] | None
    verdict: Literal["correct", "wrong", "unscored", "truncated"]
    num_tokens: Annotated[int, Meta(ge=0)]
    logprob: Annotated[float, Meta(le=0)]


_SCORED = frozenset({"completion", "score", "verdict", "num_tokens", "logprob"})
_FOREIGN = (_Messages, _PromptCompletion, _QuestionAnswer)
UNKNOWN = (
    "prompt and completion, question and answer, or messages; for others give a mapping (--mapping FILE.yaml, see "
    "docs/importing.md)"
)
_SHAPES = (_Evaluation, _TraceExport, _TunixSft, _TrainingExample, *_FOREIGN)
_FIELDS = frozenset().union(*(shape.__struct_fields__ for shape in _SHAPES)) - {"id", "metadata", "meta"}
_KEYS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def parse_record(raw: bytes) -> Trace:
    """The trace in one record, whichever of the known shapes it has; raises InvalidTrace."""
    try:
        keys = _KEYS.decode(raw).keys()
    except (ValueError, RecursionError):
        return parse_trace(raw)  # which says what is wrong
    shape = shape_of(keys)
    if keys and keys.isdisjoint(_FIELDS):
        raise InvalidTrace("record", UNKNOWN, f"only {shown(', '.join(keys))}")
    if shape is Trace:
        return parse_trace(raw)
    try:
        return _READERS[shape](read_strictly(raw, shape))
    except InvalidTrace as error:
        if shape in _FOREIGN and error.expected == "no such field" and error.field in keys:
            raise InvalidTrace(error.field, f"no such field ({mapping_hint(error.field)})", error.got) from None
        raise


def shape_of(keys: Collection[str]) -> type[Struct]:
    """The shape that a record with these fields is meant to have; a trace where no other is recognised."""
    if "messages" in keys:
        return _Messages
    if "response" in keys:
        return _TrainingExample
    if "trace_steps" in keys:
        return _TraceExport
    if "prompts" in keys:
        return _TunixSft
    if "completion" in keys and "steps" not in keys and "trace_version" not in keys:
        return _PromptCompletion
    if "question" in keys and "answer" in keys:
        return _QuestionAnswer
    return Trace if _SCORED.isdisjoint(keys) else _Evaluation


def mapping_hint(column: str) -> str:
    """How a mapping says what becomes of a column that no shape has; of a long name the beginning is shown."""
    name = in_line(column if len(column) <= 80 else f"{column[:50]}…")
    return f"a mapping keeps it by `meta: {{{name}: {name}}}` or leaves it out by `ignore: [{name}]`"


def exchange_of(field: str, messages: list[Message]) -> tuple[str, str]:
    """The user's turn, with the system's at its head as Gemma wants it, and the assistant's; raises InvalidTrace."""
    roles = [message.role for message in messages]
    if roles[-2:] != ["user", "assistant"] or roles[:-2] not in ([], ["system"]):
        got = shown(", ".join(roles)) if roles else "none"
        raise InvalidTrace(field, "one exchange: at most one of role system, then user, then assistant", got)
    system = messages[0].content if len(messages) == 3 else ""
    return render_prompt(messages[-2].content, system), messages[-1].content


def reasoning_of(field: str, completion: str, exported: bool = False) -> tuple[list[str], str]:
    """The steps and the answer of a free text; raises InvalidTrace naming its field.

    Blanks at its end are left out, but of a text that we `exported`: there they are the answer's own.
    """
    try:
        return split_completion(completion if exported else completion.rstrip())
    except ValueError as error:
        raise InvalidTrace(field, str(error), shown(completion)) from None


def plain_trace(prompt: str, steps: list[Any], answer: str, meta: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The values of a trace whose steps are texts, and what is given beside."""
    steps = [{"i": i, "type": "step", "content": step} for i, step in enumerate(steps)]
    record = {"trace_version": TRACE_VERSION, "prompt": prompt, "steps": steps, "final_answer": answer}
    return record | given | ({"meta": meta} if meta else {})  # an empty one would have to be read the careful way


def _from_trace_export(record: _TraceExport) -> Trace:
    return _trace(record, record.prompts, record.trace_steps, record.final_answer)


def _from_tunix_sft(record: _TunixSft) -> Trace:
    try:
        prompt, response = parse_conversation(record.prompts)
    except ValueError as error:
        raise InvalidTrace("prompts", str(error), shown(record.prompts)) from None
    steps, answer = _rendered("prompts", response)
    if answer != record.final_answer:
        raise InvalidTrace("final_answer", f"the conversation's {shown(answer)}", shown(record.final_answer))
    return _trace(record, prompt, steps, answer, marks=("format",))


def _from_training_example(record: _TrainingExample) -> Trace:
    steps, answer = _rendered("response", record.response)
    source = record.metadata.get("source_trace_id", record.id)
    return _trace(record, record.prompt, steps, answer, marks=("source_trace_id",), id=source)


def _from_messages(record: _Messages) -> Trace:
    prompt, completion = exchange_of("messages", record.messages)
    field = f"messages[{len(record.messages) - 1}].content"
    return _trace_of_text(record, prompt, field, completion)


def _from_prompt_completion(record: _PromptCompletion) -> Trace:
    prompt, completion = record.prompt, record.completion
    if isinstance(prompt, str) != isinstance(completion, str):
        kinds = {True: "text", False: "a list of messages"}
        expected = f"{kinds[isinstance(prompt, str)]}, as prompt is"
        raise InvalidTrace("completion", expected, kinds[isinstance(completion, str)])
    if isinstance(prompt, list):
        prompt, completion = exchange_of("prompt and completion", [*prompt, *completion])
    return _trace_of_text(record, prompt, "completion", completion)


def _from_question_answer(record: _QuestionAnswer) -> Trace:
    return _trace_of_text(record, record.question, "answer", record.answer)


def _from_evaluation(record: _Evaluation) -> Trace:
    """The scores are kept in `meta` under their own names."""
    fields = msgspec.to_builtins(record)
    scores = {name: fields.pop(name) for name in sorted(_SCORED)}
    if both := sorted(_SCORED & record.meta.keys()):
        raise InvalidTrace(f"meta.{both[0]}", "no such field beside that of the record", shown(record.meta[both[0]]))
    return trace_from(fields | {"meta": record.meta | scores})


_READERS = {
    _Messages: _from_messages,
    _TrainingExample: _from_training_example,
    _TraceExport: _from_trace_export,
    _TunixSft: _from_tunix_sft,
    _PromptCompletion: _from_prompt_completion,
    _QuestionAnswer: _from_question_answer,
    _Evaluation: _from_evaluation,
}


def _rendered(name: str, response: str) -> tuple[list[str], str]:
    steps, answer = parse_response(response)
    if not steps:
        raise InvalidTrace(name, "numbered steps of reasoning", shown(response))
    if answer is None:
        raise InvalidTrace(name, "a line that begins with `Answer: `", shown(response))
    return steps, answer


def _trace_of_text(record: _Export, prompt: str, field: str, completion: str) -> Trace:
    return _trace(record, prompt, *reasoning_of(field, completion, exported="step_types" in record.metadata))


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
    content = plain_trace(prompt, steps, answer, meta, **{name: it for name, it in given.items() if it != ""})
    for step, type in zip(content["steps"], types, strict=True):
        step["type"] = type
    try:
        return trace_from(content)
    except InvalidTrace as error:
        inside = "metadata." if error.field in ("created_at", "trace_version") else ""
        raise InvalidTrace(inside + error.field, error.expected, error.got) from None


def _step_types(types: Any, count: int) -> list[str]:
    if not isinstance(types, list) or not all(isinstance(name, str) and 1 <= len(name) <= 64 for name in types):
        raise InvalidTrace("metadata.step_types", "a list of texts of 1 to 64 characters", shown(types))
    if len(types) != count:
        raise InvalidTrace("metadata.step_types", f"one type for each of the {count} steps", f"{len(types)}")
    return types
