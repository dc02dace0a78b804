"""Which trial of a sweep is called the best, and what is said of having picked it."""

import json
import re
from html import unescape
from itertools import combinations
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from hostile import PAYLOADS
from inert import static_problems
from markdown_it import MarkdownIt

from lib.config import load_config
from lib.evaluation.results import ItemResult, Results
from lib.evaluation.statistics import holm, mcnemar_exact, wilson_interval
from lib.experiments.stages import command
from lib.experiments.sweep_report import Found, Report, as_json, compare_trials, markdown, write_report
from lib.experiments.trials import SweepConfig, Trial

CONFIG = load_config("configs/smoke.yaml")


def answers(correct: list[int], n: int, eval_set: str = "e") -> Results:
    """Of n items, those with these numbers correct."""
    items = [
        ItemResult(str(i), "q", "a", "", "", "", "", "correct" if i in correct else "wrong", [], [], 1, -0.1)
        for i in range(n)
    ]
    return Results("tiny", "w", eval_set, eval_set, {}, items)


def report_on(tmp_path: Path, *trials: Results | None, key: str = "training.seed", **given) -> Report:
    """Trial i has the value i; None is one that failed."""
    found = []
    for number, results in enumerate(trials, 1):
        manifest = {
            "wall_s": {"03_train": 2.0},
            "fingerprint": {"nproc": "2", "cpu": given.get("cpu", {}).get(number, "x")},
            "metrics": {
                "evaluation": {
                    "before": {"accuracy": 0.0},
                    "constant": {"accuracy": 0.5, "beaten": number not in given.get("constant", [])},
                },
                "weights_sha256": f"w{number}",
            },
        }
        status, error = ("done", "") if results else ("failed", given.get("error", "03_train: it broke"))
        trial = Trial(number, f"toy-0-{number}", {key: given.get("value", number)}, CONFIG)
        found.append(Found(trial, f"run_{number}", status, error, manifest if results else {}, results))
    return compare_trials(tmp_path, SweepConfig("toy", "configs/smoke.yaml", {}), found, {"NPROC": "2"})


def test_one_that_beats_all_others_is_the_best_with_an_interval_for_all_together(tmp_path):
    report = report_on(tmp_path, answers([], 40), answers(list(range(30)), 40), answers([0, 1], 40))
    assert report.best.trial.number == 2 and report.tests == 3
    low, high = wilson_interval(30, 40, 1 - 0.05 / 3)
    assert report.headline.startswith(
        f"seed=2 has the highest accuracy: 75.0 % of 40 items ({100 * low:.1f} to {100 * high:.1f}, an interval that "
        "holds for all 3 trials together, as the best was picked by these very items). It is detectably better than "
        "each other trial (Holm over all 3 pairs, p < 0.0001)."
    )
    assert "the best of several is so by luck, too" in report.headline
    assert [pair.other.trial.number for pair in report.pairs] == [3, 1] and all(pair.better for pair in report.pairs)


def test_the_pairs_are_adjusted_for_all_that_there_are(tmp_path):
    sets = [set(range(12)), set(range(5)), set(range(3, 9)), set()]
    report = report_on(tmp_path, *(answers(list(one), 40) for one in sets))
    p_values = [mcnemar_exact(len(one - other), len(other - one)) for one, other in combinations(sets, 2)]
    expected = holm(p_values)  # the first three are those of the best
    assert [pair.p_value for pair in sorted(report.pairs, key=lambda pair: pair.other.trial.number)] == expected[:3]


def test_a_difference_that_one_test_would_find_is_lost_among_many(tmp_path):
    """Six fixed and none broken: p = 0.03 alone, and no finding where it is the best of ten."""
    alone = report_on(tmp_path, answers([], 40), answers(list(range(6)), 40))
    assert "It is detectably better than the other trial (exact McNemar, p = 0.0312)" in alone.headline
    many = report_on(tmp_path, *[answers([], 40)] * 9, answers(list(range(6)), 40))
    assert many.best.trial.number == 10
    assert "No trial is detectably better than another (Holm over all 45 pairs, smallest p = 1)." in many.headline


def test_some_beaten_is_said_so(tmp_path):
    report = report_on(tmp_path, answers([], 40), answers(list(range(20)), 40), answers(list(range(19)), 40))
    assert "It is detectably better than 1 of the 2 others (Holm over all 3 pairs), and not than the rest." in (
        report.headline
    )


def test_of_equals_the_first_is_shown_and_the_others_counted(tmp_path):
    report = report_on(tmp_path, answers([1], 40), answers([2], 40), answers([3], 40), answers([], 40))
    assert report.best.trial.number == 1
    assert report.headline.startswith("seed=1 has the highest accuracy, as have 2 others: 2.5 %")
    report = report_on(tmp_path, answers([1], 40), answers([2], 40))
    assert report.headline.startswith("Both trials have the same accuracy: 2.5 % of 40 items")


def test_a_best_that_a_constant_answer_equals_is_said_so(tmp_path):
    sides = answers([], 40), answers(list(range(20)), 40)
    said = "It is not detectably better than always giving one and the same answer, which is correct for 50.0 %."
    assert said in report_on(tmp_path, *sides, constant=[2]).headline
    assert said not in report_on(tmp_path, *sides, constant=[1]).headline


def test_a_failed_trial_is_left_out_and_said_so(home, tmp_path):
    report = report_on(tmp_path, answers([1], 40), None, answers([1, 2], 40))
    assert report.headline.endswith("1 of 3 trials is not done, and left out.") and report.tests == 1
    write_report(report)
    page = (tmp_path / "sweep.html").read_text()
    assert f"<code>{command('resume', tmp_path.name)}</code>" in page and f"--home {home}" in page
    assert "1 of 3 trials not done" in page and "03_train: it broke" in page
    assert as_json(report)["trials"][1]["score"] is None


def test_nothing_is_called_the_best_where_there_is_nothing_to_compare(tmp_path):
    assert report_on(tmp_path, None, None).headline == "2 of 2 trials are not done, and left out."
    assert "One trial is done, with 2.5 %, so there is nothing to compare." in (
        report_on(tmp_path, answers([1], 40), None).headline
    )
    other = report_on(tmp_path, answers([1], 40), answers([1], 40, "other"))
    assert other.best is None and other.headline.startswith("The trials answered different items")


def test_runs_of_different_fingerprints_are_said_to_be_so(tmp_path):
    told = markdown(report_on(tmp_path, answers([1], 40), answers([2], 40)))
    assert "All runs have one fingerprint" in told
    told = markdown(report_on(tmp_path, answers([1], 40), answers([2], 40), cpu={2: "y"}))
    assert "different fingerprints (cpu: x, y)" in told


def test_page_markdown_and_json_hold_the_same(tmp_path):
    report = report_on(tmp_path, answers([], 40), answers(list(range(30)), 40), None)
    write_report(report)
    page, told = unescape((tmp_path / "sweep.html").read_text()), json.loads((tmp_path / "sweep.json").read_bytes())
    assert told["headline"] == report.headline and told["best"] == 2
    assert re.sub(r"\\(.)", r"\1", markdown(report)).count(report.headline) == 1 and report.headline in page
    for one in report.scored:
        assert f"../../{one.run}/report.html" in page and f"{one.score.correct} of 40" in page
    assert page.count("<svg") == 1 and page.index("What differs") < page.index("Accuracy of each trial")
    assert static_problems(tmp_path / "sweep.html") == []


def test_trials_whose_labels_are_cut_are_told_apart_by_their_number_in_the_table(tmp_path):
    report = report_on(tmp_path, answers([1], 9), answers([2, 3], 9), key="x" * 50)
    write_report(report)
    soup = BeautifulSoup((tmp_path / "sweep.html").read_text(), "html.parser")
    drawn = [text.get_text() for text in soup.select("svg text") if "xxx" in text.get_text()]
    listed = [row.get_text() for row in soup.select('table tbody th[scope="row"]')]
    assert [label.partition(":")[0] for label in drawn] == ["2", "1"] == listed[:2] and len(set(drawn)) == 2


def test_a_sweep_of_many_trials_draws_the_highest_and_lists_all(tmp_path):
    report = report_on(tmp_path, *(answers(list(range(i % 30)), 40) for i in range(60)))
    write_report(report)
    page = (tmp_path / "sweep.html").read_text()
    assert "The 40 highest of 60." in page and page.count("report.html") == 60


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")
def test_hostile_text_is_inert_on_the_page_and_in_the_markdown(tmp_path):
    every = "\n".join(PAYLOADS.values())
    report = report_on(tmp_path, answers([], 9), answers([1], 9), None, key=every, error=every)
    hostile = report._replace(
        varied={every: list(PAYLOADS.values())}, settings={"NPROC": every}, apart={every: [every]}
    )
    write_report(hostile)
    assert static_problems(tmp_path / "sweep.html") == []
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown(hostile))
    assert {child.type for token in tokens for child in token.children or []} <= {
        "text", "softbreak", "strong_open", "strong_close"
    }  # fmt: skip
