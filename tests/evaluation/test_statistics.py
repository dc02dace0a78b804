"""Intervals, tests and the bootstrap: against scipy and statsmodels, by hand, and by simulation.

What only statsmodels has stands in statistics_goldens.json, which make_statistics_goldens.py writes.
"""

import json
import math
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from paired import clustered, compare, pairs
from scipy import stats

from lib.errors import RequestError
from lib.evaluation.statistics import (
    PairedDifference,
    critical_value,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    paired_difference,
    sign_flip,
    wilson_interval,
)

GOLDENS = json.loads((Path(__file__).parent / "statistics_goldens.json").read_text())
COUNTS = [(0, 1), (1, 1), (0, 50), (50, 50), (1, 50), (25, 50), (499, 520), (7, 100_000)]


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


@pytest.mark.parametrize("golden", GOLDENS["wilson"])
def test_wilson_equals_statsmodels(golden):
    found = wilson_interval(golden["successes"], golden["n"], golden["confidence"])
    assert found == pytest.approx(golden["interval"], abs=1e-9)


@pytest.mark.parametrize("golden", GOLDENS["mcnemar"])
def test_mcnemar_equals_statsmodels(golden):
    assert mcnemar_exact(golden["fixed"], golden["broken"]) == pytest.approx(golden["p"], abs=1e-9)


@pytest.mark.parametrize("golden", GOLDENS["holm"])
def test_holm_equals_statsmodels(golden):
    assert holm(golden["p_values"]) == pytest.approx(golden["adjusted"], abs=1e-9)


@pytest.mark.parametrize("golden", GOLDENS["clustered"])
def test_clustered_error_equals_statsmodels(golden):
    # there: least squares of the changes and the two added items on a constant, cov_type "cluster", no correction
    paired = paired_difference(golden["before"], golden["after"], groups=golden["groups"])
    assert paired.clustered and paired.standard_error == pytest.approx(golden["standard_error"], abs=1e-9)
    half = stats.t.ppf(0.975, paired.effective_clusters - 1) * golden["standard_error"]
    assert (paired.low, paired.high) == pytest.approx((golden["mean"] - half, golden["mean"] + half), abs=1e-9)
    t = 2 * stats.t.sf(abs(golden["mean"] / golden["standard_error"]), paired.effective_clusters - 1)
    changes = np.array(golden["after"], int) - np.array(golden["before"], int)
    flipped = sign_flip([changes[np.array(golden["groups"]) == group].sum() for group in set(golden["groups"])])
    assert paired.p_value == pytest.approx(max(t, flipped, mcnemar_exact(paired.fixed, paired.broken)), abs=1e-9)


def test_groups_of_one_are_no_groups():
    before, after = pairs(fixed=9, broken=2, kept=20, missed=9)
    alone = paired_difference(before, after)
    assert paired_difference(before, after, groups=[str(i) for i in range(40)]) == alone
    assert paired_difference(before, after, groups=[""] * 40) == alone
    assert alone.clusters == 40 and not alone.clustered and alone.design_effect == 1


def test_without_groups_the_error_is_bonett_and_prices():
    paired = compare(fixed=7, broken=1, kept=5, missed=5)
    assert paired.standard_error == pytest.approx(math.sqrt(0.41 / 20), abs=1e-12)


def test_items_that_change_together_count_as_one():
    one = paired_difference(*pairs(fixed=9, broken=1, kept=10))
    before, after = ([value for value in side for _ in range(5)] for side in pairs(fixed=9, broken=1, kept=10))
    five = paired_difference(before, after, groups=[str(i // 5) for i in range(100)])
    assert five.clusters == 20 and five.design_effect == pytest.approx(5)
    assert five.p_value > 100 * mcnemar_exact(five.fixed, five.broken)
    assert five.high - five.low > 0.8 * (one.high - one.low)


def moved_as_one(sizes: list[int], signs: list[int]) -> PairedDifference:
    """Groups of these sizes, of each of which all items are fixed (1), broken (-1) or neither (0)."""
    changes = np.repeat(signs, sizes)
    names = [str(i) for i in np.repeat(np.arange(len(sizes)), sizes)]
    return paired_difference((changes == -1).tolist(), (changes == 1).tolist(), groups=names)


@pytest.mark.parametrize(
    "sizes, signs, p",
    [
        ([100] + [1] * 9, [1] + [0] * 9, 1.0),
        ([100, 10, 10, 10, 10], [1, 0, 0, 0, 0], 1.0),
        ([100] * 2, [1] * 2, 0.5),
        ([10] * 3, [1] * 3, 0.25),
        ([25] * 4, [-1] * 4, 0.125),
        ([20] * 6, [1] * 6, 0.03125),
    ],
)
def test_groups_that_move_as_one_are_as_many_coins_and_no_more(sizes, signs, p):
    paired = moved_as_one(sizes, signs)
    assert paired.p_value == p
    assert (p < 0.05) == (paired.low > 0 or paired.high < 0)


@pytest.mark.parametrize("sizes", [[100] * 2, [20] * 3, [25] * 4, [20] * 5, [20] * 6, [100, 10, 10, 10, 10], [5] * 9])
def test_where_every_group_goes_up_or_down_by_chance_no_more_than_alpha_is_found(sizes):
    ways = [moved_as_one(sizes, list(signs)) for signs in product([1, -1], repeat=len(sizes))]
    assert np.mean([paired.p_value < 0.05 for paired in ways]) <= 0.05
    assert np.mean([paired.low <= 0 <= paired.high for paired in ways]) >= 0.95


@pytest.mark.parametrize(
    "changes", [[], [0, 0], [3], [3, -3], [1, 2, 4, -8], [5, 5, 5, -1, 0, 2], [7, -7, 7, -2, 9, 9]]
)
def test_the_sign_flip_counts_every_way_to_choose_the_signs(changes):
    sums = [sum(sign * change for sign, change in zip(signs, changes, strict=True))
            for signs in product([1, -1], repeat=len(changes))]  # fmt: skip
    assert sign_flip(changes) == np.mean([abs(total) >= abs(sum(changes)) for total in sums])


@pytest.mark.parametrize("fixed, broken", [(0, 0), (6, 0), (9, 3), (40, 12), (60, 61), (4200, 3800), (0, 8000)])
def test_the_sign_flip_of_single_items_is_mcnemars(fixed, broken):
    assert sign_flip([1] * fixed + [-1] * broken) == pytest.approx(mcnemar_exact(fixed, broken), rel=1e-10)


def test_a_group_that_holds_most_items_leaves_few_effective_groups():
    assert moved_as_one([5] * 12, [1, -1] * 6).effective_clusters == 12
    uneven = moved_as_one([100] + [1] * 9, [1] + [0] * 9)
    assert uneven.clusters == 10 and uneven.effective_clusters == pytest.approx(109**2 / (100**2 + 9))
    assert (uneven.low, uneven.high) == (-1, 1)


def test_one_group_alone_shows_nothing():
    paired = paired_difference(*pairs(fixed=30), groups=["text"] * 30)
    assert (paired.low, paired.high, paired.p_value) == (-1, 1, 1)


def test_p_below_alpha_means_that_the_clustered_interval_leaves_out_zero():
    rng = np.random.default_rng(5)
    for paired in (clustered(rng, 12, 5, 0.3, 0.1) for _ in range(300)):
        assert (paired.p_value < 0.05) <= (paired.low > 0 or paired.high < 0)


def test_bootstrap_reaches_the_exact_quantiles_of_its_distribution():
    before, after = pairs(fixed=20, broken=8, kept=72)
    # fixed - broken of 100 items drawn from these: the 100-fold convolution of one item's three outcomes
    exact = np.array([1.0])
    for _ in range(100):
        exact = np.convolve(exact, [0.08, 0.72, 0.20])
    low, high = (np.searchsorted(exact.cumsum(), q) / 100 - 1 for q in (0.025, 0.975))
    found = paired_bootstrap(before, after, np.random.default_rng(0), resamples=200_000)
    assert found == pytest.approx((low, high), abs=1e-9)


def test_bootstrap_agrees_with_scipy():
    before, after = pairs(fixed=20, broken=8, kept=72)
    changes = np.array(after, float) - np.array(before, float)
    theirs = stats.bootstrap((changes,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    ours = paired_bootstrap(before, after, np.random.default_rng(1), resamples=20_000)
    assert ours == pytest.approx(tuple(theirs), abs=0.0101)  # one item of the hundred: both lie on that lattice


def test_bootstrap_draws_whole_groups():
    before, after = pairs(fixed=50, broken=50)
    together = paired_bootstrap(before, after, np.random.default_rng(0), groups=["a"] * 50 + ["b"] * 50)
    assert together == (-1, 1)  # of two groups, both may be the same
    assert paired_bootstrap(before, after, np.random.default_rng(0)).high < 0.25


@pytest.mark.parametrize("groups", [1, 3, 5])
def test_bootstrap_of_too_few_groups_leaves_everything_open(groups):
    names = [str(i % groups) for i in range(60)]
    assert paired_bootstrap(*pairs(fixed=45, missed=15), np.random.default_rng(0), groups=names) == (-1, 1)


def test_bootstrap_of_ten_thousand_items_takes_about_a_second():
    before, after = pairs(fixed=3000, broken=2500, kept=4500)
    start = time.process_time()
    paired_bootstrap(before, after, np.random.default_rng(0), resamples=10_000)
    assert time.process_time() - start < 2


def within(covered, of):
    """Between 94 and 96 % of the intervals that should be 95 % ones."""
    print(f"{of}: {100 * covered:.2f} %")
    assert 0.94 <= covered <= 0.96, f"{of}: {100 * covered:.2f} %"


def test_wilson_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    n, share = rng.integers(20, 501, size=20_000), rng.uniform(0.05, 0.95, size=20_000)
    found = [wilson_interval(k, m) for k, m in zip(rng.binomial(n, share).tolist(), n.tolist(), strict=True)]
    covered = np.mean([low <= p <= high for (low, high), p in zip(found, share, strict=True)])
    within(covered, "Wilson, n from 20 to 500, accuracy from 5 to 95 %")


def test_paired_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(7), []
    for _ in range(5000):
        n, gained, lost = rng.integers(100, 301), rng.uniform(0.05, 0.4), rng.uniform(0.02, 0.3)
        fixed, broken, kept = rng.multinomial(n, [gained, lost, 1 - gained - lost]).tolist()
        paired = compare(fixed=fixed, broken=broken, kept=kept)
        covered.append(paired.low <= gained - lost <= paired.high)
    within(np.mean(covered), "paired, n from 100 to 300")


@pytest.mark.parametrize("together", [0.0, 0.6])
def test_clustered_interval_covers_the_truth_as_often_as_it_says(together):
    rng = np.random.default_rng(13)
    found = [clustered(rng, 60, 5, 0.4, together, gain=0.1) for _ in range(2000)]
    within(np.mean([p.low <= 0.1 <= p.high for p in found]), f"clustered, 60 groups of 5, {together:.0%} change alike")


def test_without_its_groups_such_an_interval_covers_too_little():
    rng = np.random.default_rng(13)
    alone = [clustered(rng, 60, 5, 0.4, 0.6, gain=0.1) for _ in range(400)]
    independent = [compare(fixed=p.fixed, broken=p.broken, kept=p.n - p.fixed - p.broken) for p in alone]
    assert np.mean([p.low <= 0.1 <= p.high for p in independent]) < 0.85


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(17), []
    for fixed, broken, kept in rng.multinomial(400, [0.25, 0.15, 0.6], size=2000).tolist():
        low, high = paired_bootstrap(*pairs(fixed=fixed, broken=broken, kept=kept), rng, resamples=1000)
        covered.append(low <= 0.1 <= high)
    within(np.mean(covered), "bootstrap, 400 items")


@pytest.mark.parametrize("p_values", [[], [0.2], [0.01, 0.04, 0.03], [1.0, 1.0], [0.0, 0.5]])
def test_holm_is_never_below_the_p_value_and_keeps_its_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    assert sorted(range(len(adjusted)), key=lambda i: (adjusted[i], p_values[i])) == sorted(
        range(len(p_values)), key=lambda i: p_values[i]
    )


def test_critical_values_are_scipys():
    assert critical_value(0.95) == pytest.approx(stats.norm.ppf(0.975), abs=1e-12)
    assert critical_value(0.99, clusters=8) == pytest.approx(stats.t.ppf(0.995, 7), abs=1e-9)
    assert critical_value(0.95, clusters=7, effective=3.5) == pytest.approx(stats.t.ppf(0.975, 2.5), abs=1e-9)


def test_groups_too_few_to_be_evidence_have_no_critical_value():
    assert critical_value(0.95, clusters=6) < math.inf
    assert critical_value(0.95, clusters=5) == critical_value(0.95, clusters=1) == math.inf
    assert critical_value(0.99, clusters=7) == math.inf


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
        lambda: holm([0.5, 1.5]),
        lambda: holm([float("nan")]),
        lambda: paired_difference([True], [True], groups=["a", "b"]),
    ],
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(RequestError):
        call()
