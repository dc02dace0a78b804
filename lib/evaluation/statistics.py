"""How much did the model change, and how sure is that? Intervals, the paired test, the bootstrap, Holm's correction.

Both models answer the same items, so the comparison is paired: only items that changed carry evidence.

    paired = paired_difference(before=[False] * 20, after=[True] * 15 + [False] * 5)
    paired.fixed, paired.broken        # 15, 0
    paired.p_value                     # 6.1e-05: fifteen fair coins, all on one side
    paired.low, paired.high            # 0.450, 0.914

Items that share a group (questions on one text, variants of one problem) are no independent evidence:

    paired_difference(before=[False] * 20, after=[True] * 15 + [False] * 5, groups=["a"] * 10 + ["b"] * 10).p_value
    # 1.0: one group changed, and may as well have changed the other way

What is done with groups. Let d_i be the change of item i (+1 fixed, -1 broken, 0 neither), n the items. Two made-up
items, one fixed and one broken, each a group of its own, are added, so that no standard error is 0; then the
standard error is the square root of

    sum over groups of (sum over items of the group of (d_i - mean))²  /  (n + 2)²

which is the cluster-robust one of arXiv 2411.00640 (clustered standard errors, applied to paired differences), without
its n / (n - 1). With groups of one it is exactly the adjusted Wald interval of Bonett and Price. The interval takes
the normal quantile there, and where items share groups Student's t with one degree of freedom less than there are
effective groups, n² / (sum of the squared sizes): all of them where they are of one size, about one where one group
holds nearly all (L. Kish, "Survey Sampling", Wiley 1965).

McNemar's test takes items for independent, and that t test finds no variance where whole groups go one way. So with
groups a change must be found by a third test, too: if nothing changed, each group's fixed minus broken might as well
have had the other sign, and the p value is the share of all ways to choose the signs that give a sum at least as far
from 0 (R. A. Fisher, "The Design of Experiments", Oliver and Boyd 1935, chapter III; E. S. Edgington, "Randomization
Tests", third edition, Marcel Dekker 1995). Under that assumption it is valid for any number of groups and any sizes,
and so is the p value given, the largest of the three. With groups of one it is McNemar's.

All of k groups going one way have p = 2^(1 - k). Where that is no evidence, as for fewer than six groups at 0.05,
nothing can be found, and the intervals are -1 to 1. With a few groups more the interval stays an approximation, and
the p value is the stronger statement: it may say that nothing is found beside an interval that leaves out 0.

Other sources. Interval of a proportion: E. B. Wilson, "Probable inference, the law of succession, and
statistical inference", Journal of the American Statistical Association 22 (1927), 209-212. Test: Q. McNemar,
"Note on the sampling error of the difference between correlated proportions or percentages", Psychometrika
12 (1947), 153-157, in its exact binomial form. Interval of a paired difference: D. G. Bonett and R. M. Price,
"Adjusted Wald confidence interval for a difference of binomial proportions based on paired data", Journal of
Educational and Behavioral Statistics 37 (2012), 479-488. Several tests: S. Holm, "A simple sequentially rejective
multiple test procedure", Scandinavian Journal of Statistics 6 (1979), 65-70.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from lib.errors import RequestError


class Interval(NamedTuple):
    low: float
    high: float


class Cluster(NamedTuple):
    """What counts of one group: fixed minus broken, and how many items it has."""

    change: int
    size: int


@dataclass(frozen=True)
class PairedDifference:
    # items that both models were scored on, and the groups that they fall into: n where no two share one
    n: int
    clusters: int
    # as many groups of one size tell as much: n² / (sum of the squared sizes)
    effective_clusters: float
    # accuracy after minus accuracy before, with its adjusted standard error and interval; shares, not points
    difference: float
    standard_error: float
    low: float
    high: float
    # how much larger the variance is than that of independent items; 1 where no two share a group
    design_effect: float
    # wrong before and correct after; correct before and wrong after
    fixed: int
    broken: int
    # of "no change": two-sided exact McNemar; with groups, the largest of that, the clustered t and the sign flip
    p_value: float
    # accuracy of each, and the confidence of the interval
    before: float
    after: float
    confidence: float

    @property
    def clustered(self) -> bool:
        return self.clusters < self.n


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of the proportion `successes / n`: honest near 0 % and 100 %, too."""
    if n < 1 or not 0 <= successes <= n:
        raise RequestError(f"an interval needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z, share = critical_value(confidence), successes / n
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


def sign_flip(changes: Sequence[int]) -> float:
    """Two-sided p value of the sum of these changes where the sign of each is a fair coin; 1.0 where the sum is 0.

    sign_flip([10, 10, 10])   # 0.25: two of eight ways to choose the signs give a sum of 30 or -30

    The chances of the smaller side's sum are only halved and added: exact for 53 changes, and to ten figures for many
    thousands.
    """
    fewer = min(sum(change for change in changes if change > 0), -sum(change for change in changes if change < 0))
    chances = np.zeros(fewer + 1)  # [fewer + 1], of each sum on that side
    chances[0] = 1
    for size in sorted(abs(change) for change in changes if change):
        chances /= 2
        chances[size:] += chances[:-size].copy()
    return min(1.0, 2 * float(chances.sum()))


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95, groups: Sequence[str] | None = None
) -> PairedDifference:
    """Compare two models item by item: `before[i]` and `after[i]` are whether item i was correct.

    `groups[i]` names the group of item i; an item whose group is "" is one of its own. An unscored item (None) is
    refused: it is counted elsewhere and never paired.
    """
    clusters = _clusters(before, after, groups)
    n, fixed = len(before), sum(now > then for then, now in zip(before, after, strict=True))
    broken = fixed - (sum(after) - sum(before))
    centre, error = (fixed - broken) / (n + 2), _standard_error(clusters)
    p_value, half = mcnemar_exact(fixed, broken), critical_value(confidence) * error
    effective = _effective(clusters)
    if clusters.total() < n:
        flipped = sign_flip([cluster.change for cluster in clusters.elements()])
        p_value = max(p_value, _clustered_p(centre / error, effective), flipped)
        half = critical_value(confidence, clusters.total(), effective) * error
    return PairedDifference(
        n=n,
        clusters=clusters.total(),
        effective_clusters=effective,
        difference=(fixed - broken) / n,
        standard_error=error,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
        design_effect=_design_effect(clusters, fixed + broken),
        fixed=fixed,
        broken=broken,
        p_value=p_value,
        before=sum(before) / n,
        after=sum(after) / n,
        confidence=confidence,
    )


def paired_bootstrap(
    before: Sequence[bool],
    after: Sequence[bool],
    rng: np.random.Generator,
    confidence: float = 0.95,
    groups: Sequence[str] | None = None,
    resamples: int = 10_000,
) -> Interval:
    """Percentile interval of the difference: items are drawn anew with replacement, or whole groups where given.

    It is -1 to 1 where these are too few to be evidence, as what is drawn from so few hardly varies.

    Items (groups) of the same change and size are interchangeable, so only how often each kind is drawn matters:
    three counts a resample instead of n indices. (B. Efron, "Bootstrap methods: another look at the jackknife",
    Annals of Statistics 7 (1979), 1-26.)
    """
    clusters = _clusters(before, after, groups)
    if not enough(clusters.total(), 1 - confidence):
        return Interval(-1.0, 1.0)
    changes, sizes = np.array(list(clusters)).T  # [K], [K]
    shares = np.array(list(clusters.values())) / clusters.total()  # [K]
    drawn = rng.multinomial(clusters.total(), shares, size=resamples)  # [resamples, K]
    differences = (drawn @ changes) / (drawn @ sizes)  # [resamples]
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: below alpha, a finding holds among all of these tests.

    holm([0.01, 0.04, 0.03])   # [0.03, 0.06, 0.06]
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise RequestError(f"p values lie between 0 and 1, got {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


def enough(clusters: float, alpha: float) -> bool:
    """Whether so many groups can be evidence at all: their p value where all go one way is below alpha."""
    return 2.0 ** (1 - clusters) < alpha


def critical_value(confidence: float, clusters: int | None = None, effective: float | None = None) -> float:
    """Standard errors on either side: the normal quantile; with clusters Student's t, of so many effective ones.

    Infinite where the clusters are too few to be evidence.
    """
    if not 0 < confidence < 1:
        raise RequestError(f"confidence must lie between 0 and 1, such as 0.95, got {confidence}")
    if clusters is None:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    from scipy.special import stdtrit  # here, as it takes as long to come up as a fifth of the first notebooks

    degrees = (effective or clusters) - 1
    return float(stdtrit(degrees, (1 + confidence) / 2)) if enough(clusters, 1 - confidence) else math.inf


def _clusters(before: Sequence[bool], after: Sequence[bool], groups: Sequence[str] | None) -> Counter[Cluster]:
    """How many groups there are of each kind: those of the same change and size count alike."""
    _check_pairs(before, after, groups)
    changes = [int(now) - int(then) for then, now in zip(before, after, strict=True)]
    groups = groups or [""] * len(changes)
    alone = Counter(change for change, group in zip(changes, groups, strict=True) if not group)
    found = Counter({Cluster(change, 1): count for change, count in alone.items()})
    shared: dict[str, list[int]] = {}
    for change, group in zip(changes, groups, strict=True):
        if group:
            shared.setdefault(group, []).append(change)
    return found + Counter(Cluster(sum(members), len(members)) for members in shared.values())


def _check_pairs(before: Sequence[bool], after: Sequence[bool], groups: Sequence[str] | None) -> None:
    if len(before) != len(after):
        raise RequestError(f"a comparison needs the same items twice, got {len(before)} and {len(after)}")
    if not before:
        raise RequestError("a comparison needs at least one item scored before and after, got none")
    if any(value not in (False, True) for value in (*before, *after)):
        raise RequestError("a comparison needs True or False for each item: leave unscored items out, counted")
    if groups is not None and len(groups) != len(before):
        raise RequestError(f"a comparison needs a group for each item, got {len(groups)} for {len(before)}")


def _standard_error(clusters: Counter[Cluster]) -> float:
    """Of the mean change, one fixed and one broken item added: the plain one is 0 where every item changes alike."""
    added = clusters + Counter([Cluster(1, 1), Cluster(-1, 1)])
    n = sum(count * size for (_, size), count in added.items())
    mean = sum(count * change for (change, _), count in added.items()) / n
    return math.sqrt(sum(count * (change - size * mean) ** 2 for (change, size), count in added.items())) / n


def _effective(clusters: Counter[Cluster]) -> float:
    """How many groups of one size would tell as much: 100 items in groups of 91, 3, 3 and 3 are 1.2 groups."""
    sizes = [cluster.size for cluster in clusters.elements()]
    return sum(sizes) ** 2 / sum(size**2 for size in sizes)


def _clustered_p(t: float, effective: float) -> float:
    from scipy.special import stdtr

    return float(2 * stdtr(effective - 1, -abs(t))) if effective > 1 else 1.0


def _design_effect(clusters: Counter[Cluster], changed: int) -> float:
    """Variance of the summed change, under "no change", over that of as many independent changes.

    One whole group fixed and one broken are added: where nothing changed, groups count as if their items always
    changed together, the worst that may be; where much changed, the data speak.
    """
    mean_size = sum(count * size for (_, size), count in clusters.items()) / clusters.total()
    summed = sum(count * change**2 for (change, _), count in clusters.items())
    return max(1.0, (summed + 2 * mean_size**2) / (changed + 2 * mean_size))
