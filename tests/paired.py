"""Two models on the same items, as toys: so many items fixed, broken, kept and missed, and groups drawn at random."""

import numpy as np

from lib.evaluation.statistics import PairedDifference, paired_difference


def pairs(fixed: int = 0, broken: int = 0, kept: int = 0, missed: int = 0) -> tuple[list[bool], list[bool]]:
    """`before` and `after` with so many items of each kind."""
    before = [False] * fixed + [True] * broken + [True] * kept + [False] * missed
    after = [True] * fixed + [False] * broken + [True] * kept + [False] * missed
    return before, after


def compare(**kinds: int) -> PairedDifference:
    return paired_difference(*pairs(**kinds))


def clustered(
    rng: np.random.Generator, groups: int, size: int, changing: float, together: float, gain: float = 0.0
) -> PairedDifference:
    """Groups whose items all change alike with probability `together`, each item for itself otherwise."""
    chances = [changing / 2 + gain / 2, changing / 2 - gain / 2, 1 - changing]
    alike = rng.random(groups)[:, None] < together
    changes = np.where(
        alike,
        rng.choice([1, -1, 0], p=chances, size=(groups, 1)),
        rng.choice([1, -1, 0], p=chances, size=(groups, size)),
    ).ravel()
    names = [str(i) for i in np.repeat(np.arange(groups), size)]
    return paired_difference((changes == -1).tolist(), (changes == 1).tolist(), groups=names)
