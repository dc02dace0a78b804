"""The checkpoints of a training run: one folder a step, the newest two kept, restored from the newest that is whole.

checkpoints/100/  arrays/ (Orbax)  digest.json
checkpoints/150/  …

A checkpoint also knows what was logged up to its step, so that a log that was damaged since is not carried on.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.errors import RequestError
from lib.files import atomic_write, sha256_bytes, sha256_file
from lib.model.processes import any_process, by_first, is_first
from lib.model.storage import DIGEST, DamagedError, is_of_the_machine, is_saved, restore_tree, save_tree, unread
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


class OtherLogError(DamagedError):
    """A log is not what it was when the model was saved, which itself is whole."""


def restore_latest(folder: Path, like: TrainState, warn: Callable[[str], None]) -> TrainState | None:
    """The newest state that is whole, the logs cut to it; a damaged one is told of and removed. None without one.

    One whose log is another is passed over and left. Raises RequestError where there are only such.
    """
    by_first(lambda: _drop_old(folder))
    other = ""
    for step in reversed(saved_steps(folder)):
        try:
            state = _restored(folder / str(step), like)
        except OtherLogError as error:
            other = other or str(error)
        except DamagedError as error:
            warn(f"{error}; falling back to the checkpoint before")
            by_first(partial(shutil.rmtree, folder / str(step)))  # or it would outrank what is written from here on
        else:
            if other:
                warn(f"{other}; falling back to the checkpoint of step {step}")
            return state
    if other:
        raise RequestError(f"{other}; put it back as it was, or delete {folder} to train from the start")
    return None


def _restored(checkpoint: Path, like: TrainState) -> TrainState:
    state = restore_tree(checkpoint, like)
    cut_logs(checkpoint.parent.parent, checkpoint / DIGEST)
    return state


def logs_of(folder: Path) -> dict[str, dict]:
    """Name → digest and length of each log as it is now, for the process that records it."""
    return {name: _on_disk(folder / name) for name in LOGS} if is_first() else {}


def _on_disk(log: Path) -> dict:
    with open(log, "rb") as file:
        os.fsync(file.fileno())  # or without power it would be left shorter than its record, which is on the disk
    return {"sha256": sha256_file(log), "bytes": log.stat().st_size}


def cut_logs(folder: Path, record: Path) -> None:
    """The logs as the record beside a model has them. Raises OtherLogError where one differs in what is not new.

    RetraceError where one cannot be read now, which says nothing of what is in it. Then none is cut.
    """
    found = {folder / name: _recorded_part(folder / name, record) for name in LOGS}
    for log, content in found.items():
        if is_first() and len(content) < log.stat().st_size:
            atomic_write(log, content)


def _recorded_part(log: Path, record: Path) -> bytes:
    """The beginning of a log that the record tells of; all processes come to the same."""
    content, failure, whole = b"", None, False
    try:
        then = json.loads(record.read_bytes())["logs"][log.name]
        content = log.read_bytes()[: then["bytes"]]
        whole = sha256_bytes(content) == then["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        failure = error
    if any_process(is_of_the_machine(failure)):
        raise unread(log, failure) from None
    if any_process(not whole):
        raise OtherLogError(f"{log}: not what was logged up to {record.parent.name}")
    return content


def _drop_old(folder: Path) -> None:
    """Remove all but the newest two, and what a process left that was killed while it wrote or removed one."""
    kept = saved_steps(folder)[-KEEP:]
    for path in folder.glob("*"):
        if path.name.isdigit() and int(path.name) not in kept:
            (path / DIGEST).unlink(missing_ok=True)  # first, as without it what is left is no checkpoint
            shutil.rmtree(path)
