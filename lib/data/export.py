"""A dataset as JSONL for trainers, ours and others', and such a file read back as training examples.

    for line in export_lines(dataset.traces, "messages"):
        ...   # b'{"messages":[{"role":"user","content":"High Card Duel: …"},{"role":"assistant",…}],"id":…}'

Four formats: `trace` (the parts), `tunix_sft` (one rendered conversation), `training_example` (prompt and
response), `messages` (what TRL and hosted APIs read). All import back as the traces they were: `metadata`
holds the types of the steps, which rendered text does not show. But what is rendered does not tell a line inside a step
that begins with the number of the next (`2. ` in the first) from that step, nor a later line of an answer that begins
with `Answer: ` from the answer: such a trace is refused on import where the number of its steps or its `final_answer`
no longer fits, and else is split at that line. `trace` alone carries these, too.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from lib.data.records import exchange_of, shape_of
from lib.data.renderer import (
    RECIPES,
    SHUFFLED,
    Example,
    parse_conversation,
    refuse_control_tokens,
    render_conversation,
    render_example,
    render_prompt,
    render_response,
)
from lib.errors import RequestError
from lib.trace import TRACE_VERSION, InvalidTrace, Trace, read_strictly

MAX_SHOWN = 5
NEEDED = frozenset({"created_at", "trace_version", "step_types", "format"})  # of `metadata`, for a file to train on


def _trace(trace: Trace, example: Example) -> dict[str, Any]:
    return {
        "id": trace.id,
        "prompts": trace.prompt,
        "trace_steps": [step.content for step in trace.steps],
        "final_answer": trace.final_answer,
        "metadata": _metadata(trace),
    }


def _tunix_sft(trace: Trace, example: Example) -> dict[str, Any]:
    return {
        "id": trace.id,
        "prompts": render_conversation(example),
        "final_answer": trace.final_answer,
        "metadata": _metadata(trace, format="tunix_sft"),
    }


def _training_example(trace: Trace, example: Example) -> dict[str, Any]:
    metadata = _metadata(trace, source_trace_id=trace.id)
    return {"id": trace.id, "prompt": example.prompt, "response": example.response, "metadata": metadata}


def _messages(trace: Trace, example: Example) -> dict[str, Any]:
    turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
    return {"messages": turns, "id": trace.id, "metadata": _metadata(trace)}


FORMATS: dict[str, Callable[[Trace, Example], dict[str, Any]]] = {
    "trace": _trace,
    "tunix_sft": _tunix_sft,
    "training_example": _training_example,
    "messages": _messages,
}


def export_lines(
    traces: Iterable[Trace], format: str, recipe: str = "trace_sft_v1", system_instruction: str = ""
) -> Iterator[bytes]:
    """One JSON line a trace, in order. Raises RequestError for an unknown format or a trace that cannot be told."""
    if format not in FORMATS:
        raise RequestError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    for trace in shuffled(list(traces)) if recipe == SHUFFLED else traces:
        record = FORMATS[format](trace, render_example(trace, recipe, system_instruction))
        if recipe == SHUFFLED:
            _refuse_clash(trace, {"recipe"})
            record["metadata"]["recipe"] = SHUFFLED
        yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


def shuffled(traces: list[Trace]) -> list[Trace]:
    """Each question with the reasoning and the answer of another trace; the same traces give the same ones.

    Nothing about a question can be learned from them, only how answers look and how often each comes.
    """
    order = random.Random(len(traces)).sample(range(len(traces)), len(traces))
    other = {place: traces[following] for place, following in zip(order, order[1:] + order[:1], strict=True)}
    return [
        replace(trace, steps=other[place].steps, final_answer=other[place].final_answer)
        for place, trace in enumerate(traces)
    ]


def read_examples(path: Path, recipe: str = "trace_sft_v1", system_instruction: str = "") -> list[Example]:
    """The training items of a file in any of the four formats, in order. Raises RequestError for what is none.

    A record is read as strictly as an import reads it. What is rendered already is taken as it stands: reasoning where
    the recipe is the answer alone, the answer alone of a trace that was exported so where it is not, and a prompt
    without the system instruction, are refused, as training would not be what the configuration says.
    """
    examples, problems = [], []
    for number, line in _lines(path):
        try:
            examples.append(_example(line.encode(), recipe, system_instruction))
        except (ValueError, RecursionError, RequestError) as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        more = f"; and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        raise RequestError("; ".join(problems[:MAX_SHOWN]) + more)
    if not examples:
        raise RequestError(f"{path}: holds no training example")
    return examples


def recipe_of(path: Path) -> str:
    """The recipe that `read_examples` takes all of a file by: the one that its first readable line was made by."""
    for _, line in _lines(path):
        for recipe in RECIPES:
            with suppress(ValueError, RecursionError, RequestError):
                _example(line.encode(), recipe, "")
                return recipe
    return "trace_sft_v1"


def detect_format(record: Any) -> str:
    """Which of the four formats a decoded line is in. Raises ValueError where it is in none."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    for name, fields in [
        ("trace", {"prompts", "trace_steps"}),
        ("tunix_sft", {"prompts"}),
        ("training_example", {"prompt", "response"}),
        ("messages", {"messages"}),
    ]:
        if fields <= record.keys():
            return name
    raise ValueError(f"expected the fields of {', '.join(FORMATS)}, got {', '.join(sorted(record)[:8]) or 'none'}")


def _example(line: bytes, recipe: str, system_instruction: str) -> Example:
    fields = json.loads(line)
    kind = detect_format(fields)
    record = read_strictly(line, shape_of(fields))
    if not record.id:
        raise InvalidTrace("id", "a text", "nothing")
    _check_metadata(record.metadata, recipe)
    if kind == "trace":
        steps = [] if recipe == "answer_sft_v1" else record.trace_steps
        prompt = render_prompt(record.prompts, system_instruction)
        example = Example(record.id, prompt, render_response(steps, record.final_answer))
    elif kind == "tunix_sft":
        example = Example(record.id, *parse_conversation(record.prompts))
    elif kind == "training_example":
        example = Example(record.id, record.prompt, record.response)
    else:
        example = Example(record.id, *exchange_of("messages", record.messages))
    refuse_control_tokens(f"example {record.id}", example.prompt, example.response)
    _check_rendering(example, recipe, system_instruction, bool(record.metadata.get("step_types")))
    return example


def _check_metadata(metadata: dict[str, Any], recipe: str) -> None:
    version = metadata.get("trace_version", TRACE_VERSION)
    if version != TRACE_VERSION:
        raise ValueError(f"metadata.trace_version: {version!r} is not known, only {TRACE_VERSION!r}")
    if (recipe == SHUFFLED) != (metadata.get("recipe") == SHUFFLED):
        raise ValueError(f"exported with another recipe than the config's {recipe}; export with --config or --recipe")


def _check_rendering(example: Example, recipe: str, system_instruction: str, has_steps: bool) -> None:
    if not example.response:
        raise ValueError("the model's turn is empty: nothing would be trained on")
    if recipe == "answer_sft_v1" and example.response.startswith("Reasoning:"):
        raise ValueError(
            "rendered with its reasoning, but the recipe is answer_sft_v1; export with --config or --recipe"
        )
    if recipe != "answer_sft_v1" and has_steps and example.response.startswith("Answer: "):
        raise ValueError(f"rendered without its steps, but the recipe is {recipe}; export with --config or --recipe")
    if system_instruction and not example.prompt.startswith(system_instruction):
        raise ValueError(
            "rendered without the config's system_instruction; export with --config or --system-instruction"
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def _metadata(trace: Trace, **own: str) -> dict[str, Any]:
    """Every key of `meta`, and what the format adds; a key that means both is refused, as neither may be lost."""
    own = {
        "created_at": trace.created_at,
        "trace_version": trace.trace_version,
        "step_types": [step.type for step in trace.steps],
        **own,
    }
    _refuse_clash(trace, own.keys())
    return {**trace.meta, **own}


def _refuse_clash(trace: Trace, names: Set[str]) -> None:
    if clash := sorted(names & trace.meta.keys()):
        raise RequestError(f"trace {trace.id}: meta.{clash[0]} is a name that the export needs; rename it")
