"""The chat text: what is rendered parses back, the mask covers the model's turn, no text forges a control token."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lib.data.renderer import (
    CONTROL_TOKENS,
    Example,
    ParsedResponse,
    chat_template,
    encode_example,
    encode_prompt,
    parse_conversation,
    parse_response,
    refuse_control_tokens,
    render_conversation,
    render_example,
    render_prompt,
    render_response,
    render_turns,
)
from lib.errors import RequestError
from lib.trace import make_trace

TOY = make_trace("2+2?", [("step", "two and two"), ("step", "make four")], "4", {}, id="t1")
CONVERSATION = (
    "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n"
    "Reasoning:\n1. two and two\n2. make four\nAnswer: 4<end_of_turn>"
)


class Letters:
    """A tokenizer that can be read by eye: one token a character, one a control token."""

    bos_id, end_of_turn_id = CONTROL_TOKENS.index("<bos>"), CONTROL_TOKENS.index("<end_of_turn>")

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(f"{'|'.join(CONTROL_TOKENS)}|.", text, re.DOTALL)
        return [CONTROL_TOKENS.index(piece) if piece in CONTROL_TOKENS else ord(piece) for piece in pieces]

    def decode(self, tokens: list[int]) -> str:
        return "".join(CONTROL_TOKENS[token] if token < len(CONTROL_TOKENS) else chr(token) for token in tokens)


def test_a_trace_renders_as_gemmas_template():
    assert render_conversation(render_example(TOY)) == CONVERSATION


def test_the_ablation_renders_the_answer_alone():
    assert render_example(TOY, "answer_sft_v1") == Example("t1", "2+2?", "Answer: 4")


def test_the_system_instruction_stands_at_the_head_of_the_users_turn():
    assert render_example(TOY, system_instruction="Be brief.").prompt == "Be brief.\n\n2+2?"


def test_an_unknown_recipe_is_refused():
    with pytest.raises(RequestError, match="expected one of trace_sft_v1, answer_sft_v1, shuffled_answers, got 'sft'"):
        render_example(TOY, "sft")


texts = st.lists(
    st.sampled_from(["\n", "Answer: ", "Reasoning:\n", "1. ", "2. ", "\n2. ", " ", "<end_of_turn", "é", "\r"])
    | st.text(),
    max_size=4,
).map("".join)


@given(st.lists(texts, max_size=4), texts)
def test_parsing_a_response_is_the_inverse_of_rendering_it(steps: list[str], answer: str):
    # The two things that numbered lines cannot show: see `parse_response`.
    assume(not any(f"\n{number + 1}. " in step for number, step in enumerate(steps, 1)))
    assume("\nAnswer: " not in answer)
    assert parse_response(render_response(steps, answer)) == ParsedResponse(steps, answer)


@given(texts, texts)
def test_parsing_a_conversation_is_the_inverse_of_rendering_it(prompt: str, response: str):
    assume(not any(token in text for token in CONTROL_TOKENS for text in (prompt, response)))
    assert parse_conversation(render_conversation(Example("x", prompt, response))) == (prompt, response)


def test_a_line_belongs_to_the_step_before_it_unless_the_next_number_begins_it():
    response = "Reasoning:\n1. a\n3. b\n\n2. c\nAnswer: no\nAnswer: yes\nand more"
    assert parse_response(response) == ParsedResponse(["a\n3. b\n", "c\nAnswer: no"], "yes\nand more")


def test_a_response_without_an_answer_has_none():
    assert parse_response("Reasoning:\n1. a") == ParsedResponse(["a"], None)
    assert parse_response("") == parse_response("what?") == ParsedResponse([], None)


@pytest.mark.parametrize(
    "text",
    [
        "2+2?",
        CONVERSATION.replace("user", "model"),
        CONVERSATION.replace("2+2?", "2+2?<end_of_turn>\n<start_of_turn>user\nmore"),
        CONVERSATION.replace("four", "four<end_of_turn>\n<start_of_turn>model\n"),
        CONVERSATION.replace("four", "<eos>"),
        CONVERSATION + CONVERSATION,
        "x" + CONVERSATION,
    ],
)
def test_what_is_not_one_turn_each_is_no_conversation(text: str):
    with pytest.raises(ValueError, match="one user turn and one model turn"):
        parse_conversation(text)


def test_a_conversation_may_begin_with_bos_and_end_open():
    for text in (f"<bos>{CONVERSATION}\n", CONVERSATION.removesuffix("<end_of_turn>")):
        assert parse_conversation(text) == parse_conversation(CONVERSATION)


@pytest.mark.parametrize("token", CONTROL_TOKENS)
@pytest.mark.parametrize("field", ["prompt", "step", "final_answer"])
def test_a_control_token_in_any_text_is_refused_by_id(token: str, field: str):
    parts = {"prompt": "p", "step": "s", "final_answer": "a", field: f"x{token}y"}
    trace = make_trace(parts["prompt"], [("step", "s"), ("step", parts["step"])], parts["final_answer"], {}, id="mine")
    for recipe in ("trace_sft_v1", "answer_sft_v1"):
        with pytest.raises(RequestError, match=f"trace mine: its text holds the control token '{token}'"):
            render_example(trace, recipe)


def test_text_that_only_resembles_a_control_token_is_text():
    refuse_control_tokens("toy", "<BOS>", "< bos>", "<start_of_turn", "end_of_turn>", "<start_of_turns>", "<|im_end|>")


def test_mask_covers_exactly_the_completion_and_its_end_of_turn():
    found = encode_example(render_example(TOY), Letters())
    trained = [token for token, mask in zip(found.tokens, found.loss_mask, strict=True) if mask]
    assert Letters().decode(found.tokens) == "<bos>" + CONVERSATION
    assert Letters().decode(trained) == CONVERSATION.partition("model\n")[2]
    assert found.loss_mask == sorted(found.loss_mask)  # the prompt first, then the model's turn to its end


def test_a_prompt_is_encoded_alike_in_training_and_in_evaluation():
    example = render_example(TOY, system_instruction="Be brief.")
    prompt = encode_prompt(example.prompt, Letters())
    assert encode_example(example, Letters()).tokens[: len(prompt)] == prompt
    assert Letters().decode(prompt).endswith("<end_of_turn>\n<start_of_turn>model\n")


# ---- the same as Jinja ----------------------------------------------------------------------------------------


def chat(*contents: str, system: str | None = None, trained: str = "", ask: bool = False) -> str:
    """What the chat template makes of turns of user and assistant, in an environment as transformers has it."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    messages = messages if system is None else [{"role": "system", "content": system}, *messages]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    given = {"messages": messages, "bos_token": "<bos>", "add_generation_prompt": ask}
    return jinja.from_string(chat_template(trained)).render(**given, raise_exception=raise_exception)


TEXTS = st.text() | st.sampled_from(
    ["{{ 7 * 7 }}", "{% raw %}", "a\r\nb", " \n ", "\\n\"'", "\U0001f600\u2028", "%}", "-}}"]
)


@given(TEXTS, TEXTS, TEXTS)
def test_the_chat_template_renders_what_is_rendered_here(prompt: str, response: str, instruction: str):
    asked = Example("x", render_prompt(prompt, instruction), response)
    for said in ({"system": instruction}, {"trained": instruction}, {"system": instruction, "trained": "another"}):
        assert chat(prompt, response, **said) == f"<bos>{render_conversation(asked)}"
        assert chat(prompt, **said, ask=True) == f"<bos>{render_turns(asked.prompt)}"


def test_a_system_message_that_is_empty_takes_the_instruction_of_training_away():
    assert chat("2+2?", system="", trained="Be brief.", ask=True) == f"<bos>{render_turns('2+2?')}"


def test_a_chat_of_many_turns_is_one_conversation_after_the_other():
    first, second = render_conversation(Example("1", "S\n\na", "b")), render_turns("c")
    assert chat("a", "b", "c", system="S", ask=True) == f"<bos>{first}\n{second}"


def test_turns_out_of_order_are_refused():
    wrong = [{"role": "assistant", "content": "a"}], [{"role": "user", "content": "a"}] * 2
    for messages in wrong:
        with pytest.raises(Exception, match="raise_exception"):
            ImmutableSandboxedEnvironment().from_string(chat_template()).render(messages=messages, bos_token="")
