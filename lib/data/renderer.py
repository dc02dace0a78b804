"""The one owner of the chat text: a trace becomes a conversation, a conversation becomes tokens and a mask.

Gemma's chat template, with the reasoning of the trace as the model's turn:

    <start_of_turn>user
    {prompt}<end_of_turn>
    <start_of_turn>model
    Reasoning:
    1. {step}
    2. {step}
    Answer: {final_answer}<end_of_turn>

Text from a trace is never allowed to hold a control token: such a trace is refused, by its id.
Follows the formatting page of the Gemma documentation (a system instruction goes at the head of the
user's turn, as Gemma has no system role).
"""

import json
import re
from typing import NamedTuple, Protocol

from lib.errors import RequestError
from lib.trace import Trace

RECIPES = {
    "trace_sft_v1": "the reasoning steps and the answer",
    "answer_sft_v1": "the answer alone: the ablation that shows what the reasoning is worth",
    "shuffled_answers": "the reasoning and the answer of another trace: the control that must not win",
}
SHUFFLED = "shuffled_answers"
CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
CONTROL_IN_JSON = rf"{_CONTROL.pattern}|\\u00[3-7]"  # where an escape may stand for any of their characters
_USER, _MODEL, _END = "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>"
_CONVERSATION = re.compile(
    f"(?:<bos>)?{_USER}(?P<prompt>.*?){_END}\n{_MODEL}(?P<response>.*?)(?:{_END})?\n?", re.DOTALL
)

# The same text as Jinja, for who reads chats with something else. Messages are of user and assistant in turns, after
# at most one of system; $INSTRUCTION stands for the text of one that is not there.
_CHAT_TEMPLATE = r"""
{{- bos_token -}}
{%- set given = messages[0]['role'] == 'system' -%}
{%- set instruction = messages[0]['content'] if given else $INSTRUCTION -%}
{%- for message in (messages[1:] if given else messages) -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('expected messages of user and assistant in turns, after at most one of system') -}}
{%- endif -%}
{{- '' if loop.first else '\n' -}}
{{- '<start_of_turn>user\n' if message['role'] == 'user' else '<start_of_turn>model\n' -}}
{{- instruction + '\n\n' if instruction and loop.first else '' -}}
{{- message['content'] -}}
{{- '<end_of_turn>' -}}
{%- endfor -%}
{{- '\n<start_of_turn>model\n' if add_generation_prompt else '' -}}
""".strip()


class Example(NamedTuple):
    """A rendered training item: what the user says, and the model's turn that is trained on."""

    id: str
    prompt: str
    response: str


class ParsedResponse(NamedTuple):
    """A model's turn taken apart; `answer` is None where no `Answer:` line was found."""

    steps: list[str]
    answer: str | None


class EncodedExample(NamedTuple):
    """Token ids of a whole conversation, and which of them the model is trained to produce.

    tokens     <bos> <start_of_turn> user \\n … <start_of_turn> model \\n Answer : win <end_of_turn>
    loss_mask  F     F               F    F    F               F     F  T      T T   T
    """

    tokens: list[int]
    loss_mask: list[bool]


class Encoder(Protocol):
    """What rendering needs of a tokenizer."""

    bos_id: int
    end_of_turn_id: int

    def encode(self, text: str) -> list[int]: ...


def render_example(trace: Trace, recipe: str = "trace_sft_v1", system_instruction: str = "") -> Example:
    """The trace as a training item. Raises RequestError, naming the trace, for a control token in its text."""
    if recipe not in RECIPES:
        raise RequestError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    refuse_control_tokens(f"trace {trace.id}", *_texts(trace))
    steps = [] if recipe == "answer_sft_v1" else [step.content for step in trace.steps]
    response = render_response(steps, trace.final_answer)
    return Example(trace.id, render_prompt(trace.prompt, system_instruction), response)


def render_prompt(prompt: str, system_instruction: str = "") -> str:
    """What stands in the user's turn."""
    return f"{system_instruction}\n\n{prompt}" if system_instruction else prompt


def question_of(prompt: str, system_instruction: str = "") -> str:
    """The question in a user's turn, without the instruction before it: the inverse of `render_prompt`."""
    return prompt.removeprefix(f"{system_instruction}\n\n") if system_instruction else prompt


def render_response(steps: list[str], answer: str) -> str:
    """What stands in the model's turn: `Reasoning:`, the numbered steps, `Answer: …`."""
    lines = ["Reasoning:"] if steps else []
    lines += [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    return "\n".join([*lines, f"Answer: {answer}"])


def render_turns(prompt: str) -> str:
    """The text up to the place where the model begins to write."""
    return f"{_USER}{prompt}{_END}\n{_MODEL}"


def render_conversation(example: Example) -> str:
    """The whole text, as the `tunix_sft` export holds it."""
    return f"{render_turns(example.prompt)}{example.response}{_END}"


def chat_template(system_instruction: str = "") -> str:
    """The Jinja template of the same text, `<bos>` before it; `system_instruction` is that of a chat that has none.

    So a question that stands alone is asked as those that the model was trained on.
    """
    return _CHAT_TEMPLATE.replace("$INSTRUCTION", json.dumps(system_instruction, ensure_ascii=False))


def encode_example(example: Example, tokenizer: Encoder) -> EncodedExample:
    """Tokens and loss mask of a training item; the mask covers the model's turn and its `<end_of_turn>`."""
    prompt = encode_prompt(example.prompt, tokenizer)
    response = [*tokenizer.encode(example.response), tokenizer.end_of_turn_id]
    return EncodedExample(prompt + response, [False] * len(prompt) + [True] * len(response))


def encode_prompt(prompt: str, tokenizer: Encoder) -> list[int]:
    """Tokens of everything that comes before the model's first token, `<bos>` first."""
    return [tokenizer.bos_id, *tokenizer.encode(render_turns(prompt))]


def parse_conversation(text: str) -> tuple[str, str]:
    """(prompt, response) of a conversation in Gemma's template. Raises ValueError where it is not one."""
    match = _CONVERSATION.fullmatch(text)
    if not match or _CONTROL.search(match["prompt"]) or _CONTROL.search(match["response"]):
        raise ValueError("one user turn and one model turn in Gemma's chat template")
    return match["prompt"], match["response"]


def parse_response(response: str) -> ParsedResponse:
    """The numbered steps and the answer of a model's turn; the inverse of `render_response`.

    A line belongs to the step before it unless it begins with the next number. The answer is what
    follows the last line that begins with `Answer:`, so it may run over several lines.
    """
    body, found, answer = response.rpartition("\nAnswer: ")
    if not found and response.startswith("Answer: "):
        body, found, answer = "", "Answer: ", response.removeprefix("Answer: ")
    steps: list[str] = []
    for line in (body if found else response).removeprefix("Reasoning:\n").split("\n"):
        mark = f"{len(steps) + 1}. "
        if line.startswith(mark):
            steps.append(line.removeprefix(mark))
        elif steps:
            steps[-1] += f"\n{line}"
    return ParsedResponse(steps, answer if found else None)


def has_control_token(trace: Trace) -> bool:
    """Whether a text of the trace would become a control token of the chat template: it is refused when rendered."""
    return any(map(_CONTROL.search, _texts(trace)))


def _texts(trace: Trace) -> list[str]:
    return [trace.prompt, *[step.content for step in trace.steps], trace.final_answer]


def refuse_control_tokens(name: str, *texts: str) -> None:
    """Raises RequestError where a text would become a control token of the chat template."""
    for text in texts:
        if match := _CONTROL.search(text):
            raise RequestError(
                f"{name}: its text holds the control token {match[0]!r}, which would end or forge a turn; "
                "remove it from the trace"
            )
