"""Is the tuned model better? The word and the sentence that a report quotes, and what could have been found.

    paired = paired_difference(before=[False] * 20, after=[True] * 15 + [False] * 5)
    verdict(paired, VerdictConfig()).sentence
    # "Improved: accuracy rose from 0.0 % to 75.0 % on 20 items (+75.0 points, 95 % interval +45.0 to
    #  +91.4; exact McNemar p < 0.0001)."

Four words, by a rule that is set before the run:

improved, regressed    p < alpha, and the change is at least min_effect
no detectable change   neither; and a change of detectable_effect would have given p < alpha with the power asked for
underpowered           neither; and such a change might well have been missed: the items are too few to tell

A change that was detected and is smaller than min_effect is no detectable change of the size asked for: the word is
kept, and the sentence says both.

The smallest change that gives p < alpha with a given power is, with n items and the standard error SE of their
difference,

    the larger of  k SE  and  k² D / n,    k = critical value of alpha + normal quantile of the power

k SE is arXiv 2411.00640, section on power analysis, turned from n to the change. The second stands where hardly
anything changed: then SE tells of too few changes, while a true change of delta alone makes a variance of delta (each
changed item moves by one), so that delta = k sqrt(delta / n). D is the design effect, 1 where no items share a group.
With groups, k is infinite where even all of them going one way is no evidence.

To be found, by this rule, a change must be measured as min_effect or more, too, so that with z, the normal quantile
of the power, the sentence names the largest of those two and

    min_effect + z SE  and  delta = min_effect + z sqrt(D delta / n)

The word takes p < alpha alone: a true change of just min_effect is measured as less half the time, however many the
items, so where detectable_effect is no larger, none could ever be called powered.
"""

import math
from statistics import NormalDist
from typing import Literal, NamedTuple

from lib.config import VerdictConfig
from lib.errors import RequestError
from lib.evaluation.statistics import PairedDifference, critical_value, enough


class Verdict(NamedTuple):
    word: Literal["improved", "regressed", "no detectable change", "underpowered"]
    sentence: str


def verdict(paired: PairedDifference, rule: VerdictConfig) -> Verdict:
    """The rule above; a `min_effect` larger than `detectable_effect` takes its place."""
    detected = paired.p_value < rule.alpha
    if detected and abs(paired.difference) >= rule.min_effect:
        word = "improved" if paired.difference > 0 else "regressed"
        return Verdict(word, f"{word.capitalize()}: {_moved(paired)} ({_evidence(paired)}).")
    powered = minimum_detectable_effect(paired, rule.alpha, rule.power) <= wanted_effect(rule)
    word = "no detectable change" if powered else "underpowered"
    said = (
        f"{word.capitalize()}: accuracy {_percent(paired.before)} before, {_percent(paired.after)} after on "
        f"{_items(paired)} (difference {_evidence(paired)})"
    )
    if detected:
        said = (
            f"{'No change of the size asked for' if powered else 'Underpowered'}: {_moved(paired)} "
            f"({_evidence(paired)}: detected, but smaller than the {100 * rule.min_effect:.1f} points asked for)"
        )
    target = rule.min_effect if powered else wanted_effect(rule)
    return Verdict(word, f"{said}. {could_have_found(paired, rule, smallest_found(paired, rule), target)}")


def wanted_effect(rule: VerdictConfig) -> float:
    """The change, a share, that must have been detectable before none is called none."""
    return max(rule.detectable_effect, rule.min_effect)


def minimum_detectable_effect(paired: PairedDifference, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true change, a share, that gives p < alpha with this power on items like these; at most 1."""
    k = _distance(paired, alpha, power)
    return min(1.0, max(k * paired.standard_error, k * k * paired.design_effect / paired.n))


def smallest_found(paired: PairedDifference, rule: VerdictConfig) -> float:
    """The smallest true change, a share, that the rule calls one with its power: detected, and measured as large."""
    z, each = NormalDist().inv_cdf(rule.power), paired.design_effect / paired.n
    root = (z * math.sqrt(each) + math.sqrt(z * z * each + 4 * rule.min_effect)) / 2  # its square is that delta
    large = max(rule.min_effect + z * paired.standard_error, root**2)
    return min(1.0, max(large, minimum_detectable_effect(paired, rule.alpha, rule.power)))


def items_needed(paired: PairedDifference, effect: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """How many items like these, in groups of the same sizes, tell a true change of `effect`, a share, from none."""
    if not 0 < effect <= 1:
        raise RequestError(f"an effect to find lies above 0 and up to 1, got {effect}")
    if not tells_items_needed(paired, alpha):
        raise RequestError("items of so few groups, or of one that holds most, do not tell how many more are needed")
    k = _distance(paired, alpha, power)
    variance = (paired.n + 2) * paired.standard_error**2
    return math.ceil(max(k * k * variance / effect**2 - 2, k * k * paired.design_effect / effect))


def tells_items_needed(paired: PairedDifference, alpha: float) -> bool:
    """Whether the groups are enough to tell how many more are needed; items that share none always are."""
    return not paired.clustered or enough(paired.effective_clusters, alpha)


def _distance(paired: PairedDifference, alpha: float, power: float) -> float:
    """Standard errors from no change to one that is detected with this power."""
    if not 0.5 <= power < 1:
        raise RequestError(f"power must lie between 0.5 and 1, such as 0.8, got {power}")
    groups = (paired.clusters, paired.effective_clusters) if paired.clustered else ()
    return critical_value(1 - alpha, *groups) + NormalDist().inv_cdf(power)


def could_have_found(paired: PairedDifference, rule: VerdictConfig, findable: float, target: float) -> str:
    """`A change of 3.9 points would have been found with 80 % power; telling 1.0 from none needs about 7,900 items.`"""
    power = f"{100 * rule.power:g} % power"
    said = f"A change of {100 * findable:.1f} points would have been found with {power}"
    if findable == 1:
        said = f"Too few items to be sure with {power} of finding any change"
    told = target and tells_items_needed(paired, rule.alpha)
    needed = items_needed(paired, target, rule.alpha, rule.power) if told else 0
    if needed <= paired.n:
        return f"{said}."
    return f"{said}; telling {100 * target:.1f} from none needs about {_rough(needed):,} items."


def _rough(count: int) -> int:
    """Rounded up to two figures, as what it is computed from is an estimate: 7,812 → 7,900."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return math.ceil(count / unit) * unit


def _evidence(paired: PairedDifference) -> str:
    p = "p < 0.0001" if paired.p_value < 0.0001 else f"p = {paired.p_value:.3g}"
    test = "exact McNemar, clustered t and sign flip, the largest" if paired.clustered else "exact McNemar"
    return (
        f"{_points(paired.difference)} points, {100 * paired.confidence:g} % interval "
        f"{_points(paired.low)} to {_points(paired.high)}; {test} {p}"
    )


def _moved(paired: PairedDifference) -> str:
    moved = "rose" if paired.difference > 0 else "fell"
    return f"accuracy {moved} from {_percent(paired.before)} to {_percent(paired.after)} on {_items(paired)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # + 0.0 turns -0.0 into 0.0


def _items(paired: PairedDifference) -> str:
    items = "1 item" if paired.n == 1 else f"{paired.n} items"
    groups = "1 group" if paired.clusters == 1 else f"{paired.clusters} groups"
    return f"{items} in {groups}" if paired.clustered else items
