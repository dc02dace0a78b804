"""The checkpoints of a training run: one folder a step, the newest two kept, restored from the newest that is whole.

checkpoints/100/  arrays/ (Orbax)  digest.json
checkpoints/150/  …

A checkpoint also knows what was logged up to its step, so that a log that was damaged since is not carried on.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.files import atomic_write, sha256_bytes, sha256_file
from lib.model.processes import by_first, is_first
from lib.model.storage import DIGEST, DamagedError, is_saved, restore_tree, save_tree
from lib.training.step import TrainState

KEEP = 2
LOGS = ("metrics.jsonl", "checkpoints.jsonl")


def save_checkpoint(folder: Path, state: TrainState, digest: str) -> None:
    """Write the state, whose digest is given, under its step; then drop all but the newest two."""
    save_tree(folder / str(int(state.step)), state, digest, logs=logs_of(folder.parent))
    by_first(lambda: _drop_old(folder))


def saved_steps(folder: Path) -> list[int]:
    """Steps with a completely written checkpoint, oldest first."""
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit() and is_saved(path)]
    return sorted(steps)


def has_trained(output: Path) -> bool:
    """Whether a training came to anything in this folder that is gone on from, or kept."""
    return bool(saved_steps(output / "checkpoints")) or (output / "checkpoint-final").exists()


def restore_latest(folder: Path, like: TrainState, warn: Callable[[str], None]) -> TrainState | None:
    """The newest state that is whole, the logs cut to it; a damaged one is told of and removed. None without one."""
    by_first(lambda: _drop_old(folder))
    for step in reversed(saved_steps(folder)):
        try:
            state = restore_tree(folder / str(step), like)
            cut_logs(folder.parent, folder / str(step) / DIGEST)
            return state
        except DamagedError as error:
            warn(f"{error}; falling back to the checkpoint before")
            by_first(partial(shutil.rmtree, folder / str(step)))  # or it would outrank what is written from here on
    return None


def logs_of(folder: Path) -> dict[str, dict]:
    """Name → digest and length of each log as it is now, for the process that records it."""
    if not is_first():
        return {}
    return {name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in LOGS}


def cut_logs(folder: Path, record: Path) -> None:
    """The logs as the record beside a model has them. Raises DamagedError where one differs in what is not new."""
    for name in LOGS:
        try:
            then = json.loads(record.read_bytes())["logs"][name]
            content = (folder / name).read_bytes()[: then["bytes"]]
            whole = sha256_bytes(content) == then["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise DamagedError(f"{folder / name}: not what was logged up to {record.parent.name}")
        if len(content) < (folder / name).stat().st_size and is_first():
            atomic_write(folder / name, content)


def _drop_old(folder: Path) -> None:
    """Remove all but the newest two, and what a process left that was killed while it wrote or removed one."""
    kept = saved_steps(folder)[-KEEP:]
    for path in folder.glob("*"):
        if path.name.isdigit() and int(path.name) not in kept:
            (path / DIGEST).unlink(missing_ok=True)  # first, as without it what is left is no checkpoint
            shutil.rmtree(path)
