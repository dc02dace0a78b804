"""Writes statistics_goldens.json: values of statsmodels, which the tests themselves do not need.

python -m venv env && env/bin/pip install statsmodels==0.15.0
env/bin/python tests/evaluation/make_statistics_goldens.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import statsmodels.api as sm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import normal_sample_size_one_tail
from statsmodels.stats.proportion import proportion_confint

RNG = np.random.default_rng(2024)


def wilson(successes: int, n: int, confidence: float) -> dict:
    interval = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    return {"successes": successes, "n": n, "confidence": confidence, "interval": [float(end) for end in interval]}


def exact(fixed: int, broken: int) -> dict:
    return {"fixed": fixed, "broken": broken, "p": float(mcnemar([[0, fixed], [broken, 0]], exact=True).pvalue)}


def holm(p_values: list[float]) -> dict:
    return {"p_values": p_values, "adjusted": multipletests(p_values, method="holm")[1].tolist()}


def clustered(sizes: list[int], together: float) -> dict:
    """Groups of these sizes; the changes and one fixed and one broken item added, each a group of its own."""
    changes, groups = [], []
    for number, size in enumerate(sizes):
        alike = RNG.random() < together
        drawn = RNG.choice([1, -1, 0], p=[0.4, 0.1, 0.5], size=1 if alike else size).tolist()
        changes += drawn * size if alike else drawn
        groups += [number] * size
    numbers = [*groups, len(sizes), len(sizes) + 1]
    fit = sm.OLS(np.array([*changes, 1, -1]), np.ones(len(numbers))).fit(
        cov_type="cluster", cov_kwds={"groups": np.array(numbers), "use_correction": False}
    )
    return {
        "before": [change == -1 for change in changes],
        "after": [change == 1 for change in changes],
        "groups": [f"g{number}" for number in groups],
        "mean": float(fit.params[0]),
        "standard_error": float(fit.bse[0]),
    }


def items(variance: float, effect: float, alpha: float, power: float) -> dict:
    deviation = variance**0.5
    n = normal_sample_size_one_tail(effect, power, alpha / 2, std_null=deviation, std_alternative=deviation)
    return {"variance": variance, "effect": effect, "alpha": alpha, "power": power, "n": float(n)}


goldens = {
    "made_with": {name: version(name) for name in ("statsmodels", "scipy", "numpy")},
    "wilson": [wilson(*case) for case in [(0, 30, 0.95), (3, 30, 0.9), (499, 520, 0.95), (77, 120, 0.99)]],
    "mcnemar": [exact(*case) for case in [(0, 5), (7, 1), (30, 12), (12, 30), (61, 60)]],
    "holm": [holm(case) for case in [[0.01, 0.04, 0.03], [0.2, 0.9, 0.001, 0.0004, 0.3, 0.012], [0.5], [0.04] * 4]],
    "clustered": [clustered(*case) for case in [([5] * 12, 0.5), ([1, 2, 3, 9, 4, 1, 1], 0.9), ([2] * 40, 0.0)]],
    "items": [items(*case) for case in [(0.2, 0.05, 0.05, 0.8), (0.06, 0.01, 0.05, 0.8), (0.4, 0.03, 0.01, 0.9)]],
}
path = Path(__file__).with_name("statistics_goldens.json")
path.write_text(json.dumps(goldens, indent=1).replace("\n    ", " ").replace("\n   ]", "]") + "\n")
