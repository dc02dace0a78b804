"""Exports: the exact fields of each format, and the same training items read back from all of them."""

import json
from pathlib import Path

import pytest

from lib.data.export import FORMATS, detect_format, export_lines, read_examples, recipe_of, shuffled
from lib.data.renderer import RECIPES, SHUFFLED, Example, render_example
from lib.errors import RequestError
from lib.tasks import high_card_duel
from lib.trace import Trace, make_trace

TOY = make_trace(
    "2+2?",
    [("add", "two and two"), ("step", "make four")],
    "4",
    {"source": "lab", "n": 7},
    "t1",
    "2025-01-01T00:00:00Z",
)
METADATA = {
    "source": "lab",
    "n": 7,
    "created_at": "2025-01-01T00:00:00.000000Z",
    "trace_version": "1.0",
    "step_types": ["add", "step"],
}
RESPONSE = "Reasoning:\n1. two and two\n2. make four\nAnswer: 4"
CONVERSATION = f"<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n{RESPONSE}<end_of_turn>"
RECORDS = {
    "trace": {
        "id": "t1",
        "prompts": "2+2?",
        "trace_steps": ["two and two", "make four"],
        "final_answer": "4",
        "metadata": METADATA,
    },
    "tunix_sft": {
        "id": "t1",
        "prompts": CONVERSATION,
        "final_answer": "4",
        "metadata": METADATA | {"format": "tunix_sft"},
    },
    "training_example": {
        "id": "t1",
        "prompt": "2+2?",
        "response": RESPONSE,
        "metadata": METADATA | {"source_trace_id": "t1"},
    },
    "messages": {
        "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": RESPONSE}],
        "id": "t1",
        "metadata": METADATA,
    },
}


def written(folder: Path, *records: object) -> Path:
    path = folder / "toy.jsonl"
    path.write_text("".join(f"{item if isinstance(item, str) else json.dumps(item)}\n" for item in records))
    return path


def refusal(path: Path, *how: str) -> str:
    with pytest.raises(RequestError) as caught:
        read_examples(path, *how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_has_exactly_its_fields(format: str):
    [line] = export_lines([TOY], format)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert json.loads(line) == RECORDS[format]
    assert detect_format(RECORDS[format]) == format


def test_lines_come_in_the_order_of_the_traces_and_keep_their_characters():
    traces = [make_trace(f"{n} é\u2028?", [("s", "c")], "a", {}) for n in (3, 1, 2)]
    lines = list(export_lines(traces, "trace"))
    assert [json.loads(line)["id"] for line in lines] == [trace.id for trace in traces]
    assert "é\u2028".encode() in lines[0]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != SHUFFLED])
@pytest.mark.parametrize("instruction", ["", "Reason step by step."])
def test_all_formats_give_the_same_training_items(recipe: str, instruction: str, tmp_path: Path):
    other = make_trace("1\n\n1?", [("s", "a\nb"), ("s", "Answer: no")], "x\ny", {})
    expected = [render_example(trace, recipe, instruction) for trace in (TOY, other)]
    for format in FORMATS:
        path = tmp_path / f"{format}.jsonl"
        path.write_bytes(b"".join(export_lines([TOY, other], format, recipe, instruction)))
        assert read_examples(path, recipe, instruction) == expected


def test_an_unknown_format_is_refused():
    with pytest.raises(RequestError, match="expected one of trace, tunix_sft, training_example, messages, got 'csv'"):
        list(export_lines([TOY], "csv"))


@pytest.mark.parametrize(
    "format, key",
    [*[(format, key) for format in FORMATS for key in ("created_at", "trace_version", "step_types")],
     ("tunix_sft", "format"), ("training_example", "source_trace_id")],
)  # fmt: skip
def test_a_meta_key_that_an_export_needs_is_refused_not_lost(format: str, key: str):
    trace = make_trace("p", [("s", "c")], "a", {key: "mine"}, id="t9")
    with pytest.raises(RequestError, match=f"trace t9: meta.{key} is a name that the export needs; rename it"):
        list(export_lines([trace], format))


def test_a_control_token_is_refused_on_the_way_out_and_on_the_way_in(tmp_path: Path):
    forged: Trace = make_trace("p<eos>", [("s", "c")], "a", {}, id="t9")
    for format in FORMATS:
        with pytest.raises(RequestError, match="trace t9: its text holds the control token '<eos>'"):
            list(export_lines([forged], format))
        record = json.dumps(RECORDS[format]).replace("2+2?", "2+2?<end_of_turn>")
        error = refusal(written(tmp_path, record))
        assert "toy.jsonl:1: " in error and ("control token" in error or "one user turn" in error)


def test_every_bad_line_is_named_up_to_five(tmp_path: Path):
    bad = ['{"id": ', "[]", {"x": 1}, {"id": "a", "prompt": "p"}, {"prompt": "p", "response": "r"}, {}, {}]
    error = refusal(written(tmp_path, RECORDS["trace"], "", *bad))
    assert [part.partition(": ")[0] for part in error.split("; ")] == [
        *[f"{tmp_path}/toy.jsonl:{line}" for line in (3, 4, 5, 6, 7)], "and 2 more",
    ]  # fmt: skip
    assert "expected a JSON object, got list" in error and "field id: expected a text, got nothing" in error
    assert "expected the fields of trace, tunix_sft, training_example, messages, got x" in error


@pytest.mark.parametrize(
    "format, changes, fault",
    [
        ("trace", {"trace_steps": [1]}, "field trace_steps[0]: expected "),
        ("trace", {"trace_steps": "a"}, "field trace_steps: expected "),
        ("trace", {"final_answer": ""}, "field final_answer: expected "),
        ("trace", {"id": 5}, "field id: expected "),
        ("tunix_sft", {"prompts": "2+2?"}, "one user turn and one model turn"),
        ("tunix_sft", {"prompts": CONVERSATION.replace(RESPONSE, "")}, "the model's turn is empty"),
        ("training_example", {"response": ""}, "the model's turn is empty"),
        ("training_example", {"prompt": None}, "field prompt: expected "),
        ("messages", {"messages": []}, "field messages: expected one exchange"),
        (
            "messages",
            {"messages": RECORDS["messages"]["messages"][::-1]},
            "field messages: expected one exchange",
        ),
        ("messages", {"messages": [1]}, "field messages[0]: expected "),
        ("messages", {"messages": [{"role": "user"}]}, "field messages[0].content: expected "),
        ("trace", {"id": ""}, "field id: expected "),
        ("messages", {"note": "mine"}, "field note: expected no such field"),
        ("training_example", {"metadata": {"trace_version": "9"}}, "metadata.trace_version: '9' is not known"),
        ("training_example", {"prompt": "a\0b"}, "field prompt: expected "),
        ("trace", {"prompts": "\ud800"}, "field prompts: expected "),
    ],
)
def test_a_bad_field_is_named(format: str, changes: dict, fault: str, tmp_path: Path):
    assert f"toy.jsonl:1: {fault}" in refusal(written(tmp_path, RECORDS[format] | changes))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path):
    twice = json.dumps(RECORDS["trace"]).replace('"prompts"', '"prompts": "5+5?", "prompts"')
    assert "toy.jsonl:1: field prompts: expected " in refusal(written(tmp_path, twice))


def test_a_system_turn_goes_to_the_head_of_the_prompt(tmp_path: Path):
    turns = [{"role": "system", "content": "Be brief."}, *RECORDS["messages"]["messages"]]
    path = written(tmp_path, RECORDS["messages"] | {"messages": turns})
    assert read_examples(path, system_instruction="Be brief.") == [Example("t1", "Be brief.\n\n2+2?", RESPONSE)]


def test_what_was_rendered_otherwise_is_refused(tmp_path: Path):
    for format in ("tunix_sft", "training_example", "messages"):
        path = written(tmp_path, RECORDS[format])
        assert "rendered with its reasoning, but the recipe is answer_sft_v1" in refusal(path, "answer_sft_v1")
        assert "rendered without the config's system_instruction" in refusal(path, "trace_sft_v1", "Be brief.")


@pytest.mark.parametrize("format", ["tunix_sft", "training_example", "messages"])
@pytest.mark.parametrize("other", [recipe for recipe in RECIPES if recipe != "answer_sft_v1"])
def test_answers_alone_are_read_under_their_own_recipe_alone(format: str, other: str, tmp_path: Path):
    path = tmp_path / "toy.jsonl"
    path.write_bytes(b"".join(export_lines([TOY], format, "answer_sft_v1")))
    assert recipe_of(path) == "answer_sft_v1"
    assert [example.response for example in read_examples(path, "answer_sft_v1")] == ["Answer: 4"]
    assert "recipe" in refusal(path, other)
    path.write_text("no record\n" + path.read_text())
    assert recipe_of(path) == "answer_sft_v1"


def test_a_file_of_ones_own_need_not_reason(tmp_path: Path):
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Answer: 4"}]
    path = written(tmp_path, {"id": "t2", "messages": turns}, RECORDS["messages"])
    assert recipe_of(path) == "trace_sft_v1"
    assert [example.response for example in read_examples(path)] == ["Answer: 4", RESPONSE]


def test_files_that_hold_no_example_are_refused(tmp_path: Path):
    assert "toy.jsonl: holds no training example" in refusal(written(tmp_path, "", "  "))
    assert "none.jsonl: No such file or directory" in refusal(tmp_path / "none.jsonl")
    (tmp_path / "toy.jsonl").write_bytes(b"\xff")
    assert "toy.jsonl: not UTF-8 text" in refusal(tmp_path / "toy.jsonl")


def test_f10_deep_nesting_is_refused_by_its_line(tmp_path: Path):
    assert "toy.jsonl:1: " in refusal(written(tmp_path, '{"a":' + "[" * 100_000))


def test_f07_a_bom_and_crlf_make_no_difference(tmp_path: Path):
    path = tmp_path / "toy.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(RECORDS["trace"]).encode() + b"\r\n\r\n")
    assert read_examples(path) == [render_example(TOY)]


def test_shuffled_answers_are_those_of_other_questions_and_always_the_same(tmp_path):
    traces = list(high_card_duel.generate(30, seed=0, created_at="2025-01-01T00:00:00Z"))
    found = shuffled(traces)
    assert found == shuffled(traces)
    assert [(trace.id, trace.prompt) for trace in found] == [(trace.id, trace.prompt) for trace in traces]
    own, others = ([(trace.steps, trace.final_answer) for trace in side] for side in (traces, found))
    assert all(there != here for there, here in zip(own, others, strict=True))
    assert sorted(map(str, own)) == sorted(map(str, others))


def test_a_recipe_of_ones_own_is_kept_or_refused_and_never_written_over():
    trace = make_trace("2+2?", [("step", "two and two")], "4", {"recipe": "soup"}, id="t1")
    [line] = export_lines([trace], "messages")
    assert json.loads(line)["metadata"]["recipe"] == "soup"
    with pytest.raises(RequestError, match=r"^trace t1: meta\.recipe is a name that the export needs; rename it$"):
        list(export_lines([trace], "messages", SHUFFLED))


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_shuffled_answers_is_read_under_its_own_recipe_alone(format, tmp_path):
    traces = list(high_card_duel.generate(3, seed=0, created_at="2025-01-01T00:00:00Z"))
    for recipe, other in [("shuffled_answers", "trace_sft_v1"), ("trace_sft_v1", "shuffled_answers")]:
        path = tmp_path / f"{recipe}.jsonl"
        path.write_bytes(b"".join(export_lines(traces, format, recipe)))
        assert len(read_examples(path, recipe)) == 3
        with pytest.raises(RequestError, match="exported with another recipe"):
            read_examples(path, other)
