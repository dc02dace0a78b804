"""Before against after, from evaluation outputs written by hand: the counts, the lists, and what is refused."""

import json
from itertools import product
from pathlib import Path

import pytest

from lib.config import VerdictConfig
from lib.data.renderer import render_response
from lib.errors import RequestError
from lib.evaluation.compare import Comparison, compare, control, doubt, figures
from lib.evaluation.results import read_results, summarise
from lib.experiments.report import markdown, metrics
from lib.tasks import high_card_duel

DEAL = high_card_duel.deal(0)
TRUE_STEPS = [content for _, content in high_card_duel.steps(DEAL)]
RIGHT = render_response(TRUE_STEPS, DEAL.result)
WRONG_STEP = RIGHT.replace(TRUE_STEPS[3], "Unseen cards: 1 lower, 2 equal, 48 higher.")
NO_STEPS = f"Answer: {DEAL.result}"


def item(number: int, verdict: str, completion: str = RIGHT, category: str = "easy", **changed: object) -> dict:
    """One line of an evaluation output; what is in `changed` stands in its `meta` instead."""
    meta = {
        "source": "evaluation", "model": "toy (base)", "weights_sha256": "a" * 64, "eval_set": "toy_v1",
        "eval_set_sha256": "b" * 64, "eval_id": f"toy-{number}", "category": category,
        "expected_answer": DEAL.result, "task": high_card_duel.NAME, "state": high_card_duel.state_of(DEAL),
        "decoding": {"max_new_tokens": 9}, "sample": 0,
    }  # fmt: skip
    return {
        "trace_version": "1.0", "prompt": high_card_duel.question(DEAL), "steps": [], "final_answer": DEAL.result,
        "meta": meta | changed, "completion": completion, "score": None, "verdict": verdict, "num_tokens": 9,
        "logprob": -0.5,
    }  # fmt: skip


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def compared(tmp_path: Path, before: list[dict], after: list[dict]) -> Comparison:
    first, second = write(tmp_path / "before.jsonl", before), write(tmp_path / "after.jsonl", after)
    return compare(read_results(first), read_results(second), VerdictConfig())


def items(*verdicts: str) -> list[dict]:
    """One item a verdict, each with an expected answer of its own, so that no constant answer is worth anything."""
    return [item(number, verdict, expected_answer=f"{number}") for number, verdict in enumerate(verdicts)]


def test_each_verdict_is_counted_and_only_correct_counts_as_accurate(tmp_path):
    found = compared(
        tmp_path,
        items("correct", "wrong", "unscored", "truncated", "truncated"),
        items("correct", "correct", "correct", "wrong", "unscored"),
    )
    assert found.before_summary.counts == {"correct": 1, "wrong": 1, "unscored": 1, "truncated": 2}
    assert found.after_summary.counts == {"correct": 3, "wrong": 1, "unscored": 1, "truncated": 0}
    assert (found.before_summary.accuracy, found.after_summary.accuracy) == (1 / 5, 3 / 5)
    assert found.paired.n == 5 and (found.paired.before, found.paired.after) == (1 / 5, 3 / 5)


def test_fixed_and_broken_are_the_pairs_that_changed_and_nothing_else(tmp_path):
    found = compared(
        tmp_path,
        items("correct", "correct", "wrong", "truncated", "wrong"),
        items("correct", "unscored", "correct", "correct", "unscored"),
    )
    assert [(b.id, b.verdict, a.verdict) for b, a in found.broken] == [("toy-1", "correct", "unscored")]
    assert [(b.id, b.verdict) for b, _ in found.fixed] == [("toy-2", "wrong"), ("toy-3", "truncated")]
    assert (found.paired.fixed, found.paired.broken) == (2, 1)


def test_a_right_answer_with_a_wrong_step_is_counted_and_shown_with_its_first_wrong_step(tmp_path):
    after = [item(0, "correct"), item(1, "correct", WRONG_STEP), item(2, "wrong", WRONG_STEP), item(3, "wrong")]
    found = compared(tmp_path, items("wrong", "wrong", "wrong", "wrong"), after)
    assert found.after_summary.right_answer_wrong_reasoning == 1
    assert found.after_summary.wrong_answer_right_reasoning == 1
    assert (found.after_summary.checked, found.after_summary.sound) == (4, 2)
    assert [result.id for result in found.unsound] == ["toy-1"]
    truth = high_card_duel.truth(DEAL)["unseen"]["lower"]
    assert found.unsound[0].first_error == f"step 4 (unseen): says lower 1, the engine says {truth}"
    assert found.after_summary.errors == {("unseen", "false"): 2} and found.after_summary.first_errors == {4: 2}
    assert (found.after_summary.true_steps, found.after_summary.steps) == (18, 20)


def test_the_headline_says_that_correct_answers_rest_on_wrong_reasoning(tmp_path):
    lucky = [item(0, "correct", completion=WRONG_STEP), item(1, "correct")]
    found = compared(tmp_path, items("wrong", "wrong"), [*lucky])
    assert found.headline == f"{found.verdict.sentence} But 1 of 2 correct answers rest on wrong reasoning."
    sound = compared(tmp_path, items("correct"), items("correct"))
    assert sound.headline == sound.verdict.sentence


def test_missing_steps_are_wrong_steps(tmp_path):
    found = compared(tmp_path, items("wrong"), [item(0, "correct", render_response(TRUE_STEPS[:2], DEAL.result))])
    assert found.unsound[0].first_error == "step 3 (opponent_card): the step is missing"
    assert found.after_summary.errors == {(kind, "missing"): 1 for kind in ("comparison", "opponent_card", "unseen")}
    assert (found.after_summary.true_steps, found.after_summary.steps) == (2, 5)


def test_an_answer_without_reasoning_is_counted_apart_and_is_no_wrong_reasoning(tmp_path):
    found = compared(tmp_path, items("wrong", "wrong"), [item(0, "correct", NO_STEPS), item(1, "correct")])
    assert (found.after_summary.no_reasoning, found.after_summary.right_answer_wrong_reasoning) == (1, 0)
    assert (found.after_summary.checked, found.after_summary.sound) == (2, 1)
    assert found.unsound == [] and found.after_summary.errors == {} and found.after_summary.steps == 5


def test_only_a_wrong_answer_counts_as_wrong_beside_right_reasoning(tmp_path):
    """Truncated and unscored are not wrong."""
    found = compared(tmp_path, items("wrong", "truncated", "unscored"), items("wrong", "truncated", "unscored"))
    assert found.after_summary.sound == 3 and found.after_summary.wrong_answer_right_reasoning == 1


def test_a_model_without_reasoning_is_not_praised_for_its_steps(tmp_path):
    silent = [item(number, "correct", completion=NO_STEPS) for number in range(3)]
    text = markdown(compared(tmp_path, silent, silent))
    assert "wrote no reasoning, so there is none to check" in text and "is true" not in text


def test_steps_of_an_unknown_task_are_not_checked_and_not_called_sound(tmp_path):
    unknown = [item(0, "correct", task="", state={}), item(1, "wrong", task="")]
    found = compared(tmp_path, unknown, unknown)
    assert found.after_summary.checked == found.after_summary.sound == 0
    assert found.after_summary.sound_interval is None and found.unsound == []
    assert found.after_summary.right_answer_wrong_reasoning == 0


def answered(number: int, *steps: str) -> dict:
    """An item of gsm_symbolic, correct with these steps."""
    completion = render_response(list(steps), "8") if steps else NO_STEPS
    return item(number, "correct", completion, task="reasoning_gym", state={"generator": "gsm_symbolic"})


def test_no_item_of_gsm_symbolic_vanishes_where_nothing_of_it_can_be_checked(tmp_path):
    after = [answered(0, "That is 5 + 3 = 8."), answered(1, "There are eight."), answered(2), answered(3)]
    found = compared(tmp_path, items(*["wrong"] * 4), after)
    summary = found.after_summary
    assert (summary.checkable, summary.sound, summary.words_only, summary.no_reasoning) == (4, 1, 1, 2)
    assert "Every step that could be checked is true: 1 of them, in 1 of 4." in markdown(found)
    assert dict(row[::2] for row in metrics(found))["every step true"].value == 1 / 4
    words = [answered(number, "There are eight.") for number in range(4)]
    assert "No step that the tuned model wrote could be checked." in markdown(compared(tmp_path, words, words))


def test_steps_of_gsm_symbolic_are_their_equations_and_words_count_neither_way(tmp_path):
    after = [
        answered(0, "Let T be the balls.", "That is 5 + 3 = 8."),
        answered(1, "Let T be the balls.", "That is 5 + 2 = 8."),
        answered(2, "Let T be the balls.", "There are eight."),
    ]
    found = compared(tmp_path, items("wrong", "wrong", "wrong"), after).after_summary
    assert (found.checked, found.sound, found.right_answer_wrong_reasoning) == (2, 1, 1)
    assert (found.true_steps, found.steps, found.first_errors) == (1, 2, {2: 1})
    assert found.errors == {("equation", "false"): 1}


def test_identical_before_and_after_is_no_detectable_change(tmp_path):
    same = items(*["correct", "wrong", "unscored", "truncated"] * 40)
    found = compared(tmp_path, same, same)
    assert found.verdict.word == "no detectable change" and found.verdict.sentence.startswith("No detectable change")
    assert found.fixed == found.broken == [] and found.paired.p_value == 1.0
    assert figures(found)["difference"] == 0


@pytest.mark.parametrize("before, after, word", [("wrong", "correct", "improved"), ("correct", "wrong", "regressed")])
def test_a_change_of_every_item_is_called_by_its_direction(tmp_path, before, after, word):
    found = compared(tmp_path, items(*[before] * 12), items(*[after] * 12))
    assert found.verdict.word == figures(found)["verdict"] == word


def test_a_rule_that_asks_for_more_than_there_is_finds_no_change(tmp_path):
    before, after = items(*["wrong"] * 30), items(*["correct"] * 12, *["wrong"] * 18)
    results = [read_results(write(tmp_path / "r.jsonl", records)) for records in (before, after)]
    assert compare(*results, VerdictConfig()).verdict.word == "improved"
    assert compare(*results, VerdictConfig(min_effect=0.5)).verdict.word == "no detectable change"
    assert compare(*results, VerdictConfig(alpha=0.0001)).verdict.word == "underpowered"


def test_items_of_one_group_count_as_one(tmp_path):
    before = [item(number, "wrong", group=f"text-{number // 6}") for number in range(12)]
    after = [item(number, "correct", group=f"text-{number // 6}") for number in range(12)]
    found = compared(tmp_path, before, after)
    assert found.paired.clusters == 2 and found.verdict.word == "underpowered"
    assert found.outlook.items_needed is None and found.outlook.detectable_effect == 1
    assert compared(tmp_path, items(*["wrong"] * 12), items(*["correct"] * 12)).verdict.word == "improved"


def test_categories_hold_every_item_once(tmp_path):
    before = [item(0, "wrong", category="b"), item(1, "correct", category="a"), item(2, "wrong", category="b")]
    after = [item(0, "correct", category="b"), item(1, "wrong", category="a"), item(2, "wrong", category="b")]
    rows = compared(tmp_path, before, after).categories
    assert [(row.name, row.before.n, row.before.accuracy, row.after.accuracy) for row in rows] == [
        ("a", 1, 1, 0),
        ("b", 2, 0, 0.5),
    ]


def test_the_figures_are_plain_json_and_tell_the_comparison(tmp_path):
    found = compared(tmp_path, items("wrong", "correct"), [item(0, "correct", WRONG_STEP), item(1, "wrong")])
    told = json.loads(json.dumps(figures(found), allow_nan=False))
    assert told["n"] == 2 and told["fixed"] == told["broken"] == 1 and told["p_value"] == 1.0
    assert told["after"]["right_answer_wrong_reasoning"] == 1 and told["after"]["wrong"] == 1
    assert told["sentence"] == found.headline and told["eval_set"] == "toy_v1"
    assert told["after"]["results"]["toy_v1"]["exact_match,none"] == 0.5  # as lm-evaluation-harness writes it


@pytest.mark.parametrize(
    "n, word, said",
    [
        (40, "underpowered", "Underpowered to tell it from a constant answer"),
        (400, "no detectable change", "No detectable change beyond a constant answer"),
    ],
)
def test_a_gain_that_a_constant_answer_has_too_is_no_improvement(tmp_path, n, word, said):
    """Three quarters of the items expect `win`, and that is what the tuned model always says."""
    expected = ["win"] * (3 * n // 4) + ["loss"] * (n // 4)
    before = [item(number, "wrong", expected_answer=answer) for number, answer in enumerate(expected)]
    verdicts = ["correct" if answer == "win" else "wrong" for answer in expected]
    after = [
        item(number, verdict, expected_answer=answer)
        for number, (answer, verdict) in enumerate(zip(expected, verdicts, strict=True))
    ]
    found = compared(tmp_path, before, after)
    assert found.paired.p_value < 1e-6 and found.verdict.word == word
    assert found.headline.startswith(said) and "always answering 'win' gets 75.0 %" in found.headline
    better = [item(number, "correct", expected_answer=answer) for number, answer in enumerate(expected)]
    assert compared(tmp_path, before, better).verdict.word == "improved"


@pytest.mark.parametrize(
    "spellings, scorer, tolerance",
    [
        (["Yes", "yes"], "", 0.0),
        (["12", "12.0"], "", 0.0),
        (["yes | true", "yes"], "", 0.0),
        (["a, b", "b, a"], "set", 0.0),
        (["9.9", "10"], "number", 0.2),
    ],
)
def test_a_constant_answer_counts_wherever_the_scorer_takes_it(tmp_path, spellings, scorer, tolerance):
    """Thirty-five items each way of writing what the tuned model always says, and thirty of something else."""
    expected = spellings[:1] * 35 + spellings[1:] * 35 + ["no"] * 30
    about = [{"expected_answer": text, "scorer": scorer, "tolerance": tolerance} for text in expected]
    before = [item(number, "wrong", **meta) for number, meta in enumerate(about)]
    after = [item(number, "correct" if number < 70 else "wrong", **meta) for number, meta in enumerate(about)]
    found = compared(tmp_path, before, after)
    assert (found.constant.paired.before, found.constant.paired.after, found.constant.beaten) == (0.7, 0.7, False)


@pytest.mark.parametrize("said", ["50.4", "50.447"])
def test_a_constant_within_the_tolerance_of_most_items_is_found_though_no_expected_text_comes_twice(tmp_path, said):
    """Ten items far off, and ninety from 50.00 to 50.89 that what the tuned model always says is within 5 of."""
    expected = [f"{1000 * number}" for number in range(1, 11)] + [f"{50 + number / 100:.2f}" for number in range(90)]
    about = [{"expected_answer": text, "scorer": "number", "tolerance": 5.0} for text in expected]
    before = [item(number, "wrong", **meta) for number, meta in enumerate(about)]
    after = [item(number, "wrong" if number < 10 else "correct", **meta) for number, meta in enumerate(about)]
    found = compared(tmp_path, before, [record | {"final_answer": said} for record in after])
    assert (found.constant.paired.before, found.constant.beaten, found.verdict.word) == (0.9, False, "underpowered")
    assert compared(tmp_path, before, after).constant.paired.before == 0.9  # whatever the model says


def test_what_the_tuned_model_always_says_is_tried_though_other_answers_are_expected_oftener(tmp_path):
    """Twelve answers are expected thrice each, and eight items take yes, each in a spelling of its own."""
    spelled = ["".join(letters) for letters in product("yY", "eE", "sS")]
    expected = [f"{number // 3}" for number in range(36)] + [
        f"{number}? | {spelled[number % 8]}" for number in range(8)
    ]
    before = [item(number, "wrong", expected_answer=text) for number, text in enumerate(expected)]
    after = [
        item(number, "correct" if number >= 36 else "wrong", expected_answer=text) | {"final_answer": "yes"}
        for number, text in enumerate(expected)
    ]
    found = compared(tmp_path, before, after).constant
    assert (found.answer, found.paired.before, found.beaten) == ("yes", 8 / 44, False)


def test_a_control_counts_texts_that_differ_and_scores_that_change(tmp_path):
    answers = items(*["correct"] * 30)
    again = [*items(*["correct"] * 9), item(9, "wrong", NO_STEPS, expected_answer="9")]
    first, second = (read_results(write(tmp_path / "r.jsonl", records)) for records in (answers, again))
    found = control(first, second, VerdictConfig())
    assert (found.paired.n, found.same_text, found.paired.broken, found.word) == (10, 9, 1, "")
    broken = read_results(write(tmp_path / "r.jsonl", items(*["wrong"] * 10)))
    failed = control(first, broken, VerdictConfig())
    assert failed.word == "regressed"
    comparison = compare(first, first, VerdictConfig())._replace(controls=[found, failed])
    assert comparison.headline.count("Warning: toy (base) against itself is regressed") == 1
    assert "| 9 of 10 | 0 | 1 | nothing |" in markdown(comparison)


def test_the_answer_of_several_samples_is_the_one_that_most_give(tmp_path):
    def samples(number: int, *answers: tuple[str, str]) -> list[dict]:
        found = [item(number, verdict, sample=place) for place, (_, verdict) in enumerate(answers)]
        return [
            record | {"final_answer": answer, "completion": f"{place}. Answer: {answer}"}
            for place, (record, (answer, _)) in enumerate(zip(found, answers, strict=True))
        ]

    three = [
        *samples(0, ("loss", "wrong"), ("win", "correct"), ("Win.", "correct")),
        *samples(1, ("win", "correct"), ("loss", "wrong"), ("loss", "wrong")),
        *samples(2, ("?", "unscored"), ("?", "unscored"), ("win", "correct")),
    ]
    found = read_results(write(tmp_path / "r.jsonl", three))
    assert [(one.verdict, one.completion[0]) for one in found.items] == [
        ("correct", "1"),
        ("wrong", "1"),
        ("correct", "2"),
    ]
    summary = summarise(found.items, VerdictConfig())
    assert (summary.n, summary.samples, summary.accuracy) == (3, 3, 2 / 3)
    assert summary.majority.mean == summary.accuracy
    assert summary.pass_at_1.mean == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3) and summary.pass_at_all.mean == 1
    with pytest.raises(RequestError, match="sample 2 of item toy-1 is not the next one"):
        read_results(write(tmp_path / "r.jsonl", [*three[:4], three[5]]))


@pytest.mark.parametrize(
    "scorer, answers, winner",
    [
        ("", ["12", "13", "13", "12.0", "12 apples"], "12"),
        ("number", ["1/2", "0.5", "one", "one", "one"], "one"),
        ("set", ["red, blue", "green", "green", "blue and red", "{red; blue}"], "red, blue"),
        ("exact", ["12", "13", "13", "12.0", "12 apples"], "13"),
        ("reasoning_gym", ["12", "13", "13", "12.0", "12 apples"], "13"),
    ],
)
def test_answers_vote_together_that_the_scorer_takes_for_the_same(scorer, answers, winner, tmp_path):
    samples = [
        item(0, "wrong", sample=place, **({"scorer": scorer} if scorer else {})) | {"final_answer": answer}
        for place, answer in enumerate(answers)
    ]
    [voted] = read_results(write(tmp_path / "r.jsonl", samples)).items
    assert voted.answer == winner


def test_items_of_one_group_are_one_cluster(tmp_path):
    def grouped(verdict: str) -> list[dict]:
        return [item(n, verdict, expected_answer=f"{n}", group=f"text {n // 10}") for n in range(40)]

    found = compared(tmp_path, grouped("wrong"), grouped("correct"))
    assert (found.paired.n, found.paired.clusters) == (40, 4) and "in 4 groups" in found.headline


def test_answers_that_were_decoded_differently_are_not_compared(tmp_path):
    other = [record | {"meta": record["meta"] | {"decoding": {"max_new_tokens": 8}}} for record in items("correct")]
    with pytest.raises(RequestError, match="decoded differently: max_new_tokens 9 and 8"):
        compared(tmp_path, items("correct"), other)


@pytest.mark.parametrize(
    "after",
    [
        [item(0, "correct")],
        [item(1, "correct"), item(0, "correct")],
        [item(0, "correct"), item(7, "correct")],
        [item(n, "correct", eval_set_sha256="c" * 64) for n in (0, 1)],
    ],
    ids=["fewer items", "another order", "other items", "another eval set"],
)
def test_other_items_or_another_eval_set_are_refused(tmp_path, after):
    with pytest.raises(RequestError, match="answered different items.*same eval set"):
        compared(tmp_path, items("correct", "correct"), after)


DAMAGED = {
    "cut": json.dumps(item(1, "wrong"))[:-20],
    "blank": "",
    "a list": "[]",
    "a trace without score": json.dumps({key: value for key, value in item(1, "wrong").items() if key != "verdict"}),
    "an unknown verdict": json.dumps(item(1, "brilliant")),
    "a completion that is no text": json.dumps(item(1, "wrong") | {"completion": 7}),
    "a prompt that is no text": json.dumps(item(1, "wrong") | {"prompt": ["x"]}),
    "a category that is no text": json.dumps(item(1, "wrong", category=None)),
    "meta that is no object": json.dumps(item(1, "wrong") | {"meta": "x"}),
    "a model that is no text": json.dumps(item(1, "wrong", model={})),
    "a state of no deal": json.dumps(item(1, "wrong", state={"my_card": "QS", "opponent_card": "QS"})),
    "no state": json.dumps(item(1, "wrong", state=None)),
    "deep nesting": "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_f1_f2_a_damaged_line_is_named_by_file_and_number(tmp_path, line):
    path = tmp_path / "after.jsonl"
    path.write_text(json.dumps(item(0, "wrong")) + f"\n{line}\n" + json.dumps(item(2, "wrong")) + "\n")
    with pytest.raises(RequestError) as refused:
        read_results(path)
    assert str(refused.value).startswith(f"{path}:2: not a line of an evaluation output")
    assert "\n" not in str(refused.value)


def test_f8_f9_a_file_that_is_no_evaluation_output_is_refused(tmp_path):
    for content in (b"", b"\xff\n", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(RequestError, match="x.jsonl"):
            read_results(tmp_path / "x.jsonl")
    for missing in ("absent.jsonl", "."):
        with pytest.raises(RequestError, match=str(tmp_path / missing)):
            read_results(tmp_path / missing)


def test_answers_of_two_models_in_one_file_are_refused(tmp_path):
    mixed = write(tmp_path / "mixed.jsonl", [item(0, "wrong"), item(1, "wrong", weights_sha256="c" * 64)])
    with pytest.raises(RequestError, match="one model to one eval set, got 2"):
        read_results(mixed)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r"])
def test_a_completion_may_hold_any_line_separator_of_unicode(tmp_path, separator):
    text = f"Answer: a{separator}b"
    results = read_results(write(tmp_path / "r.jsonl", [item(0, "wrong", text), item(1, "wrong")]))
    assert [result.completion for result in results.items] == [text, RIGHT]


@pytest.mark.parametrize(
    "recorded, said",
    [
        ({"weights_sha256": "c" * 64, "tuned_from": "a" * 64}, ""),
        ({"weights_sha256": "c" * 64, "tuned_from": "d" * 64}, "tuned from other weights (dddddddddddddddd)"),
        ({"weights_sha256": "c" * 64}, "is not recorded"),
        ({}, "the same weights"),
    ],
)
def test_what_was_not_tuned_from_the_base_that_it_is_held_against_is_said_in_the_headline(recorded, said, tmp_path):
    before = read_results(write(tmp_path / "b.jsonl", [item(0, "wrong")]))
    after = read_results(write(tmp_path / "a.jsonl", [item(0, "correct", **recorded)]))
    found = doubt(before, after)
    assert said in found and bool(said) == bool(found)
    comparison = compare(before, after, VerdictConfig())._replace(doubt=found)
    assert ("Warning: " in comparison.headline) == bool(said) and found in comparison.headline
