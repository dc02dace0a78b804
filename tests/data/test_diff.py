"""Two datasets row by row: every trace is the same, changed, removed or added, and nothing is told of it but that."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from lib.data import diff as module
from lib.data.dataset import Dataset
from lib.data.diff import DatasetDiff, Difference, Row, ValueCount, diff_datasets
from lib.tasks import high_card_duel
from lib.trace import Step, Trace, content_sha256, make_trace


class Streamed:
    """Traces that can be read as often as one likes, and are no list."""

    def __init__(self, traces: list[Trace]):
        self._traces = traces

    def __iter__(self) -> Iterator[Trace]:
        return iter(self._traces)


def trace(question: str, answer: str = "1", steps: tuple[str, ...] = ("a",), id: str = "", **meta) -> Trace:
    return make_trace(question, [("step", text) for text in steps], answer, meta, id, "2025-01-01T00:00:00Z")


def dataset(key: str, traces: list[Trace], **changes) -> Dataset:
    manifest = {
        "dataset_key": key, "dataset_name": key, "dataset_version": "v1", "filters": {}, "limit": None, "seed": None,
        "curation": {"unique": False}, "selection_strategy": "latest", "trace_count": len(traces),
        "split": {"train": len(traces), "held_out": 0}, "stats": {"max_step_count": 1},
        "dropped": {}, "lengths": {"min": 1, "mean": 1.0, "p95": 1, "max": 1},
        "provenance": {"sources": {"lab": len(traces)}},
        "content_sha256": "".join(map(content_sha256, traces)),
    }  # fmt: skip
    return Dataset(Path(), manifest | changes, Streamed(traces))


def compared(before: list[Trace], after: list[Trace]) -> DatasetDiff:
    return diff_datasets(dataset("a", before), dataset("b", after))


def counts(diff: DatasetDiff) -> tuple[int, int, int, int]:
    return diff.same, diff.changed, diff.removed, diff.added


def test_each_row_is_the_same_changed_removed_or_added():
    before = [trace("1?"), trace("2?"), trace("3?"), trace("4?")]
    after = [trace("3?"), trace("2?", answer="2"), trace("5?"), trace("6?"), trace("1?")]
    diff = compared(before, after)
    assert counts(diff) == (2, 1, 1, 2) and not diff.reordered
    assert [row.question for row in diff.removed_rows] == ["4?"]
    assert diff.added_rows == [Row(after[2].id, "5?"), Row(after[3].id, "6?")]
    [changed] = diff.changed_rows
    assert (changed.before_id, changed.after_id, changed.by) == (before[1].id, after[1].id, "question")
    assert changed.differences == [Difference("final_answer", "1", "2")]


def test_the_same_content_is_the_same_row_whatever_its_id_and_time():
    again = replace(trace("1?"), id="mine", created_at="2026-01-01T00:00:00Z")
    assert counts(compared([trace("1?")], [again])) == (1, 0, 0, 0)


def test_the_same_traces_in_another_order_are_reordered_and_not_changed():
    traces = [trace(f"{number}?") for number in range(5)]
    assert counts(compared(traces, traces[::-1])) == (5, 0, 0, 0)
    assert compared(traces, traces[::-1]).reordered and not compared(traces, traces).reordered
    assert not compared(traces, traces[:0:-1]).reordered


def test_the_same_id_with_other_content_is_changed_even_where_another_question_is_asked():
    diff = compared([trace("1?", id="x"), trace("2?", id="y")], [trace("2?", id="x", answer="2")])
    assert counts(diff) == (0, 1, 1, 0) and diff.paired_by == {"id": 1}
    assert diff.changed_in == {"prompt and final_answer": 1} and diff.removed_rows == [Row("y", "2?")]


def test_the_same_deal_in_other_words_and_the_same_words_in_other_letters_are_one_question():
    [deal] = high_card_duel.generate(1, seed=3)
    reworded = replace(deal, prompt="What now?", id="other")
    diff = compared([deal, trace("What  is 2 + 2?")], [trace("what is 2 + 2?", answer="4"), reworded])
    assert counts(diff) == (0, 2, 0, 0) and diff.paired_by == {"question": 2}
    assert diff.changed_in == {"prompt": 1, "prompt and final_answer": 1}


def test_of_several_traces_of_one_question_the_first_goes_with_the_first():
    before = [trace("1?", answer=text) for text in "abc"]
    after = [trace("1?", answer=text) for text in "bxyzw"]
    diff = compared(before, after)
    assert counts(diff) == (1, 2, 0, 2)
    assert [row.differences[0][1:] for row in diff.changed_rows] == [("a", "x"), ("c", "y")]
    assert [row.id for row in diff.added_rows] == [after[3].id, after[4].id]


@pytest.mark.parametrize("seed", range(8))
def test_random_datasets_agree_with_a_naive_reference(seed: int):
    drawn = random.Random(seed)
    pool = [trace(f"{q}?", answer=str(a), id=drawn.choice(["", "", f"id-{q}-{a}", "shared"]), kind=a % 2)
            for q in range(6) for a in range(4)]  # fmt: skip
    before, after = (drawn.sample(pool, drawn.randrange(1, 20)) for _ in range(2))
    diff = compared(before, after)
    there, here = list(before), list(after)

    def take(alike) -> int:
        taken = 0
        for one in list(there):
            if other := next((other for other in here if alike(one, other)), None):
                there.remove(one)
                here.remove(other)
                taken += 1
        return taken

    assert diff.same == take(lambda one, other: content_sha256(one) == content_sha256(other))
    by_id = take(lambda one, other: one.id == other.id)
    by_question = take(lambda one, other: one.prompt == other.prompt)
    assert (diff.changed, diff.removed, diff.added) == (by_id + by_question, len(there), len(here))
    assert sum(diff.changed_in.values()) == sum(diff.paired_by.values()) == diff.changed
    for row in diff.values:
        assert (row.before, row.after) == tuple(
            sum(t.meta["kind"] == int(row.value) for t in s) for s in (before, after)
        )
    for name in ("before", "after", "removed", "added", "changed"):
        whole = {"before": len(before), "after": len(after)} | diff._asdict()
        expected = len(before) if name == "before" else len(after) if name == "after" else whole[name]
        assert sum(getattr(row, name) for row in diff.values) == expected


def test_the_fields_that_differ_are_counted_by_row_and_shown_with_reasoning_first():
    before = [trace(f"{n}?", seed=1) for n in range(8)]
    after = [trace(f"{n}?", seed=2) for n in range(6)]
    after += [trace("6?", steps=("b", "c"), seed=1), trace("7?", steps=("b",), answer="2", seed=1)]
    diff = compared(before, after)
    assert diff.changed_in == {"meta": 6, "steps": 1, "steps and final_answer": 1}
    assert [row.question for row in diff.changed_rows] == ["6?", "7?", "0?", "1?", "2?"]
    assert diff.changed_rows[0].differences == [
        Difference("step 1", "step: a", "step: b"), Difference("step 2", None, "step: c"),
    ]  # fmt: skip
    assert diff.changed_rows[2].differences == [Difference("meta.seed", "1", "2")]


def test_the_type_of_a_step_and_a_key_that_is_gone_are_differences():
    one = trace("1?", game="x")
    other = replace(one, steps=(Step(0, "move", "a"),), meta={}, id="")
    [changed] = compared([one], [other]).changed_rows
    assert changed.differences == [
        Difference("step 1", "step: a", "move: a"), Difference("meta.game", '"x"', None),
    ]  # fmt: skip


def test_values_of_meta_are_counted_by_their_type_and_keys_with_many_are_left_out():
    before = [trace(f"{n}?", episode=n, kind=kind) for n, kind in enumerate([1, "1", True, None, [1]] * 4)]
    after = [trace("x?", kind="1"), *before[5:]]
    assert compared(before, after).values == [
        ValueCount("kind", '"1"', 4, 4, 0, 1, 1), ValueCount("kind", "1", 4, 3, 0, 1, 0),
        ValueCount("kind", "true", 4, 3, 0, 1, 0),
    ]  # fmt: skip


def test_no_more_keys_of_meta_are_counted_than_a_table_has_room_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_KEYS", 3)
    traces = [trace(f"{n}?", **{f"key{n}": "x"}) for n in range(9)]
    assert {row.key for row in compared(traces, traces).values} == {"key0", "key1", "key2"}


def test_what_was_asked_for_differently_and_the_figures_of_both_stand_side_by_side():
    traces = [trace("1?")]
    there = dataset("a", traces, limit=5, filters={"game": "x"}, dropped={"over the limit": 3})
    lengths = {"min": 1, "mean": 2.5, "p95": 3, "max": 4}
    here = dataset("b", traces, limit=5, filters={"game": ["x", 1]}, stats={"max_step_count": 9}, lengths=lengths,
                   curation={"unique": True})  # fmt: skip
    diff = diff_datasets(there, here)
    assert sorted(diff.request) == [("curation.unique", False, True), ("filters", {"game": "x"}, {"game": ["x", 1]})]
    assert {name: rest for name, *rest in diff.statistics} == {
        "traces": [1, 1], "train": [1, 1], "held_out": [0, 0], "max_step_count": [1, 9], "source lab": [1, 1],
        "left out: over the limit": [3, None], "tokens, min": [1, 1], "tokens, mean": [1.0, 2.5],
        "tokens, p95": [1, 3], "tokens, max": [1, 4],
    }  # fmt: skip
