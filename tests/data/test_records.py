"""Shapes of records that people have: each becomes the trace it means, or is refused by its field."""

import json

import pytest

from lib.data.records import parse_record
from lib.trace import InvalidTrace, make_trace

REASONED = "2 and 2\nmake 4\n#### 4"
USER, MODEL = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": REASONED}
SYSTEM = {"role": "system", "content": "Think."}
SHAPES = {
    "messages": {"messages": [USER, MODEL]},
    "completion": {"prompt": "2+2?", "completion": REASONED},
    "conversational": {"prompt": [USER], "completion": [MODEL]},
    "question": {"question": "2+2?", "answer": REASONED},
}
TIME = "2025-01-01T00:00:00.000000Z"


def parsed(record: dict):
    return parse_record(json.dumps(record).encode())


def fault(raw: bytes) -> InvalidTrace:
    with pytest.raises(InvalidTrace) as caught:
        parse_record(raw)
    return caught.value


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_the_trace_it_means(shape: str):
    expected = make_trace("2+2?", [("step", "2 and 2"), ("step", "make 4")], "4", {"topic": "sums"}, "mine", TIME)
    assert parsed(SHAPES[shape] | {"id": "mine", "metadata": {"topic": "sums", "created_at": TIME}}) == expected


@pytest.mark.parametrize("end", ["\n\n", " ", "\r\n"])
def test_blanks_at_the_end_of_a_text_are_no_part_of_its_answer_unless_it_was_exported(end: str):
    text = f"Reasoning:\n1. 2 and 2 make 4\nAnswer: 4{end}"
    model = MODEL | {"content": text}
    records = [
        {"messages": [USER, model]},
        {"prompt": "2+2?", "completion": text},
        {"prompt": [USER], "completion": [model]},
        {"question": "2+2?", "answer": text},
    ]
    assert [parsed(record).final_answer for record in records] == ["4"] * 4
    exported = records[0] | {"metadata": {"step_types": ["step"]}}
    assert parsed(exported).final_answer == f"4{end}"


@pytest.mark.parametrize("shape", ["messages", "conversational"])
def test_a_system_turn_stands_at_the_head_of_the_prompt(shape: str):
    name = "messages" if shape == "messages" else "prompt"
    record = SHAPES[shape] | {name: [SYSTEM, *SHAPES[shape][name]]}
    assert parsed(record).prompt == "Think.\n\n2+2?"


@pytest.mark.parametrize(
    "turns, got",
    [
        ([], "none"),
        ([USER], "'user'"),
        ([MODEL, USER], "'assistant, user'"),
        ([USER, MODEL, USER, MODEL], "'user, assistant, user, assistant'"),
        ([SYSTEM, SYSTEM, USER, MODEL], "'system, system, user, assistant'"),
    ],
)
def test_more_or_less_than_one_exchange_is_refused_by_its_roles(turns: list, got: str):
    refused = fault(json.dumps({"messages": turns}).encode())
    assert (refused.field, refused.got) == ("messages", got) and "one exchange" in refused.expected


@pytest.mark.parametrize("shape", SHAPES)
def test_f03_an_unknown_field_is_refused_and_the_error_says_how_to_keep_or_drop_it(shape: str):
    refused = fault(json.dumps(SHAPES[shape] | {"split": "test"}).encode())
    assert refused.field == "split" and "`meta: {split: split}`" in refused.expected
    assert "`ignore: [split]`" in refused.expected


@pytest.mark.parametrize("shape", ["messages", "conversational"])
def test_f03_an_unknown_field_of_a_message_is_refused(shape: str):
    raw = json.dumps(SHAPES[shape]).replace('"role": "assistant"', '"role": "assistant", "name": "a"')
    assert fault(raw.encode()).field in ("messages[1].name", "completion[0].name")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name, old, new",
    [
        ("f01", "}", ""),
        ("f02", '"2+2?"', "4"),
        ("f04", '"lab"', "NaN"),
        ("f05", '"lab"', "9223372036854775808"),
        ("f06", '{"', '{"metadata": {}, "'),
        ("f08", "2+2", r"\u0000"),
        ("f08", "2+2", r"\ud800"),
        ("f10", "2+2", "x" * 50_001),
        ("f10", '"lab"', "[" * 100_000),
    ],
)
def test_f01_f02_f04_f05_f06_f08_f10_bad_values_are_refused_in_every_shape(shape: str, name: str, old: str, new: str):
    raw = json.dumps(SHAPES[shape] | {"metadata": {"source": "lab"}})
    assert old in raw
    assert fault(raw.replace(old, new, 1).encode()).field, name


@pytest.mark.parametrize("shape, field", [("messages", "messages[1].content"), ("completion", "completion")])
def test_a_completion_without_an_answer_is_refused_by_its_field(shape: str, field: str):
    refused = fault(json.dumps(SHAPES[shape]).replace("#### ", "").encode())
    assert refused.field == field and "the answer on the last line" in refused.expected


def test_a_prompt_and_a_completion_of_two_kinds_are_refused():
    refused = fault(json.dumps({"prompt": [USER], "completion": REASONED}).encode())
    assert str(refused) == "field completion: expected a list of messages, as prompt is, got text"
