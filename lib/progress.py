"""Progress bars with time left: in a terminal and in a notebook that somebody watches, never in a stored report.

RETRACE_PROGRESS names the terminal to draw on where notebooks run headless under a command; empty means none.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from tqdm import tqdm

VARIABLE = "RETRACE_PROGRESS"


@contextmanager
def progress(total: int, label: str, unit: str, initial: int = 0) -> Iterator[tqdm]:
    """A bar that is gone when the block ends."""
    options = {"total": total, "desc": label, "unit": f" {unit}", "initial": initial, "leave": False}
    with _bar(options | {"mininterval": 0.5}) as bar:
        yield bar


def terminal() -> str:
    """The terminal that standard error is, or an empty text: what a headless run passes on to its kernels."""
    with suppress(OSError):
        return os.ttyname(sys.stderr.fileno())
    return ""


@contextmanager
def _bar(options: dict[str, Any]) -> Iterator[tqdm]:
    named = os.environ.get(VARIABLE)
    if named:
        with _opened(named) as file, tqdm(**options, dynamic_ncols=True, file=file) as bar:
            yield bar
    elif named is None and _in_kernel():
        with _InNotebook(**options, ncols=90, ascii=False, file=io.StringIO()) as bar:
            yield bar
    else:
        silent = named == "" or not sys.stderr.isatty()
        with tqdm(**options, dynamic_ncols=True, file=sys.stderr, disable=silent) as bar:
            yield bar


def _opened(terminal: str) -> IO[str]:
    """The terminal, or nowhere, where nobody watches it any more or it is another user's."""
    try:
        return open(terminal, "w")
    except OSError:
        return open(os.devnull, "w")


def _in_kernel() -> bool:
    """True where Jupyter runs this; that its packages are imported says nothing yet."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class _InNotebook(tqdm):
    """A bar under the cell that runs, redrawn in its place; at its end its output is empty, and no page shows it."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        from IPython.display import display

        handle = display({"text/plain": ""}, raw=True, display_id=True)
        return lambda text: handle.update({"text/plain": text} if text else {}, raw=True)
