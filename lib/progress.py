"""Progress bars with time left: in a terminal and in a notebook that somebody watches, never in a stored report.

RETRACE_PROGRESS names the terminal to draw on where notebooks run headless under a command; empty means none.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

VARIABLE = "RETRACE_PROGRESS"


@contextmanager
def progress(total: int, label: str, unit: str, initial: int = 0) -> Iterator[tqdm]:
    """A bar that is gone when the block ends."""
    with _target() as (file, silent):
        options = {"leave": False, "dynamic_ncols": True, "mininterval": 0.5, "file": file, "disable": silent}
        with tqdm(total=total, desc=label, unit=f" {unit}", initial=initial, **options) as bar:
            yield bar


def terminal() -> str:
    """The terminal that standard error is, or an empty text: what a headless run passes on to its kernels."""
    with suppress(OSError):
        return os.ttyname(sys.stderr.fileno())
    return ""


@contextmanager
def _target() -> Iterator[tuple]:
    named = os.environ.get(VARIABLE)
    if named:
        with open(named, "w") as file:
            yield file, False
    else:
        watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        yield sys.stderr, named == "" or not watched
