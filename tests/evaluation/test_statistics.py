"""Intervals and the paired test, against scipy, by hand, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from lib.errors import RequestError
from lib.evaluation.statistics import mcnemar_exact, paired_difference, verdict, wilson_interval

COUNTS = [(0, 1), (1, 1), (0, 50), (50, 50), (1, 50), (25, 50), (499, 520), (7, 100_000)]


def pairs(fixed=0, broken=0, kept=0, missed=0):
    """`before` and `after` with so many items of each kind."""
    before = [False] * fixed + [True] * broken + [True] * kept + [False] * missed
    after = [True] * fixed + [False] * broken + [True] * kept + [False] * missed
    return before, after


def compare(**kinds):
    return paired_difference(*pairs(**kinds))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("successes, n", COUNTS)
def test_wilson_equals_scipy(successes, n, confidence):
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx(tuple(expected), abs=1e-9)


@pytest.mark.parametrize("fixed, broken", [(0, 1), (1, 0), (5, 5), (3, 9), (9, 3), (40, 12), (516, 0), (60, 61)])
def test_mcnemar_equals_scipy(fixed, broken):
    expected = stats.binomtest(fixed, fixed + broken).pvalue
    assert mcnemar_exact(fixed, broken) == pytest.approx(expected, abs=1e-9)


def test_mcnemar_without_change_is_one():
    assert mcnemar_exact(0, 0) == 1.0


def test_mcnemar_stays_exact_for_thousands_of_pairs():
    expected = stats.binomtest(4200, 8000).pvalue
    assert mcnemar_exact(4200, 3800) == pytest.approx(expected, rel=1e-9)
    assert 0 <= mcnemar_exact(8000, 0) < 1e-300


def test_bonett_price_by_hand():
    # n = 18, fixed 7, broken 1: p12 = 8/20, p21 = 2/20, half width 1.96 * sqrt((0.5 - 0.09) / 20)
    paired = compare(fixed=7, broken=1, kept=5, missed=5)
    half = 1.959963984540054 * math.sqrt(0.41 / 20)
    assert (paired.n, paired.fixed, paired.broken) == (18, 7, 1)
    assert paired.difference == pytest.approx(6 / 18)
    assert (paired.low, paired.high) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-12)
    assert (paired.before, paired.after) == pytest.approx((6 / 18, 12 / 18))


def test_interval_does_not_collapse_when_every_pair_changes():
    paired = compare(fixed=100)
    assert paired.low < 0.98 and paired.high == 1.0


def test_swapping_before_and_after_mirrors_everything():
    before, after = pairs(fixed=9, broken=2, kept=20, missed=9)
    there, back = paired_difference(before, after), paired_difference(after, before)
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert there.p_value == back.p_value


@pytest.mark.parametrize("n, gained, lost", [(30, 0.30, 0.10), (100, 0.10, 0.10), (100, 0.60, 0.05), (300, 0.08, 0.03)])
def test_interval_covers_the_truth_about_as_often_as_it_says(n, gained, lost):
    draws = np.random.default_rng(7).multinomial(n, [gained, lost, 1 - gained - lost], size=2000)
    paired = [compare(fixed=fixed, broken=broken, kept=kept) for fixed, broken, kept in draws]
    covered = np.mean([p.low <= gained - lost <= p.high for p in paired])
    assert 0.93 <= covered <= 0.975


@pytest.mark.parametrize("n, share", [(40, 0.1), (60, 0.5), (250, 0.83)])
def test_wilson_covers_the_truth_about_as_often_as_it_says(n, share):
    intervals = [wilson_interval(int(k), n) for k in np.random.default_rng(3).binomial(n, share, size=4000)]
    covered = np.mean([low <= share <= high for low, high in intervals])
    assert 0.93 <= covered <= 0.975


@pytest.mark.parametrize("n, changing", [(20, 0.5), (120, 0.1), (500, 0.3)])
def test_a_model_that_is_no_better_rarely_wins(n, changing):
    draws = np.random.default_rng(11).multinomial(n, [changing / 2, changing / 2, 1 - changing], size=2000)
    words = [verdict(compare(fixed=f, broken=b, kept=k), alpha=0.05).word for f, b, k in draws]
    assert words.count("improved") + words.count("regressed") <= 0.05 * len(words)


def test_verdict_needs_both_evidence_and_size():
    improved = compare(fixed=50, broken=10, missed=940)  # 4 points, p about 2e-7
    assert verdict(improved, alpha=0.05, min_effect=0.04).word == "improved"
    assert verdict(improved, alpha=0.05, min_effect=0.05).word == "no detectable change"
    assert verdict(improved, alpha=1e-9, min_effect=0.0).word == "no detectable change"
    regressed = compare(fixed=10, broken=50, missed=940)
    assert verdict(regressed, alpha=0.05, min_effect=0.04).word == "regressed"
    assert verdict(regressed, alpha=0.05, min_effect=0.05).word == "no detectable change"


def test_verdict_at_alpha_itself_is_no_detection():
    paired = compare(fixed=6)
    assert paired.p_value == 0.03125
    assert verdict(paired, alpha=0.03125).word == "no detectable change"
    assert verdict(paired, alpha=0.0313).word == "improved"


def test_sentences_are_ready_to_quote():
    assert verdict(compare(fixed=516, missed=4)).sentence == (
        "Improved: accuracy rose from 0.0 % to 99.2 % on 520 items (+99.2 points, "
        "95 % interval +97.8 to +99.9; exact McNemar p < 0.0001)."
    )
    assert verdict(compare(broken=15, missed=5)).sentence == (
        "Regressed: accuracy fell from 75.0 % to 0.0 % on 20 items (-75.0 points, "
        "95 % interval -91.4 to -45.0; exact McNemar p < 0.0001)."
    )
    assert verdict(compare(fixed=5, broken=3, kept=257, missed=235)).sentence == (
        "No detectable change: accuracy 52.0 % before, 52.4 % after on 500 items (difference +0.4 points, "
        "95 % interval -0.8 to +1.6; exact McNemar p = 0.727)."
    )
    assert "p = 0.0312, smaller than the 50.0 points asked for)" in (
        verdict(compare(fixed=6, missed=94), min_effect=0.5).sentence
    )
    assert "-0.0" not in verdict(compare(fixed=1, broken=1, kept=8)).sentence


@pytest.mark.parametrize(
    "before, after, names",
    [([], [], "at least one"), ([True], [True, False], "same items"), ([None], [True], "unscored")],
)
def test_pairs_that_cannot_be_compared_are_refused(before, after, names):
    with pytest.raises(RequestError, match=names):
        paired_difference(before, after)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(0, 0),
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(-1, 2),
        lambda: wilson_interval(1, 2, confidence=1.0),
        lambda: wilson_interval(1, 2, confidence=95),
        lambda: mcnemar_exact(-1, 2),
    ],
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(RequestError):
        call()
