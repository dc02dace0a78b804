"""Is the tuned model better? Intervals, the paired test, and the sentence that a report quotes.

Both models answer the same items, so the comparison is paired: only items that changed carry evidence.

    paired = paired_difference(before=[False] * 20, after=[True] * 15 + [False] * 5)
    paired.fixed, paired.broken        # 15, 0
    paired.p_value                     # 6.1e-05: fifteen fair coins, all on one side
    verdict(paired).sentence
    # "Improved: accuracy rose from 0.0 % to 75.0 % on 20 items (+75.0 points, 95 % interval +45.0 to
    #  +91.4; exact McNemar p < 0.0001)."

Sources. Interval of a proportion: E. B. Wilson, "Probable inference, the law of succession, and
statistical inference", Journal of the American Statistical Association 22 (1927), 209-212. Test: Q. McNemar,
"Note on the sampling error of the difference between correlated proportions or percentages", Psychometrika
12 (1947), 153-157, in its exact binomial form. Interval of a paired difference: D. G. Bonett and R. M. Price,
"Adjusted Wald confidence interval for a difference of binomial proportions based on paired data", Journal of
Educational and Behavioral Statistics 37 (2012), 479-488. Why evaluations should be paired: arXiv 2411.00640.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

from lib.errors import RequestError


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    # items that both models were scored on
    n: int
    # accuracy after minus accuracy before, with its interval; shares, not points
    difference: float
    low: float
    high: float
    # wrong before and correct after; correct before and wrong after
    fixed: int
    broken: int
    # two-sided exact McNemar test of "as many fixed as broken"
    p_value: float
    # accuracy of each, and the confidence of the interval
    before: float
    after: float
    confidence: float


class Verdict(NamedTuple):
    word: Literal["improved", "regressed", "no detectable change"]
    sentence: str


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of the proportion `successes / n`: honest near 0 % and 100 %, too."""
    if n < 1 or not 0 <= successes <= n:
        raise RequestError(f"an interval needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z, share = _z(confidence), successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def mcnemar_exact(fixed: int, broken: int) -> float:
    """Two-sided p value of `fixed` against `broken` under a fair coin; 1.0 where nothing changed.

    Summed in whole numbers, so that it is exact for any number of pairs.
    """
    if fixed < 0 or broken < 0:
        raise RequestError(f"fixed and broken are counts, got {fixed} and {broken}")
    changed = fixed + broken
    ways = tail = 1
    for k in range(min(fixed, broken)):
        ways = ways * (changed - k) // (k + 1)  # binomial(changed, k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**changed)


def paired_difference(before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95) -> PairedDifference:
    """Compare two models item by item: `before[i]` and `after[i]` are whether item i was correct.

    An unscored item (None) is refused: it is counted elsewhere and never paired.
    """
    _check_pairs(before, after)
    n, fixed = len(before), sum(now > then for then, now in zip(before, after, strict=True))
    broken = fixed - (sum(after) - sum(before))
    interval = _bonett_price(fixed, broken, n, confidence)
    return PairedDifference(
        n=n,
        difference=(fixed - broken) / n,
        low=interval.low,
        high=interval.high,
        fixed=fixed,
        broken=broken,
        p_value=mcnemar_exact(fixed, broken),
        before=sum(before) / n,
        after=sum(after) / n,
        confidence=confidence,
    )


def verdict(paired: PairedDifference, alpha: float = 0.05, min_effect: float = 0.0) -> Verdict:
    """Improved (or regressed) only where p < alpha and the change is at least `min_effect`, a share."""
    detected = paired.p_value < alpha
    if not detected or abs(paired.difference) < min_effect:
        but = f", smaller than the {100 * min_effect:.1f} points asked for" if detected else ""
        return Verdict(
            "no detectable change",
            f"No detectable change: accuracy {_percent(paired.before)} before, "
            f"{_percent(paired.after)} after on {_items(paired.n)} (difference {_evidence(paired)}{but}).",
        )
    word, moved = ("improved", "rose") if paired.difference > 0 else ("regressed", "fell")
    return Verdict(
        word,
        f"{word.capitalize()}: accuracy {moved} from {_percent(paired.before)} to {_percent(paired.after)} "
        f"on {_items(paired.n)} ({_evidence(paired)}).",
    )


def _check_pairs(before: Sequence[bool], after: Sequence[bool]) -> None:
    if len(before) != len(after):
        raise RequestError(f"a comparison needs the same items twice, got {len(before)} and {len(after)}")
    if not before:
        raise RequestError("a comparison needs at least one item scored before and after, got none")
    if any(value not in (False, True) for value in (*before, *after)):
        raise RequestError("a comparison needs True or False for each item: leave unscored items out, counted")


def _bonett_price(fixed: int, broken: int, n: int, confidence: float) -> Interval:
    """The plain Wald interval has width zero where every pair changes; one pseudo-pair a side cures it."""
    gained, lost = (fixed + 1) / (n + 2), (broken + 1) / (n + 2)
    centre = gained - lost
    half = _z(confidence) * math.sqrt((gained + lost - centre**2) / (n + 2))
    return Interval(max(-1.0, centre - half), min(1.0, centre + half))


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise RequestError(f"confidence must lie between 0 and 1, such as 0.95, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _evidence(paired: PairedDifference) -> str:
    p = "p < 0.0001" if paired.p_value < 0.0001 else f"p = {paired.p_value:.3g}"
    return (
        f"{_points(paired.difference)} points, {100 * paired.confidence:g} % interval "
        f"{_points(paired.low)} to {_points(paired.high)}; exact McNemar {p}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # + 0.0 turns -0.0 into 0.0


def _items(n: int) -> str:
    return "1 item" if n == 1 else f"{n} items"
