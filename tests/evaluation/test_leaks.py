"""Planted leaks of each kind are found with the trace that leaks them, and what is no leak is not."""

import json
import random

import pytest

from lib.config import VerdictConfig
from lib.evaluation.compare import compare, figures
from lib.evaluation.evalsets import EvalItem, load_eval_set
from lib.evaluation.leaks import Leak, audit, audit_all
from lib.evaluation.results import read_results
from lib.experiments.report import markdown
from lib.files import repository_root
from lib.tasks import high_card_duel
from lib.trace import make_trace

ITEMS = [
    EvalItem("sum", "What is 12 + 30?", "42", "arithmetic", "easy"),
    EvalItem("capital", "What is the capital of France?", "Paris", "geography", "easy"),
    EvalItem(
        "train", "A train leaves at 9:40 and arrives at 11:05. How many minutes does it take?", "85", "time", "easy"
    ),
]


def trace(prompt: str, **meta):
    return make_trace(prompt, [("step", "thinking")], "answer", meta)


@pytest.mark.parametrize(
    "prompt, leaked",
    [
        ("What is 12 + 30?", ("sum", "exact", 1.0)),
        ("what is  12 + 30?", ("sum", "same words", 1.0)),
        ("Be brief.\n\nWhat is 12 + 30?", ("sum", "same words", 1.0)),
        ("Tell me: what is the capital of France?", ("capital", "near duplicate", 1.0)),
        ("A train leaves at 9:40 and arrives at 11:05. How long does it take?", ("train", "near duplicate", 0.789)),
    ],
)
def test_f51_a_planted_leak_is_found_and_names_item_and_trace(prompt, leaked):
    planted = trace(prompt)
    item, kind, similarity = leaked
    assert audit([trace("Who wrote Hamlet?"), planted], ITEMS) == [Leak(item, kind, planted.id, similarity)]


def test_several_eval_sets_are_audited_in_one_reading_of_the_traces():
    traces = [trace("What is 12 + 30?"), trace("what is the capital of France?"), trace("Who wrote Hamlet?")]
    sets = {
        "sums": ITEMS[:1],
        "all": ITEMS,
        "none": [],
        "other": [EvalItem("other", ITEMS[0].prompt, "42", "sums", "easy")],
    }
    assert audit_all(iter(traces), sets) == {name: audit(traces, items) for name, items in sets.items()}
    assert [leak.item for leak in audit_all(iter(traces), sets)["all"]] == ["sum", "capital"]


@pytest.mark.parametrize(
    "prompt",
    [
        "What is 12 - 30?",
        "What is 12 + 31?",
        "What is the capital of Spain?",
        "A train leaves at 9:40 and arrives at 11:15. How many minutes does it take?",
        "Which city is it that France is governed from?",
        "?",
    ],
)
def test_another_question_is_no_leak_however_alike(prompt):
    assert audit([trace(prompt)], ITEMS) == []


def test_f51_the_same_deal_under_other_words_is_found():
    eval_set = load_eval_set(repository_root() / "evalsets" / "high_card_duel_v1.jsonl")
    item = eval_set.items[7]
    planted = trace("Two cards lie here. Who wins?", game=high_card_duel.NAME, state=item.state)
    assert audit([planted], eval_set.items) == [Leak(item.id, "same state", planted.id, 1.0)]


def test_a_question_of_a_known_task_is_found_among_other_words_where_the_trace_has_no_state():
    items = load_eval_set(repository_root() / "evalsets" / "high_card_duel_v1.jsonl").items
    around = [trace(f"Please play along. {item.prompt} Think in 2 steps.") for item in items[:40]]
    found = [(leak.item, leak.kind, leak.trace) for leak in audit(around, items)]
    assert found == [(items[n].id, "near duplicate", one.id) for n, one in enumerate(around)]
    others = {found.prompt for found in high_card_duel.generate(300, seed=5)} - {item.prompt for item in items}
    assert audit([trace(prompt) for prompt in sorted(others)], items) == []


def test_a_question_without_blanks_between_its_words_is_found_among_others():
    item = EvalItem("capital", "法国的首都是哪座城市?", "巴黎", "geography", "easy")
    planted = trace("请回答这个问题:法国的首都是哪座城市?")
    assert audit([trace("法国的总统是谁?"), planted], [item]) == [Leak("capital", "near duplicate", planted.id, 1.0)]


def test_f51_recall_and_precision_on_planted_leaks(capsys):
    """100 traces of which 40 leak, ten of each kind, against the 120 general questions and the 520 deals."""
    folder, draw = repository_root() / "evalsets", random.Random(0)
    general = list(load_eval_set(folder / "eval_v1.jsonl").items)
    deals = list(load_eval_set(folder / "high_card_duel_v1.jsonl").items)
    long = [item for item in general if len(item.prompt.split()) >= 6]
    chosen = draw.sample(long, 30)
    planted = [(trace(item.prompt), item) for item in chosen[:10]]
    planted += [(trace(f"  {item.prompt.upper()} "), item) for item in chosen[10:20]]
    planted += [(trace(f"Here is a question for you. {item.prompt} Think first."), item) for item in chosen[20:]]
    planted += [
        (trace(f"Deal {n}: who wins?", game=high_card_duel.NAME, state=item.state), item)
        for n, item in enumerate(draw.sample(deals, 10))
    ]
    known = {tuple(sorted(item.state.items())) for item in deals}
    others = [
        found
        for found in high_card_duel.generate(200, seed=5)
        if tuple(sorted(found.meta["state"].items())) not in known
    ]
    found = {
        (leak.item, leak.trace) for leak in audit([leaked for leaked, _ in planted] + others[:60], general + deals)
    }
    true = {(item.id, leaked.id) for leaked, item in planted}
    recall, precision = len(found & true) / len(true), len(found & true) / len(found)
    with capsys.disabled():
        print(f"\nleak audit: {len(true)} planted, recall {recall:.3f}, precision {precision:.3f}")
    assert recall == precision == 1, found ^ true


def test_f51_the_verdict_and_the_figures_carry_the_warning(tmp_path):
    lines = []
    for name, text in (("before", "4"), ("after", "42")):
        record = {
            "trace_version": "1.0", "prompt": ITEMS[0].prompt,
            "completion": f"Answer: {text}", "final_answer": text, "num_tokens": 3, "logprob": -0.5,
            "verdict": "correct" if text == "42" else "wrong",
            "meta": {"model": name, "weights_sha256": name, "eval_set": "toy", "eval_set_sha256": "s", "eval_id": "sum",
                     "category": "arithmetic", "expected_answer": "42", "decoding": {}, "sample": 0},
        }  # fmt: skip
        (tmp_path / name).write_text(json.dumps(record) + "\n")
        lines.append(read_results(tmp_path / name))
    planted = trace("What is 12 + 30?")
    comparison = compare(*lines, VerdictConfig())
    assert "Warning" not in comparison.headline and "Not looked for" in markdown(comparison)
    leaking = comparison._replace(leaks=audit([planted], ITEMS[:1]))
    warning = "Warning: the training data asks 1 of the 1 items, too."
    assert leaking.headline.endswith(warning) and figures(leaking)["sentence"].endswith(warning)
    assert f"| sum | exact | {planted.id} |" in markdown(leaking)
    assert "No item is asked in the training data." in markdown(comparison._replace(leaks=[]))
