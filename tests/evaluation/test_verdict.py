"""The verdict: its words, its sentences, and that what it says could have been found would have been."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from paired import clustered, compare, pairs

from lib.config import VerdictConfig
from lib.errors import RequestError
from lib.evaluation.statistics import mcnemar_exact, paired_difference
from lib.evaluation.verdict import items_needed, minimum_detectable_effect, smallest_found, verdict

GOLDENS = json.loads((Path(__file__).parent / "statistics_goldens.json").read_text())


def word(paired, **rule):
    return verdict(paired, VerdictConfig(**rule)).word


def sentence(paired, **rule):
    return verdict(paired, VerdictConfig(**rule)).sentence


@pytest.mark.parametrize("n, changing", [(20, 0.5), (120, 0.1), (500, 0.3)])
def test_a_model_that_is_no_better_rarely_wins(n, changing):
    draws = np.random.default_rng(11).multinomial(n, [changing / 2, changing / 2, 1 - changing], size=2000)
    words = [word(compare(fixed=f, broken=b, kept=k)) for f, b, k in draws.tolist()]
    assert words.count("improved") + words.count("regressed") <= 0.05 * len(words)


@pytest.mark.parametrize("groups", [8, 40])
def test_a_model_that_is_no_better_rarely_wins_by_groups_that_change_together(groups):
    rng = np.random.default_rng(11)
    words = [word(clustered(rng, groups, 5, 0.4, 0.8)) for _ in range(800)]
    assert words.count("improved") + words.count("regressed") <= 0.06 * len(words)


def test_verdict_needs_both_evidence_and_size():
    improved = compare(fixed=50, broken=10, missed=940)  # 4 points, p about 2e-7
    assert word(improved, min_effect=0.04) == "improved"
    assert word(improved, min_effect=0.05) == "no detectable change"
    assert word(improved, alpha=1e-8, min_effect=0.0) == "underpowered"
    regressed = compare(fixed=10, broken=50, missed=940)
    assert word(regressed, min_effect=0.04) == "regressed"
    assert word(regressed, min_effect=0.05) == "no detectable change"


def test_verdict_at_alpha_itself_is_no_detection():
    paired = compare(fixed=6)
    assert paired.p_value == 0.03125
    assert word(paired, alpha=0.03125) == "underpowered"
    assert word(paired, alpha=0.0313) == "improved"


def test_nothing_changed_is_said_only_where_there_are_enough_items_to_say_it():
    assert word(compare(kept=156)) == "underpowered"
    assert word(compare(kept=157)) == "no detectable change"
    assert word(compare(kept=157), detectable_effect=0.04) == "underpowered"
    assert word(compare(kept=157), power=0.9) == "underpowered"
    assert word(compare(fixed=12, broken=12, kept=133)) == "underpowered"


def test_the_larger_of_the_two_effects_is_the_one_that_items_are_counted_for():
    said = verdict(compare(fixed=3, broken=3, kept=30), VerdictConfig(min_effect=0.2, detectable_effect=0.05)).sentence
    assert "telling 20.0 from none needs about 40 items" in said


def test_items_that_share_groups_are_fewer_than_they_look():
    before, after = pairs(kept=400)
    assert word(paired_difference(before, after)) == "no detectable change"
    assert word(paired_difference(before, after, groups=[str(i // 4) for i in range(400)])) == "underpowered"
    improved = pairs(fixed=12, missed=388)
    assert word(paired_difference(*improved)) == "improved"
    assert word(paired_difference(*improved, groups=[str(i // 4) for i in range(400)])) == "underpowered"


@pytest.mark.parametrize("n, changing", [(157, 0.0), (160, 0.2), (520, 0.05), (520, 0.3), (1000, 0.02)])
def test_what_could_have_been_found_is_found_as_often_as_said(n, changing):
    half = round(n * changing / 2)
    effect = minimum_detectable_effect(compare(fixed=half, broken=half, kept=n - 2 * half))
    changed = max(2 * half / n, effect)
    chances = [(changed + effect) / 2, (changed - effect) / 2, 1 - changed]
    draws = np.random.default_rng(19).multinomial(n, chances, size=3000).tolist()
    found = np.mean([fixed > broken and mcnemar_exact(fixed, broken) < 0.05 for fixed, broken, _ in draws])
    print(f"{n} items: {100 * effect:.1f} points, found in {100 * found:.1f} %")
    assert 0.75 <= found <= 0.85  # the exact test is a little stricter than the normal formula


@pytest.mark.parametrize("n, min_effect", [(1000, 0.01), (20_000, 0.01), (400, 0.05), (400, 0.0)])
def test_what_the_rule_could_have_found_is_called_a_change_as_often_as_said(n, min_effect):
    rule = VerdictConfig(min_effect=min_effect)
    effect = smallest_found(compare(kept=n), rule)
    draws = Counter(np.random.default_rng(29).binomial(n, effect, size=3000).tolist())
    improved = [fixed for fixed in draws if verdict(compare(fixed=fixed, missed=n - fixed), rule).word == "improved"]
    found = sum(draws[fixed] for fixed in improved) / draws.total()
    print(f"{n} items, {min_effect}: {100 * effect:.2f} points, found in {100 * found:.1f} %")
    assert effect > min_effect and 0.75 <= found <= 0.88  # whole items are measured, and the exact test is stricter


@pytest.mark.parametrize("groups, alpha", [(2, 0.05), (5, 0.05), (7, 0.01)])
def test_groups_too_few_to_be_evidence_are_underpowered_whatever_they_did(groups, alpha):
    names = [str(i % groups) for i in range(700)]
    for kinds in ({"fixed": 700}, {"kept": 700}, {"fixed": 100, "broken": 80, "kept": 520}):
        paired = paired_difference(*pairs(**kinds), groups=names)
        assert word(paired, alpha=alpha) == "underpowered" and minimum_detectable_effect(paired, alpha) == 1
        assert sentence(paired, alpha=alpha).endswith("Too few items to be sure with 80 % power of finding any change.")
    enough = paired_difference(*pairs(fixed=700), groups=[str(i % (groups + 6)) for i in range(700)])
    assert word(enough, alpha=alpha) == "improved"


def test_what_could_have_been_found_with_groups_is_found_as_often_as_said():
    rng = np.random.default_rng(23)
    effect = np.median([minimum_detectable_effect(clustered(rng, 80, 5, 0.3, 0.5)) for _ in range(50)])
    found = np.mean([clustered(rng, 80, 5, 0.3, 0.5, gain=effect).p_value < 0.05 for _ in range(600)])
    assert 0.72 <= found <= 0.88


@pytest.mark.parametrize("kinds", [{"kept": 32}, {"kept": 157}, {"fixed": 20, "broken": 18, "kept": 462}])
def test_items_needed_is_the_inverse_of_what_can_be_found(kinds):
    paired = compare(**kinds)
    assert items_needed(paired, minimum_detectable_effect(paired)) == pytest.approx(paired.n, abs=1)
    assert items_needed(paired, 0.01) > items_needed(paired, 0.02) > items_needed(paired, 0.02, alpha=0.2)
    assert items_needed(paired, 0.02, power=0.9) > items_needed(paired, 0.02)


@pytest.mark.parametrize("golden", GOLDENS["items"])
def test_items_needed_equals_statsmodels(golden):
    # the share that changes, evenly both ways, is the variance; the two added pairs are not there
    n = 100_000
    half = round((golden["variance"] * (n + 2) - 2) / 2)
    paired = compare(fixed=half, broken=half, kept=n - 2 * half)
    variance = paired.standard_error**2 * (n + 2)
    needed = items_needed(paired, golden["effect"], golden["alpha"], golden["power"])
    assert needed == pytest.approx(golden["n"] * variance / golden["variance"] - 2, abs=1)


def test_sentences_are_ready_to_quote():
    assert sentence(compare(fixed=516, missed=4)) == (
        "Improved: accuracy rose from 0.0 % to 99.2 % on 520 items (+99.2 points, "
        "95 % interval +97.8 to +99.9; exact McNemar p < 0.0001)."
    )
    assert sentence(compare(broken=15, missed=5)) == (
        "Regressed: accuracy fell from 75.0 % to 0.0 % on 20 items (-75.0 points, "
        "95 % interval -91.4 to -45.0; exact McNemar p < 0.0001)."
    )
    assert sentence(compare(fixed=5, broken=3, kept=257, missed=235)) == (
        "No detectable change: accuracy 52.0 % before, 52.4 % after on 500 items (difference +0.4 points, "
        "95 % interval -0.8 to +1.6; exact McNemar p = 0.727). "
        "A change of 1.8 points would have been found with 80 % power; telling 1.0 from none needs about 1,600 items."
    )
    assert sentence(compare(fixed=2, broken=1, kept=29)) == (
        "Underpowered: accuracy 93.8 % before, 96.9 % after on 32 items (difference +3.1 points, "
        "95 % interval -9.9 to +15.8; exact McNemar p = 1). "
        "A change of 24.5 points would have been found with 80 % power; telling 5.0 from none needs about 460 items."
    )
    assert "-0.0" not in sentence(compare(fixed=1, broken=1, kept=8))


def test_a_change_that_was_detected_is_not_said_to_be_undetectable():
    assert sentence(compare(broken=9, kept=990, missed=1)) == (
        "No change of the size asked for: accuracy fell from 99.9 % to 99.0 % on 1000 items (-0.9 points, "
        "95 % interval -1.5 to -0.3; exact McNemar p = 0.00391: detected, but smaller than the 1.0 points asked for). "
        "A change of 1.3 points would have been found with 80 % power."
    )
    small = verdict(compare(fixed=20, missed=80), VerdictConfig(min_effect=0.21, power=0.999))
    assert small.word == "underpowered"
    assert small.sentence.startswith("Underpowered: accuracy rose from 0.0 % to 20.0 % on 100 items (+20.0 points")
    assert "detected, but smaller than the 21.0 points asked for)" in small.sentence


def test_sentences_of_groups_and_of_very_few_items():
    grouped = paired_difference(*pairs(fixed=2, broken=2, kept=16), groups=[str(i // 2) for i in range(20)])
    assert "on 20 items in 10 groups (" in sentence(grouped)
    assert "exact McNemar, clustered t and sign flip, the largest p = " in sentence(grouped)
    assert sentence(compare(kept=3)).endswith("Too few items to be sure with 80 % power of finding any change; "
                                              "telling 5.0 from none needs about 1,300 items.")  # fmt: skip
    alone = paired_difference(*pairs(kept=40), groups=["text"] * 40)
    assert sentence(alone).endswith("Too few items to be sure with 80 % power of finding any change.")


def test_no_number_of_items_is_named_where_none_more_are_needed():
    assert sentence(compare(fixed=50, broken=50, kept=99_900)).endswith("would have been found with 80 % power.")
    assert sentence(compare(kept=500), min_effect=0.0).endswith("would have been found with 80 % power.")


@pytest.mark.parametrize(
    "call",
    [
        lambda: items_needed(compare(kept=9), 0.0),
        lambda: items_needed(compare(kept=9), 1.1),
        lambda: items_needed(paired_difference(*pairs(kept=9), groups=["text"] * 9), 0.1),
        lambda: items_needed(paired_difference(*pairs(kept=109), groups=["text"] * 100 + [""] * 9), 0.1),
        lambda: minimum_detectable_effect(compare(kept=9), power=1.0),
        lambda: minimum_detectable_effect(compare(kept=9), alpha=0.0),
    ],
)
def test_impossible_questions_are_refused(call):
    with pytest.raises(RequestError):
        call()
