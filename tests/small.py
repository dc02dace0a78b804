"""The smoke configuration made small: its shapes stay, so that what is compiled once serves all tests."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

CONFIG = "configs/smoke.yaml"


def changes(**training: int) -> list[str]:
    """What makes it small, and its training so."""
    given = {"num_steps": 3, "warmup_steps": 1, "log_every": 1, "eval_every": 3, "checkpoint_every": 2} | training
    return [*(f"training.{name}={value}" for name, value in given.items()), "evaluation.limit=4"]


def as_words(changes: Iterable[str]) -> list[str]:
    """As the command line takes them."""
    return [word for change in changes for word in ("--set", change)]


SMALL = changes()
RUN = ["run", CONFIG, *as_words(SMALL)]


class SmallRun(NamedTuple):
    """A run of it that is done, for all tests that only look: what its command printed, and its folder."""

    printed: str
    folder: Path

    @property
    def home(self) -> Path:
        return self.folder.parent

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "run_manifest.json").read_bytes())
