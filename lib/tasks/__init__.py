"""Where generated traces come from, and how each of their steps is checked.

A task is a module with `generate`, `check_steps`, `verify`, `episode_of` and `canonical`; `TASKS` names them all.
"""

from typing import Any

from lib.tasks import arithmetic, high_card_duel

TASKS = {task.NAME: task for task in (high_card_duel, arithmetic)}


def group_keys(prompt: str, task: str = "", state: Any = None) -> set[str]:
    """What makes two questions the same one: the state of the game where it is known, and the words asked.

    >>> group_keys("What is  2 + 2?")
    {'prompt: what is 2 + 2?'}
    """
    keys = {f"prompt: {' '.join(prompt.casefold().split())}"}
    if task in TASKS and isinstance(state, dict):
        common = TASKS[task].canonical(state)
        keys.add(f"{task}: " + " ".join(f"{name}={common[name]}" for name in sorted(common)))
    return keys
