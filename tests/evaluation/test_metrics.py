"""pass@k, majority@k and calibration, against their definitions by brute force and toys that can be checked by eye."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from lib.errors import RequestError
from lib.evaluation.metrics import (
    Bin,
    Vote,
    average,
    calibration,
    majority_answer,
    mean_majority_at_k,
    mean_pass_at_k,
    pass_at_k,
)


@pytest.mark.parametrize("n, correct, k", [(5, 0, 3), (5, 5, 1), (5, 2, 1), (6, 2, 3), (8, 3, 8), (8, 1, 5)])
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_correct_one(n, correct, k):
    draws = list(combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_equals_the_product_of_the_paper():
    for n, correct, k in [(200, 13, 100), (200, 1, 10), (50, 7, 43)]:
        paper = 1 - np.prod(1 - k / np.arange(n - correct + 1, n + 1))  # arXiv 2107.03374, figure 3
        assert pass_at_k(n, correct, k) == pytest.approx(paper, abs=1e-9)


def test_pass_at_1_is_accuracy():
    items = [[True, False, False, True], [False] * 4, [True] * 4]
    assert mean_pass_at_k(items, 1).mean == pytest.approx(0.5)


def test_the_majority_wins_and_of_a_tie_the_first():
    assert majority_answer(["a", "b", "b"]) == "b"
    assert majority_answer(["b", "a", "a", "b"]) == "b"
    assert majority_answer([None, None, "a"]) == "a"
    assert majority_answer([None, None]) is None
    assert majority_answer([]) is None


def test_majority_at_k_looks_at_the_first_k():
    right, wrong, none = Vote("7", True), Vote("8", False), Vote(None, False)
    items = [[wrong, right, right], [right, wrong, wrong], [none, none, right], [none, none, none]]
    assert mean_majority_at_k(items, 1).mean == 0.25
    assert mean_majority_at_k(items, 3).mean == 0.5


def test_the_error_of_an_average_equals_scipy():
    values = [0.2, 1.0, 0.4, 0.0, 0.9]
    assert average(values) == pytest.approx((np.mean(values), stats.sem(values), 5), abs=1e-12)
    assert average([0.3]) == (0.3, None, 1)


def test_calibration_by_hand():
    found = calibration([(0.95, True), (0.95, True), (0.95, False), (0.85, True), (0.1, False), (0.0, False)])
    assert found.bins == [
        Bin(0.0, 0.1, 2, pytest.approx(0.05), 0.0),
        Bin(0.8, 0.9, 1, pytest.approx(0.85), 1.0),
        Bin(0.9, 1.0, 3, pytest.approx(0.95), pytest.approx(2 / 3)),
    ]
    assert found.ece == pytest.approx((2 * 0.05 + 1 * 0.15 + 3 * (0.95 - 2 / 3)) / 6)
    assert found.brier == pytest.approx((2 * 0.05**2 + 0.95**2 + 0.15**2 + 0.1**2) / 6)


def test_the_bins_equal_scipys_histogram():
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    rows = calibration([(p, bool(rng.random() < p)) for p in confidence.tolist()], bins=7).bins
    counts, means = (
        stats.binned_statistic(confidence, confidence, kind, bins=7, range=(0, 1)).statistic
        for kind in ("count", "mean")
    )
    assert [row.n for row in rows] == counts.tolist()
    assert [row.confidence for row in rows] == pytest.approx(means.tolist(), abs=1e-9)


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated():
    pairs = [(0.75, i % 4 != 0) for i in range(100)]
    assert calibration(pairs).ece == 0
    assert calibration([(1.0, True)] * 5) == (5, 0, 0, [Bin(0.9, 1.0, 5, 1.0, 1.0)])


@pytest.mark.parametrize("tenth", range(11))
def test_every_tenth_falls_into_the_bin_that_it_closes(tenth):
    [row] = calibration([(tenth / 10, True)]).bins
    assert row.high == max(tenth, 1) / 10


@pytest.mark.parametrize(
    "call",
    [
        lambda: pass_at_k(3, 4, 1),
        lambda: pass_at_k(3, 1, 4),
        lambda: pass_at_k(3, 1, 0),
        lambda: mean_majority_at_k([[Vote("a", True)]], 2),
        lambda: average([]),
        lambda: calibration([]),
        lambda: calibration([(1.2, True)]),
        lambda: calibration([(float("nan"), True)]),
    ],
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(RequestError):
        call()
