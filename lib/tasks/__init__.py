"""Where generated traces come from, and how each of their steps is checked.

A task is a module with `generate`, `check_steps`, `verify`, `episode_of` and `canonical`; `TASKS` names them all.
"""

import re
from collections.abc import Iterator
from typing import Any

from lib.tasks import arithmetic, gsm_symbolic, high_card_duel
from lib.tasks.steps import StepCheck

PROMPT = "prompt: "  # what the key of a question by its words begins with
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
TASKS = {task.NAME: task for task in (high_card_duel, arithmetic)}


def check_steps(task: str, state: Any, contents: list[str]) -> list[StepCheck]:
    """One check for each step of a completion, and more where steps are missing; none where nobody can check it."""
    if task in TASKS:
        return TASKS[task].check_steps(state, contents)
    return gsm_symbolic.check_steps(contents) if checkable(task, state) else []


def checkable(task: str, state: Any) -> bool:
    """Whether steps of the task can be checked; of reasoning-gym's, gsm_symbolic alone, whose steps are equations."""
    return task in TASKS or isinstance(state, dict) and state.get("generator") == gsm_symbolic.NAME


def group_keys(prompt: str, task: str = "", state: Any = None) -> set[str]:
    """What makes two questions the same one: the state of the game where it is known, and the words asked.

    >>> group_keys("What is  2 + 2?")
    {'prompt: what is 2 + 2?'}
    """
    keys = {PROMPT + _words(prompt)}
    if task in TASKS and isinstance(state, dict):
        common = TASKS[task].canonical(state)
        keys.add(f"{task}: " + " ".join(f"{name}={common[name]}" for name in sorted(common)))
    return keys


def keys_within(prompt: str) -> Iterator[str]:
    """The key of the words after each blank line: the question, where an instruction stands before it.

    >>> list(keys_within("Be brief.\\n\\nWhat is  2 + 2?"))
    ['prompt: what is 2 + 2?']
    """
    words = ""
    for part in reversed(_BLANK_LINE.split(prompt)[1:]):
        words = " ".join(filter(None, (_words(part), words)))
        yield PROMPT + words


def _words(text: str) -> str:
    return " ".join(text.casefold().split())
