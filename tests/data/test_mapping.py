"""Mappings: every column is made something of, kept, or left out by name; nothing is left out unsaid."""

import json
import re
from pathlib import Path

import pytest

from lib.data.importing import Accepted, Rejected, import_files, read_traces
from lib.data.mapping import Mapping, check_columns, load_mapping, parse_mapped
from lib.data.store import Store
from lib.errors import RequestError
from lib.trace import InvalidTrace

PARTS = Mapping(prompt="Q", steps="Why", final_answer="A", meta={"topic": "T"}, ignore=["W"], source="quiz")
RECORD = {"Q": "2+2?", "Why": "1. 2 and 2\n2. make 4", "A": "4", "T": "sums", "W": 9}


def mapped(record: dict, mapping: Mapping = PARTS):
    return parse_mapped(json.dumps(record).encode(), mapping)


def refused(record: dict, mapping: Mapping = PARTS) -> str:
    with pytest.raises(InvalidTrace) as caught:
        mapped(record, mapping)
    return str(caught.value)


def loaded(folder: Path, text: str | bytes) -> Mapping:
    (folder / "m.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_mapping(folder / "m.yaml")


def test_a_record_becomes_the_trace_that_the_mapping_says():
    trace = mapped(RECORD)
    assert (trace.prompt, trace.final_answer, trace.meta) == ("2+2?", "4", {"topic": "sums", "source": "quiz"})
    assert [step.content for step in trace.steps] == ["2 and 2", "make 4"]
    assert mapped(RECORD | {"Why": ["2 and 2", "make 4"], "A": 4}) == trace


def test_a_field_of_texts_named_traces_is_a_column_as_any_other(tmp_path: Path):
    record = {"q": "2+2?", "traces": ["2 and 2", "make 4"], "a": "4"}
    (tmp_path / "mine.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    found = list(read_traces(tmp_path / "mine.jsonl", Mapping(prompt="q", steps="traces", final_answer="a")))
    assert [record.line for record in found] == [1, 2]
    assert [[step.content for step in record.trace.steps] for record in found] == [["2 and 2", "make 4"]] * 2


def test_a_column_without_a_name_is_kept_or_left_out_as_any_other(tmp_path: Path):
    parts = "prompt: Q\nsteps: Why\nfinal_answer: A\n"
    record = {"": 7} | {name: RECORD[name] for name in ("Q", "Why", "A")}
    assert mapped(record, loaded(tmp_path, parts + "ignore: ['']")).meta == {}
    assert mapped(record, loaded(tmp_path, parts + "meta: {row: ''}")).meta == {"row": 7}


@pytest.mark.parametrize(
    "name", ["Topic", "final answer", "", "1", "no", "a: b", "a, b", "# a", "it's", '"', "a\nb", "{"]
)
def test_the_hint_how_a_mapping_names_a_column_can_be_followed(tmp_path: Path, name: str):
    parts = Mapping(prompt="Q", steps="Why", final_answer="A")
    with pytest.raises(RequestError) as caught:
        check_columns(["Q", "Why", "A", name], parts, "t.csv")
    kept, left_out = re.findall("`(.*?)`", str(caught.value))
    for line in (kept, left_out):
        check_columns(
            ["Q", "Why", "A", name], loaded(tmp_path, f"prompt: Q\nsteps: Why\nfinal_answer: A\n{line}"), "t.csv"
        )


def test_a_completion_and_messages_may_stand_under_any_name():
    by_completion = mapped({"q": "2+2?", "sol": "2 and 2\n#### 4"}, Mapping(prompt="q", completion="sol"))
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "2 and 2\n#### 4"}]
    assert mapped({"chat": turns}, Mapping(messages="chat")) == by_completion
    assert by_completion.steps[0].content == "2 and 2" and by_completion.final_answer == "4"
    ours = {"q": "2+2?", "sol": "Reasoning:\n1. 2 and 2\nAnswer: 4\n\n"}
    assert mapped(ours, Mapping(prompt="q", completion="sol")) == by_completion


def test_ids_and_times_are_taken_where_a_record_has_them():
    mapping = Mapping(prompt="q", completion="a", id="n", created_at="t")
    record = {"q": "2+2?", "a": "x\n#### 4"}
    trace = mapped(record | {"n": 7, "t": "2025-01-01T02:00:00+02:00"}, mapping)
    assert (trace.id, trace.created_at) == ("7", "2025-01-01T00:00:00.000000Z")
    assert len(mapped(record, mapping).id) == 36 and not mapped(record, mapping).created_at
    assert refused(record | {"n": ""}, mapping).startswith("field n: expected str of length >= 1")


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"Q": 1}, "field Q: expected str, got 1"),
        ({"Q": ""}, "field Q: expected str of length >= 1"),
        ({"A": 0.5}, "field A: expected text or an integer (a float has no one spelling), got 0.5"),
        ({"A": True}, "field A: expected str, got true"),
        ({"A": None}, "field A: expected str, got null"),
        ({"Why": {}}, "field Why: expected text, or a list of texts, got an object"),
        ({"Why": ["a", 2]}, "field Why[1]: expected str, got 2"),
        ({"Why": " \n"}, "field Why: expected array of length >= 1"),
        ({"T": float("nan")}, "field T: expected a finite number, got NaN"),
        ({"late": 1}, "field record: expected only fields that the mapping names"),
    ],
)
def test_f02_f03_f04_a_wrong_value_is_refused_under_the_name_of_its_column(change: dict, fault: str):
    assert refused(RECORD | change).startswith(fault)


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"4"', b'"4'),
        (b'"sums"', b"9223372036854775808"),
        (b'{"', b'{"T": 1, "'),
        (b"2+2", rb"\u0000"),
        (b"2+2", b"\xff"),
        (b"2+2", rb"\ud800"),
        (b'"sums"', b"[" * 100_000),
    ],
)
def test_f01_f05_f06_f08_f10_a_mapped_record_is_read_as_strictly_as_a_trace(old: bytes, new: bytes):
    with pytest.raises(InvalidTrace):
        parse_mapped(json.dumps(RECORD).encode().replace(old, new, 1), PARTS)


def test_f07_f11_mapped_lines_are_accounted_for_whatever_their_ends(tmp_path: Path):
    good, bad = json.dumps(RECORD).encode(), json.dumps(RECORD | {"A": 1.5}).encode()
    hashes = set()
    for end in (b"\n", b"\r\n"):
        for start in (b"", b"\xef\xbb\xbf"):
            path, store = tmp_path / "m.jsonl", Store(tmp_path / f"{end[0]}{len(start)}")
            path.write_bytes(start + end.join([good, b"", bad]))
            report = import_files(store, [path], "quarantine", mapping=PARTS)
            assert (report.accepted, report.rejected, report.blank, report.lines) == (1, 1, 1, 3)
            hashes.add(store.content_hash())
    assert len(hashes) == 1


def test_records_of_none_of_the_shapes_are_told_once_a_file_and_pointed_to_a_mapping(tmp_path: Path):
    file = tmp_path / "quiz.jsonl"
    file.write_text('{"Q": "2 + 2?", "Why": "2 and 2", "id": "a"}\n' * 3)
    with pytest.raises(RequestError) as error:
        import_files(Store(tmp_path / "store"), [file])
    first, rest = str(error.value).splitlines()
    assert first.startswith(f"{file}:1: field record: expected ") and first.endswith("got only 'Q, Why, id'")
    assert "give a mapping (--mapping FILE.yaml, see docs/importing.md)" in first and rest.startswith("and 2 more")


def test_fields_that_nothing_is_said_of_are_told_once_a_file(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(RECORD | {"Q": str(n), "a": 1, "b": 2}) for n in range(9)))
    with pytest.raises(RequestError) as caught:
        import_files(Store(tmp_path / "store"), [path], mapping=PARTS)
    first, rest = str(caught.value).split("\n")
    assert "m.jsonl:1: field record" in first and first.endswith("got beside them 'a', 'b'")
    assert rest.startswith("and 8 more bad records; nothing was imported")


def test_every_record_of_an_array_is_mapped(tmp_path: Path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps([RECORD, RECORD | {"A": []}], indent=1))
    kinds = [(type(record), record.line) for record in read_traces(path, PARTS)]
    assert kinds == [(Accepted, 2), (Rejected, 9)]


def test_a_mapping_is_read_from_yaml(tmp_path: Path):
    text = "prompt: Q\nsteps: Why\nfinal_answer: A\nmeta: {topic: T}\nignore: [W]\nsource: quiz\n"
    assert loaded(tmp_path, text) == PARTS == loaded(tmp_path, b"\xef\xbb\xbf" + text.encode())


@pytest.mark.parametrize(
    "text, fault",
    [
        ("promt: Q", "promt"),
        ("prompt: 1\ncompletion: A", "prompt: expected a text, got 1"),
        ("prompt: Q", "expected prompt, steps and final_answer, or prompt and completion, or messages; got prompt"),
        ("ignore: [a]", "got none of them"),
        ("prompt: Q\ncompletion: A\nmessages: M", "got prompt and completion and messages"),
        ("prompt: Q\ncompletion: Q", "expected each column once, got twice: 'Q'"),
        ("messages: M\nignore: [M]", "expected each column once"),
        ("messages: M\nignore: [1]", "expected names of columns, got 1"),
        ("messages: M\nmeta: {a: [b]}", "expected names of columns, got a list"),
        ("messages: M\nmeta: {source: b}\nsource: c", "source: expected nothing beside meta.source"),
        ("messages: M\nmessages: N", "stands twice"),
        ("messages: !!python/name:os.system", "tags"),
        ("- messages", "expected a mapping"),
        ("", "expected a mapping"),
        (b"\xff", "no UTF-8 text"),
        ("messages: " + "x" * 40_000, "at most 32 KiB"),
    ],
)
def test_a_mapping_that_says_no_trace_is_refused(text: str | bytes, fault: str, tmp_path: Path):
    with pytest.raises(RequestError) as caught:
        loaded(tmp_path, text)
    assert f"{tmp_path}/m.yaml" in str(caught.value) and fault in str(caught.value)


def test_a_mapping_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="none.yaml: cannot be read .No such file"):
        load_mapping(tmp_path / "none.yaml")
