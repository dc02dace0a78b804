"""The step checks proved on mutants: a true trace changed in one place is found wrong first exactly there."""

import random
import re
from collections import Counter
from itertools import zip_longest
from types import ModuleType

import pytest

from lib.tasks import TASKS, arithmetic, high_card_duel

TRIALS = 1000
# What a word of a claim may be mistaken for; any other word is mistaken for its neighbour, and a digit for another.
WORDS = [
    high_card_duel.RANKS,
    high_card_duel.SUITS,
    arithmetic.PLACES,
    ["higher", "lower", "equal"],
    ["win", "loss", "tie"],
    ["plus", "times"],
]


def change_digit(steps: list[str], draw: random.Random) -> None:
    at = draw.choice([index for index, step in enumerate(steps) if re.search("[0-9]", step)])
    place = draw.choice([found.start() for found in re.finditer("[0-9]", steps[at])])
    digit = draw.choice("0123456789".replace(steps[at][place], ""))
    steps[at] = steps[at][:place] + digit + steps[at][place + 1 :]


def change_word(steps: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(steps))
    found = draw.choice(list(re.finditer("[A-Za-z]+", steps[at])))
    alike = next((words for words in WORDS if found[0] in words), ["thing", found[0]])
    word = draw.choice([word for word in alike if word != found[0]])
    steps[at] = steps[at][: found.start()] + word + steps[at][found.end() :]


def change_claim(steps: list[str], draw: random.Random) -> None:
    """One number, whole, by one of up to two digits."""
    at = draw.choice([index for index, step in enumerate(steps) if re.search("[0-9]", step)])
    found = draw.choice(list(re.finditer("[0-9]+", steps[at])))
    number = draw.choice([str(n) for n in range(100) if str(n) != found[0]])
    steps[at] = steps[at][: found.start()] + number + steps[at][found.end() :]


def drop(steps: list[str], draw: random.Random) -> None:
    del steps[draw.randrange(len(steps))]


def duplicate(steps: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(steps))
    steps.insert(at, steps[at])


def swap(steps: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(steps) - 1)
    steps[at : at + 2] = reversed(steps[at : at + 2])


MUTATIONS = [change_digit, change_word, change_claim, drop, duplicate, swap]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_first_wrong_step_is_where_the_mutation_begins(task: ModuleType):
    found: Counter = Counter()
    for trial, trace in enumerate(task.generate(TRIALS, seed=2024)):
        true = [step.content for step in trace.steps]
        mutation, mutant = MUTATIONS[trial % len(MUTATIONS)], list(true)
        mutation(mutant, random.Random(trial))
        begins = next(at for at, (was, now) in enumerate(zip_longest(true, mutant)) if was != now)
        checks = task.check_steps(trace.meta["state"], mutant)
        wrong = next(at for at, check in enumerate(checks) if not check.correct)
        assert wrong == begins, (trial, mutation.__name__, mutant, checks)
        assert all(bool(check.error) != check.correct and bool(check.reason) != check.correct for check in checks)
        found[f"{mutation.__name__}: {checks[wrong].error}"] += 1
    assert sum(found.values()) == TRIALS
    print(f"{task.NAME}: first wrong step found in {sum(found.values())} of {TRIALS}", dict(sorted(found.items())))
