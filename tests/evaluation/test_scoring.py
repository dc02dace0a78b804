"""The scorer, proven on itself: the truth scores 100 %, a constant its base rate, and completions judged by hand.

scored_completions.jsonl holds one completion a line with the verdict that the stated rule gives and why. Where a
sceptical human would say otherwise, `why` begins with what the human says; how often that is, is counted here.
"""

import json
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from lib.errors import RequestError
from lib.evaluation.evalsets import EvalItem, load_eval_set
from lib.evaluation.scoring import extract_answer, reasoning_steps, score
from lib.files import repository_root

DUEL = [("QS beats 7H", "win"), ("2C loses to 3D", "lose"), ("9H against 9C", "tie")] * 4
COMPLETIONS = [json.loads(line) for line in (Path(__file__).parent / "scored_completions.jsonl").open(encoding="utf-8")]
EVAL_SETS = sorted((repository_root() / "evalsets").glob("*.jsonl"))

# (what follows "Answer: ", expected, verdict)
JUDGED = [
    # the same text
    ("win", "win", "correct"),
    ("Win", "win", "correct"),
    ("WIN.", "win", "correct"),
    ("**win**", "win", "correct"),
    ("**win**.", "win", "correct"),
    ("`win`", "win", "correct"),
    ('"win"', "win", "correct"),
    ("“win”", "win", "correct"),
    ("  a   win ", "win", "correct"),
    ("lose", "win", "wrong"),
    ("win or lose", "win", "wrong"),
    ("not win", "win", "wrong"),
    ("winner", "win", "wrong"),
    ("The Pacific  Ocean.", "Pacific Ocean | Pacific", "correct"),
    ("pacific", "Pacific Ocean | Pacific", "correct"),
    ("Pacific Ocean | Pacific", "Pacific Ocean | Pacific", "wrong"),
    ("Atlantic Ocean", "Pacific Ocean | Pacific", "wrong"),
    ("an ohm", "ohm | ohms | Ω", "correct"),
    ("Ω", "ohm | ohms | Ω", "correct"),
    ("co2", "carbon dioxide | CO2", "correct"),
    ("(b)", "b", "correct"),
    ("A", "a", "correct"),
    ("b c", "a b c", "wrong"),
    ("A B", "B", "wrong"),
    ("A and B", "B", "wrong"),
    ("a or b", "b", "wrong"),
    ("a 5", "5", "correct"),
    ("The A", "a", "correct"),
    ("STRASSE", "Straße", "correct"),
    ("cafe\u0301", "café", "correct"),
    ("cafe", "café", "wrong"),
    ("?", "?", "correct"),
    ("...", "win", "wrong"),
    # the same number
    ("1,234", "1234", "correct"),
    ("1234", "1,234", "correct"),
    ("1234.0", "1234", "correct"),
    ("12,34", "1234", "wrong"),
    ("1.234", "1234", "wrong"),
    ("+7", "7", "correct"),
    ("-7", "7", "wrong"),
    ("\u22127", "-7", "correct"),
    (".5", "0.5", "correct"),
    (".5", "5", "wrong"),
    ("5.", "5", "correct"),
    ("007", "7", "correct"),
    ("6.02e3", "6020", "correct"),
    ("0", "0", "correct"),
    ("-0", "0", "correct"),
    ("0.0000001", "0", "wrong"),
    ("0.75", "3/4", "correct"),
    ("6/8", "3/4", "correct"),
    ("3 / 4", "0.75", "correct"),
    ("-3/4", "3/4", "wrong"),
    ("3/0", "3/0", "correct"),
    ("3/0", "4/0", "wrong"),
    ("0.333333", "1/3", "correct"),
    ("0.3333", "1/3", "wrong"),
    ("0.33", "1/3", "wrong"),
    ("1000001", "1000000", "wrong"),
    ("12345678", "12345679", "wrong"),
    ("3.1415927", "3.14159265", "correct"),
    ("1 1/2", "1.5", "correct"),
    ("1 3/2", "2.5", "wrong"),
    # units, currency, percent
    ("$8.50", "8.5", "correct"),
    ("-$5", "-5", "correct"),
    ("8.50 €", "8.5", "correct"),
    ("8.50 euros", "8.5", "correct"),
    ("$1,480.00", "1480", "correct"),
    ("12 cm", "12", "correct"),
    ("12cm", "12", "correct"),
    ("12", "12 cm", "correct"),
    ("12 m", "12 cm", "wrong"),
    ("12 apples", "12 apple", "correct"),
    ("**12** apples", "12", "correct"),
    ("68°", "68", "correct"),
    ("77 °F", "77", "correct"),
    ("63 square centimetres", "63", "correct"),
    ("63 cm²", "63", "correct"),
    ("25 m/s", "25", "correct"),
    ("25 km/h", "25 m/s", "wrong"),
    ("75%", "75 percent", "correct"),
    ("75 %", "75%", "correct"),
    ("75%", "0.75", "wrong"),
    ("75", "75%", "wrong"),
    ("75%", "75", "wrong"),
    ("3 million", "3", "wrong"),
    ("2 thirds", "2", "wrong"),
    ("4 pi", "4", "wrong"),
    ("12 or 13", "12", "wrong"),
    ("3 + 4 = 7", "7", "wrong"),
    ("1989", "1989", "correct"),
    ("nan", "inf", "wrong"),
    ("1e99", "1e98", "wrong"),
    ("9" * 6000, "9" * 5999, "wrong"),
]


@pytest.mark.parametrize("answer, expected, verdict", JUDGED)
def test_answers_judged_by_hand(answer, expected, verdict):
    scored = score(f"Reasoning:\n1. Think.\nAnswer: {answer}", expected, truncated=False)
    assert scored.verdict == verdict
    assert scored.value == (verdict == "correct")
    assert scored.answer is not None and scored.explanation


@pytest.mark.parametrize("row", COMPLETIONS, ids=lambda row: row["completion"][-30:])
def test_completions_judged_by_hand(row):
    scored = score(row["completion"], row["expected"], row.get("truncated", False), *how(row))
    assert (scored.verdict, row["why"]) == (row["verdict"], row["why"])
    assert scored.value == {"correct": 1, "wrong": 0}.get(row["verdict"])
    if "answer" in row:
        assert scored.answer == row["answer"]


def how(row):
    return row.get("scorer", ""), row.get("tolerance", 0.0)


def test_where_the_rule_and_a_human_disagree_is_known_and_counted():
    disagreed = Counter((row["why"].split(".")[0], row["verdict"]) for row in COMPLETIONS if "human: " in row["why"])
    print(f"{len(COMPLETIONS)} completions: {dict(disagreed)}")
    assert len(COMPLETIONS) >= 200
    assert disagreed == {
        ("human: correct", "wrong"): 66,
        ("human: correct", "unscored"): 24,
        ("human: correct", "truncated"): 2,
        ("human: wrong", "correct"): 7,
    }


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("Answer: win", "win"),
        ("answer:win", "win"),
        ("  ANSWER:   win  ", "win"),
        ("**Answer:** win", "win"),
        ("**Answer**: win", "win"),
        ("**Answer: win**", "win"),
        ("Answer: **win**", "win"),
        ("Answer: win\r\n", "win"),
        ("Answer: 2**10", "2**10"),
        ("Answer: lose\nNo, wait.\nAnswer: win\nDone.", "win"),
        ("The Answer: win", None),
        ("Answers: win", None),
        ("Answer win", None),
        ("Answer:", None),
        ("Answer: **", None),
        ("Answer: win\nAnswer:", None),
        ("Answer:\nwin", None),
        ("win", None),
        ("", None),
    ],
)
def test_the_answer_is_the_rest_of_the_last_answer_line(completion, answer):
    assert extract_answer(completion) == answer
    if answer is None:
        assert score(completion, "win", truncated=False)[:3] == (None, "unscored", None)


@pytest.mark.parametrize("completion", ["", "Answer: win", "Answer: lose", "Reasoning:\n1. Qu"])
def test_truncated_is_never_right_and_never_wrong(completion):
    assert score(completion, "win", truncated=True)[:3] == (None, "truncated", None)


def items():
    """Both styles of eval set: general questions, and generated game states."""
    general = load_eval_set(repository_root() / "evalsets" / "eval_v1.jsonl").items
    return [(item.prompt, item.expected_answer) for item in general] + DUEL


def test_the_truth_scores_100_percent():
    for prompt, expected in items():
        for alternative in expected.split(" | "):
            assert score(f"Reasoning:\n1. {prompt}\nAnswer: {alternative}", expected, False).value == 1


@pytest.mark.parametrize("constant", ["42", "yes", "Paris", "0", "|", "the answer"])
def test_a_constant_scores_about_nothing(constant):
    values = [score(f"Answer: {constant}", expected, False).value for _, expected in items()]
    assert sum(values) <= 0.02 * len(values)


def eval_items():
    return [(path.stem, item) for path in EVAL_SETS for item in load_eval_set(path).items]


def test_the_truth_scores_100_percent_on_every_eval_set():
    for name, item in eval_items():
        for alternative in item.expected_answer.split(" | "):
            for answer in (alternative, f"**{alternative}**", f"{alternative}.", f"\\boxed{{{alternative}}}"):
                said = f"Reasoning:\n1. {item.prompt}\nAnswer: {answer}"
                assert score(said, item.expected_answer, False, item.scorer, item.tolerance).value == 1, (name, item.id)


@pytest.mark.parametrize("path", EVAL_SETS, ids=lambda path: path.stem)
def test_a_constant_scores_exactly_the_share_of_that_answer(path):
    items = load_eval_set(path).items
    accepted = [[value_of(alternative) for alternative in item.expected_answer.split(" | ")] for item in items]
    expected = Counter(alternative for item in items for alternative in item.expected_answer.split(" | "))
    commonest = {answer for answer, _ in expected.most_common(30)}
    for constant in commonest | {"no such answer", "yes", "-1"}:
        values = [score(f"Answer: {constant}", i.expected_answer, False, i.scorer, i.tolerance).value for i in items]
        assert sum(values) == sum(value_of(constant) in alternatives for alternatives in accepted), constant


def value_of(text):
    """Two items may ask for one number, as 3/8 and as 0.375."""
    try:
        return Fraction(text)
    except ValueError:
        return text.casefold()


def test_each_item_is_scored_as_it_says():
    item = EvalItem("a", "Which colours?", "red, blue", "colours", "easy", scorer="set")
    assert score("Answer: blue and red", item.expected_answer, False, item.scorer, item.tolerance).value == 1
    assert score("Answer: blue and red", item.expected_answer, False).value == 0
    with pytest.raises(RequestError, match="scorer: expected one of .*, got 'regex'"):
        score("Answer: blue", "blue", False, "regex")


def test_repeating_the_question_scores_nothing():
    assert not any(score(f"Answer: {prompt}", expected, False).value for prompt, expected in items())


@pytest.mark.parametrize(
    "completion, steps",
    [
        ("Reasoning:\n1. one\n2. two\nAnswer: x", ["one", "two"]),
        ("**Reasoning:**\n\n1. one\n\n2. two\n\n**Answer:** x", ["one", "two"]),
        ("Reasoning: 1. one\n2. two", ["one", "two"]),
        ("Reasoning:\n1. one\n   and more\n2. two\nAnswer: x", ["one\n   and more", "two"]),
        ("Reasoning:\n1. one\n3. not yet\n2. two\nAnswer: x", ["one\n3. not yet", "two"]),
        ("Reasoning:\n1. 1.5 apples\n2. 2.5 apples\nAnswer: 4", ["1.5 apples", "2.5 apples"]),
        ("Reasoning:\nWell.\n1. one\nAnswer: x", ["one"]),
        ("Reasoning:\n1. one\nAnswer: y\n2. two\nAnswer: x", ["one\nAnswer: y", "two"]),
        ("Reasoning:\r\n1. one\r\n2. two\r\nAnswer: x", ["one", "two"]),
        ("Reasoning:\nno numbers\nAnswer: x", []),
        ("1. one\n2. two\nAnswer: x", []),
        ("Answer: x\nReasoning:\n1. late", []),
        ("", []),
    ],
)
def test_steps_are_the_numbered_lines_in_sequence(completion, steps):
    assert reasoning_steps(completion) == steps


@pytest.mark.parametrize("hostile", [" " * 50_000, "*" * 50_000, "1" * 50_000, "1," * 25_000, "\n" * 50_000])
def test_hostile_text_is_judged_in_linear_time(hostile):
    start = time.process_time()
    for completion in (hostile, f"Reasoning:{hostile}\nAnswer: {hostile}x", f"Answer:\n{hostile}. a"):
        score(completion, "1", False)
        reasoning_steps(completion)
    assert time.process_time() - start < 1  # a tenth at most, whatever else the machine does
