"""The trials of a sweep: a configuration again and again, each time with other values in some of its fields.

    sweep = load_sweep("configs/sweeps/lr.yaml")
    trials = make_trials(sweep, load_config(sweep.base))       # each one a whole, checked configuration
    trials[0].changes     # {"training.learning_rate": 0.001, "training.seed": 7}

A file says what varies in one of two ways: a list of values in a grid, where every combination is a trial, or a list or
a range in a seeded random search:

    base: configs/smoke.yaml                     base: configs/smoke.yaml
    vary:                                        random: {trials: 12, seed: 1}
      training.learning_rate: [1e-3, 3e-3]       vary:
      training.seed: [7, 8]                        training.learning_rate: {low: 1e-4, high: 1e-2, log: true}
                                                   training.num_steps: {low: 10, high: 50}      # whole, as both are

A draw of the random search depends on (seed, number of the draw, name of the field) alone, so that another field beside
it, or more trials, leave it as it is (J. Bergstra and Y. Bengio, "Random search for hyper-parameter optimization",
Journal of Machine Learning Research 13 (2012), 281-305).
"""

import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lib.config import Config, bounded, build, check_size, load_config, load_tree, to_yaml
from lib.data.dataset import dataset_key
from lib.errors import RequestError
from lib.experiments.run import CONFIG, run_folders, status_of
from lib.files import NAME, home, sha256_bytes, sha256_file

SETTINGS = "settings.json"
MAX_TRIALS = 1000
DRAWS_A_TRIAL = 100  # until a random search is said to have fewer combinations than trials
DIGITS = 3  # of a drawn number that is not whole, so that people can read and repeat it


@dataclass(frozen=True)
class RangeConfig:
    # Both may be drawn. Where both are whole numbers, so is what is drawn.
    low: float
    high: float
    # Draw evenly by the logarithm, as a learning rate is.
    log: bool = False


@dataclass(frozen=True)
class RandomConfig:
    # How many to draw; no two are the same.
    trials: int = bounded(low=1, high=MAX_TRIALS)
    seed: int = bounded(low=0)


@dataclass(frozen=True)
class SlurmConfig:
    # Empty: the cluster's own choice.
    partition: str = ""
    account: str = ""
    # A trial that takes longer is stopped; the sweep started again goes on with it.
    minutes: int = bounded(60, low=1)
    # Of each trial. Memory 0: what the cluster gives.
    cpus: int = bounded(2, low=1)
    memory_gb: int = bounded(0, low=0)
    gpus: int = bounded(0, low=0)


@dataclass(frozen=True)
class ExecutionConfig:
    # Who runs the trials: processes on this machine, or slurm, through submitit (requirements-slurm.txt).
    executor: str = bounded("processes", of=("processes", "slurm"))
    # Trials at work at a time.
    at_once: int = bounded(1, low=1, high=MAX_TRIALS)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class SweepConfig:
    # Names the sweep's folder and its runs.
    name: str
    # The configuration that every trial changes.
    base: str
    # Field, as in --set → the values to try: a list, or in a random search a range.
    vary: dict[str, Any]
    # Null: a grid.
    random: RandomConfig | None = None
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)


class Trial(NamedTuple):
    """One configuration of a sweep; `changes` are what makes it out of the base, `name` ends that of its run."""

    number: int
    name: str
    changes: dict[str, Any]
    config: Config

    @property
    def label(self) -> str:
        """`training.learning_rate=0.003 training.seed=7`: what --set would be given."""
        return " ".join(overrides(self.changes))


def load_sweep(path: str | Path) -> SweepConfig:
    """A sweep from a YAML file, found as a configuration is. Raises RequestError."""
    where, tree = str(path), load_tree(path)
    if "vary" not in tree and "dataset" in tree:
        raise RequestError(f"{where}: is the configuration of a run, not of a sweep; python -m lib run {where}")
    vary = tree.get("vary")
    sweep = build(SweepConfig, tree | ({"vary": {}} if isinstance(vary, dict) else {}), where)
    if not NAME.fullmatch(sweep.name) or len(sweep.name) > 60:
        raise RequestError(f"{where}: name: expected at most 60 letters, digits and . _ + -, got {sweep.name!r}")
    if not vary:
        raise RequestError(f"{where}: vary: expected at least one field, such as training.learning_rate")
    for key, values in vary.items():
        _check_values(values, f"{where}: vary.{key}", sweep.random is not None)
    whole = SweepConfig(**vars(sweep) | {"vary": vary})
    check_size(whole, where)
    return whole


def make_trials(sweep: SweepConfig, base: str | Path, where: str = "the sweep") -> list[Trial]:
    """Every trial, in order, with its configuration: that of the file `base`, changed.

    A trial with other data than the base's or an earlier trial's, but under the same dataset_version, gets a version
    of its own, as the data of a version never change. Raises RequestError, naming the trial, where a configuration is
    wrong.
    """
    plain, configs = load_config(base), []
    owners = {dataset_key(plain.dataset): _data(plain)}
    combinations = list(_grid(sweep.vary, where) if sweep.random is None else _drawn(sweep.vary, sweep.random, where))
    for number, changes in enumerate(combinations, 1):
        try:
            configs.append(_with_own_data(base, changes, owners))
        except RequestError as error:
            said = f"{where}: trial {number} of {len(combinations)} ({' '.join(overrides(changes))})"
            raise RequestError(f"{said}: {error}") from None
        if (first := configs.index(configs[-1]) + 1) < number:
            raise RequestError(f"{where}: trial {number} is the same as trial {first}; name each value once")
    digest = sha256_bytes("\n".join(map(to_yaml, configs)).encode())[:8]
    digits = len(str(len(configs)))
    return [
        Trial(number, f"{sweep.name}-{digest}-{number:0{digits}}", changes, config)
        for number, (changes, config) in enumerate(zip(combinations, configs, strict=True), 1)
    ]


def overrides(changes: dict[str, Any]) -> list[str]:
    """What --set is given for these changes."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]


def run_of(trial: Trial) -> Path | None:
    """The folder of the trial's run, told by its name and configuration: the one that is done, or else the newest."""
    name = re.compile(rf"\d{{8}}_\d{{6}}_{re.escape(trial.name)}(_\d+)?")
    sha256 = sha256_bytes(to_yaml(trial.config).encode())
    found = [
        folder
        for folder in run_folders()
        if name.fullmatch(folder.name) and (folder / CONFIG).is_file() and sha256_file(folder / CONFIG) == sha256
    ]
    return next((folder for folder in found if status_of(folder) == "done"), found[0] if found else None)


def find_sweep(name: str) -> Path | None:
    """The folder of a sweep that was begun, by its path or by its name in this home."""
    for folder in (Path(name), home() / "sweeps" / name):
        with suppress(OSError, ValueError):
            if (folder / SETTINGS).is_file():
                return folder
    return None


def varied(trials: Iterable[Trial]) -> dict[str, list[Any]]:
    """Field → the different values that the trials have there, in the order they come."""
    found: dict[str, list[Any]] = {}
    for trial in trials:
        for key, value in trial.changes.items():
            if value not in found.setdefault(key, []):
                found[key].append(value)
    return found


# ---- combinations -------------------------------------------------------------------------------------------


def _grid(vary: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Every combination, the last field changing first."""
    if (count := math.prod(map(len, vary.values()))) > MAX_TRIALS:
        raise RequestError(f"{where}: vary: {count:,} combinations, and a sweep has at most {MAX_TRIALS:,} trials")
    return (dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values()))


def _drawn(vary: dict[str, Any], search: RandomConfig, where: str) -> list[dict[str, Any]]:
    """So many different combinations."""
    found: list[dict[str, Any]] = []
    for draw in range(search.trials * DRAWS_A_TRIAL):
        changes = {
            key: _pick(values, random.Random(f"{search.seed} {draw} {key}").random()) for key, values in vary.items()
        }
        if changes not in found:
            found.append(changes)
        if len(found) == search.trials:
            return found
    raise RequestError(f"{where}: random.trials: only {len(found)} different combinations were found; ask for no more")


def _pick(values: Any, share: float) -> Any:
    """The value at this share, 0 to 1, of a list or a range."""
    if isinstance(values, list):
        return values[int(share * len(values))]
    low, high = values["low"], values["high"]
    whole = type(low) is type(high) is int
    top = high + 1 if whole else high
    value = low * (top / low) ** share if values.get("log") else low + (top - low) * share
    return min(high, math.floor(value) if whole else max(low, float(f"{value:.{DIGITS}g}")))


def _check_values(values: Any, where: str, may_be_range: bool) -> None:
    if isinstance(values, dict) and may_be_range:
        found = build(RangeConfig, values, where)
        if not -math.inf < found.low < found.high < math.inf:
            raise RequestError(f"{where}: expected low below high, got {found.low:g} and {found.high:g}")
        if found.log and found.low <= 0:
            raise RequestError(f"{where}.low: expected more than 0 where log is true, got {found.low:g}")
    elif isinstance(values, dict):
        raise RequestError(f"{where}: a range is drawn from; give random: {{trials: 12, seed: 1}}, or a list of values")
    elif not isinstance(values, list) or not values:
        raise RequestError(f"{where}: expected a list of values{' or a range' if may_be_range else ''}, got {values!r}")


# ---- configurations -----------------------------------------------------------------------------------------


def _with_own_data(base: str | Path, changes: dict[str, Any], owners: dict[str, str]) -> Config:
    """The base, changed; `owners`, dataset key → what has that key first, learns of it."""
    config = load_config(base, overrides(changes))
    data = _data(config)
    if owners.setdefault(dataset_key(config.dataset), data) == data:
        return config
    version = f"{config.dataset.dataset_version}-{sha256_bytes(data.encode())[:8]}"
    return load_config(base, overrides(changes | {"dataset.dataset_version": version}))


def _data(config: Config) -> str:
    """What a dataset is made from: the request, what is played, and the questions that are kept out of it."""
    return "\n".join([to_yaml(config.dataset), to_yaml(config.traces), config.evaluation.eval_set])
