"""Where generated traces come from, and how each of their steps is checked.

A task is a module with `generate`, `check_steps`, `verify` and `deal_of`; `TASKS` names those there are.
"""

from typing import Any

from lib.tasks import high_card_duel

TASKS = {high_card_duel.NAME: high_card_duel}


def group_keys(prompt: str, task: str = "", state: Any = None) -> set[str]:
    """What makes two questions the same one: the state of the game where it is known, and the words asked.

    >>> group_keys("What is  2 + 2?")
    {'prompt: what is 2 + 2?'}
    """
    keys = {f"prompt: {' '.join(prompt.casefold().split())}"}
    if task in TASKS and isinstance(state, dict):
        keys.add(f"{task}: " + " ".join(f"{name}={state[name]}" for name in sorted(state)))
    return keys
