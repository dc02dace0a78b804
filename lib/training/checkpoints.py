"""The checkpoints of a training run: one folder a step, the newest two kept, restored from the newest that is whole.

checkpoints/100/  arrays/ (Orbax)  digest.json
checkpoints/150/  …
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from lib.model.storage import DamagedError, is_saved, restore_tree, save_tree
from lib.training.step import TrainState

KEEP = 2


def save_checkpoint(folder: Path, state: TrainState, digest: str) -> None:
    """Write the state, whose digest is given, under its step; then drop all but the newest two."""
    save_tree(folder / str(int(state.step)), state, digest)
    for step in saved_steps(folder)[:-KEEP]:
        shutil.rmtree(folder / str(step))


def saved_steps(folder: Path) -> list[int]:
    """Steps with a completely written checkpoint, oldest first."""
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit() and is_saved(path)]
    return sorted(steps)


def restore_latest(folder: Path, like: TrainState, warn: Callable[[str], None]) -> TrainState | None:
    """The newest state that is whole; a damaged one is told of and removed. None where there is none."""
    for step in reversed(saved_steps(folder)):
        try:
            return restore_tree(folder / str(step), like)
        except DamagedError as error:
            warn(f"{error}; falling back to the checkpoint before")
            shutil.rmtree(folder / str(step))  # or it would outrank those that are written from here on
    return None
