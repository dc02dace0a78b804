"""Beyond one answer an item: pass@k and majority@k over several completions, and calibration of stated confidence.

    pass_at_k(n=10, correct=3, k=5)                 # 0.917: of 5 of the 10 completions, at least one is correct
    majority_answer(["12", "13", None, "13"])       # "13"
    average([1.0, 0.0, 1.0, 1.0])                   # Estimate(mean=0.75, standard_error=0.25, n=4)
    calibration([(0.9, True), (0.8, False), (0.8, True)]).ece

pass@k is the unbiased estimator of arXiv 2107.03374 (section 2.1). majority@k is self-consistency (arXiv 2203.11171):
the answer that most of the first k completions give. Completions without an answer have no vote; of answers that
tie, the one that was given first wins; without any vote the item is not correct.

Calibration. Expected calibration error (arXiv 1706.04599) over ten bins of equal width, (0, 0.1], (0.1, 0.2] …, a
confidence of 0 in the first: the mean over all items of how far their bin's accuracy is from its mean confidence.
Brier score: the mean squared difference of confidence and outcome (G. W. Brier, Monthly Weather Review 78 (1950), 1-3).
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lib.errors import RequestError


class Estimate(NamedTuple):
    """A mean over items; one item alone has no standard error."""

    mean: float
    standard_error: float | None
    n: int


class Vote(NamedTuple):
    """One completion of an item: its answer, None where it has none, and whether that is correct."""

    answer: str | None
    correct: bool


class Bin(NamedTuple):
    """One row of a reliability table: of the items with a confidence in (low, high], how many were correct."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


class Calibration(NamedTuple):
    n: int
    ece: float
    brier: float
    # those that hold an item, lowest first
    bins: list[Bin]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that of k of an item's n completions, drawn without replacement, at least one is correct."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise RequestError(f"pass@k needs 0 <= correct <= n and 1 <= k <= n, got {correct} of {n} and k = {k}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def mean_pass_at_k(items: Sequence[Sequence[bool]], k: int) -> Estimate:
    """pass@k over items; `items[i]` holds whether each completion of item i is correct."""
    return average([pass_at_k(len(item), sum(item), k) for item in items])


def majority_answer(answers: Iterable[str | None]) -> str | None:
    """The most frequent answer, of several the one given first; None where there is none."""
    votes = Counter(answer for answer in answers if answer is not None)  # most_common keeps the order of first votes
    return votes.most_common(1)[0][0] if votes else None


def mean_majority_at_k(items: Sequence[Sequence[Vote]], k: int) -> Estimate:
    """majority@k over items, each of the first k completions having one vote."""
    if k < 1 or any(len(item) < k for item in items):
        raise RequestError(f"majority@k needs at least k completions of each item and k >= 1, got k = {k}")
    return average([float(_majority_is_correct(item[:k])) for item in items])


def average(values: Sequence[float]) -> Estimate:
    """Mean and standard error over items (arXiv 2411.00640, from the central limit theorem)."""
    if not values:
        raise RequestError("an average needs at least one item, got none")
    n, mean = len(values), sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return Estimate(mean, math.sqrt(squares / (n - 1) / n) if n > 1 else None, n)


def calibration(pairs: Sequence[tuple[float, bool]], bins: int = 10) -> Calibration:
    """How far stated confidence is from accuracy, of (confidence, correct) pairs; confidences lie from 0 to 1."""
    if not pairs or bins < 1 or not all(0 <= confidence <= 1 for confidence, _ in pairs):
        raise RequestError("calibration needs (confidence, correct) pairs, each confidence from 0 to 1")
    edges = [i / bins for i in range(bins + 1)]
    filled: dict[int, list[tuple[float, bool]]] = {}
    for confidence, correct in pairs:
        filled.setdefault(max(0, bisect_left(edges, confidence) - 1), []).append((confidence, correct))
    rows = [_bin(edges[i], edges[i + 1], filled[i]) for i in sorted(filled)]
    return Calibration(
        n=len(pairs),
        ece=sum(row.n * abs(row.accuracy - row.confidence) for row in rows) / len(pairs),
        brier=sum((confidence - correct) ** 2 for confidence, correct in pairs) / len(pairs),
        bins=rows,
    )


def _majority_is_correct(votes: Sequence[Vote]) -> bool:
    winner = majority_answer(vote.answer for vote in votes)
    return winner is not None and next(vote.correct for vote in votes if vote.answer == winner)


def _bin(low: float, high: float, pairs: list[tuple[float, bool]]) -> Bin:
    n = len(pairs)
    return Bin(low, high, n, sum(confidence for confidence, _ in pairs) / n, sum(correct for _, correct in pairs) / n)
