"""Eval sets: what is refused and how, what a sidecar guards, and the set that is published here."""

import json
from collections import Counter

import pytest

from lib.errors import RequestError
from lib.evaluation.evalsets import EvalItem, arithmetic_items, load_eval_set, write_eval_set
from lib.files import repository_root
from lib.tasks import group_keys

GOOD = {"id": "a-1", "prompt": "1 + 1?", "expected_answer": "2", "category": "a", "difficulty": "easy"}
GOOD_LINE = json.dumps(GOOD)
ITEMS = [EvalItem(**GOOD), EvalItem(**GOOD | {"id": "a-2"}, task="sum", state={"x": "1", "y": "1"})]
WHEN = "2026-11-22T00:00:00Z"


def write(path, items=ITEMS):
    return write_eval_set(path, items, "toy", WHEN)


def test_what_is_written_is_read_back(tmp_path):
    written = write(tmp_path / "toy.jsonl")
    assert load_eval_set(tmp_path / "toy.jsonl") == written
    assert written.name == "toy" and list(written.items) == ITEMS
    manifest = json.loads((tmp_path / "toy.manifest.json").read_text())
    assert manifest == {
        "name": "toy",
        "sha256": written.sha256,
        "count": 2,
        "description": "toy",
        "created_at": WHEN,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.jsonl", "toy.manifest.json"]


@pytest.mark.parametrize(
    "bad, names",
    [
        (GOOD_LINE[:-9], ["truncated"]),  # fault 1
        (json.dumps(GOOD | {"id": 7}), ["field id", "expected `str`", "got 7"]),  # fault 2
        (json.dumps(GOOD | {"state": {"x": 1}}), ["field state", "expected `str`", "got {'x': 1}"]),
        (json.dumps(GOOD | {"answer": "2"}), ["field answer", "expected no such field"]),  # fault 3
        (GOOD_LINE.replace('"2"', "NaN"), ["malformed"]),  # fault 4
        (
            GOOD_LINE.replace('"2"', str(2**63)),
            ["field expected_answer", "got 9223372036854775808"],
        ),  # fault 5
        (GOOD_LINE.replace('"2"', "9" * 6000), ["digits"]),
        (GOOD_LINE[:-1] + ', "id": "b"}', ["field id", "expected each key once", "got it twice"]),  # fault 6
        (GOOD_LINE[:-1] + ', "state": {"x": "1", "x": "2"}}', ["field x", "expected each key once"]),
        (GOOD_LINE.replace("1 + 1?", "\\ud800"), ["surrogate"]),  # fault 8
        (GOOD_LINE.replace("1 + 1?", "\\u0000"), ["field prompt"]),
        (GOOD_LINE.replace('"2"', "[" * 100_000), ["recursion"]),  # fault 10
        (
            json.dumps({k: v for k, v in GOOD.items() if k != "id"}),
            ["field id", "expected a value", "got none"],
        ),
        (
            json.dumps(GOOD | {"difficulty": "brutal"}),
            ["field difficulty", "easy|medium|hard", "got 'brutal'"],
        ),
        (json.dumps(GOOD | {"scorer": "regex"}), ["field scorer", "exact|number|set", "got 'regex'"]),
        (json.dumps(GOOD | {"tolerance": -1}), ["field tolerance", ">= 0", "got -1"]),
        (json.dumps(GOOD | {"tolerance": "1"}), ["field tolerance", "expected `float`", "got '1'"]),
        (json.dumps(GOOD | {"group": 1}), ["field group", "expected `str`", "got 1"]),
        (
            json.dumps(GOOD | {"scorer": "number", "expected_answer": "7 | seven"}),
            ["field expected_answer", "expected a number", "'7 | seven'"],
        ),
        (json.dumps(GOOD | {"scorer": "exact", "tolerance": 0.1}), ["field tolerance", "expected none", "got 0.1"]),
        (json.dumps(GOOD | {"task": "arithmetic"}), ["field state, of task arithmetic", "expected numbers"]),
        (json.dumps(GOOD | {"task": "high_card_duel", "state": {"mine": "queen"}}), ["field state, of task"]),
        (json.dumps(GOOD | {"expected_answer": ""}), ["field expected_answer", "length >= 1", "got ''"]),
        (GOOD_LINE, ["field id", "expected an id of its own", "got 'a-1' of line 1"]),
        ("[]", ["expected `object`, got `array`"]),
    ],
)
def test_a_bad_line_is_refused_by_file_line_and_field(tmp_path, bad, names):
    path = tmp_path / "toy.jsonl"
    path.write_text(f"{GOOD_LINE}\n\n{bad}\n")
    with pytest.raises(RequestError) as refused:
        load_eval_set(path)
    assert str(refused.value).startswith(f"{path}:3: ")
    for name in names:
        assert name.lower() in str(refused.value).lower()


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\x89PNG\r\n\x1a\n", b'{"id": "\xff"}'])
def test_f9_an_empty_file_or_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "toy.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=str(path)):
        load_eval_set(path)


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_a_missing_file_is_one_plain_error(tmp_path, name):
    with pytest.raises(RequestError, match="cannot read this eval set"):
        load_eval_set(tmp_path / name)


def test_f7_byte_order_mark_crlf_and_no_final_newline_are_accepted(tmp_path):
    path = tmp_path / "toy.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE.encode() + b"\r\n" + GOOD_LINE.replace("a-1", "a-2").encode())
    assert [item.id for item in load_eval_set(path).items] == ["a-1", "a-2"]


def test_f35_any_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "toy.jsonl"
    write(path)
    content = path.read_bytes()
    for offset in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        with pytest.raises(RequestError, match="toy.jsonl"):
            load_eval_set(path)


def test_f37_an_edited_set_or_manifest_is_refused_as_immutable(tmp_path):
    path, sidecar = tmp_path / "toy.jsonl", tmp_path / "toy.manifest.json"
    write(path)
    for field, value in [("count", 3), ("sha256", "0" * 64), ("name", "other")]:
        manifest = json.loads(sidecar.read_text())
        sidecar.write_text(json.dumps(manifest | {field: value}))
        with pytest.raises(RequestError, match=f"{field} is .*immutable.*new version"):
            load_eval_set(path)
        sidecar.write_text(json.dumps(manifest))
    sidecar.write_text("{}")
    with pytest.raises(RequestError, match="toy.manifest.json"):
        load_eval_set(path)


def test_a_published_set_is_never_replaced(tmp_path):
    path = tmp_path / "toy.jsonl"
    first = write(path)
    assert write(path) == first
    with pytest.raises(RequestError, match="immutable"):
        write(path, ITEMS[:1])
    assert load_eval_set(path) == first


def test_items_that_could_not_be_read_back_are_not_written(tmp_path):
    for items in ([], [ITEMS[0], ITEMS[0]], [EvalItem(**GOOD | {"difficulty": "brutal"})]):
        with pytest.raises(RequestError):
            write(tmp_path / "toy.jsonl", items)
    assert list(tmp_path.iterdir()) == []


def test_eval_v1_is_whole_balanced_and_verified():
    path = repository_root() / "evalsets" / "eval_v1.jsonl"
    items = load_eval_set(path).items
    assert path.with_name("eval_v1.manifest.json").exists()
    categories = "arithmetic geometry knowledge word_problem conversion pattern number_theory probability"
    assert Counter(item.category for item in items) == dict.fromkeys(categories.split(), 15)
    assert Counter(item.difficulty for item in items) == {"easy": 40, "medium": 40, "hard": 40}
    assert len({item.prompt for item in items}) == len(items) == 120
    assert all(item.id.startswith(item.category + "-") for item in items)


def test_arithmetic_v1_is_drawn_again_byte_for_byte(tmp_path):
    path = repository_root() / "evalsets" / "arithmetic_v1.jsonl"
    manifest = json.loads(path.with_name("arithmetic_v1.manifest.json").read_text())
    again = write_eval_set(
        tmp_path / path.name, arithmetic_items(1000, seed=2025), manifest["description"], manifest["created_at"]
    )
    assert (tmp_path / path.name).read_bytes() == path.read_bytes() and again.sha256 == manifest["sha256"]


def test_arithmetic_v1_asks_no_problem_twice_and_expects_what_its_state_gives():
    items = load_eval_set(repository_root() / "evalsets" / "arithmetic_v1.jsonl").items
    keys = [group_keys(item.prompt, item.task, item.state) for item in items]
    assert len(items) == 1000 and len(set().union(*keys)) == sum(map(len, keys)) == 2000
    assert set(Counter(item.category for item in items).values()) == {200}
    for item in items:
        a, operator, b = item.state["a"], item.state["operator"], item.state["b"]
        word = "plus" if operator == "+" else "times"
        assert item.prompt == f"Arithmetic: what is {' '.join(a)} {word} {' '.join(b)}?"
        result = int(a) + int(b) if operator == "+" else int(a) * int(b)
        assert item.expected_answer == " ".join(str(result))
