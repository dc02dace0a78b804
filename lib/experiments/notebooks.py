"""A notebook executed headless by papermill, and rendered (pages.py).

    execute(Notebook("03_train"), run, {"config": "…", "run_dir": "…"})

papermill by itself accepts unknown parameters with a warning and calls a notebook done whose kernel was
killed or left; so parameters are checked before a kernel starts, and a notebook counts as done only when its
last cell has said so. It runs in a thread of its own, so that an interrupt, a request to end or a time limit
reaches us at once, whatever the kernel is busy with, and no kernel outlives it.
"""

import ast
import difflib
import logging
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import papermill
import psutil

from lib.errors import RequestError, RetraceError
from lib.experiments.kernels import KERNEL_ENVIRONMENT, forked_kernels, use_forked_kernels
from lib.experiments.links import linked
from lib.experiments.run import CONFIG, Run
from lib.experiments.stages import source_of
from lib.files import STARTED_IN, atomic_write, home, shown_path
from lib.progress import VARIABLE, terminal


class Stage(NamedTuple):
    """One execution of a notebook in a run: its name there, the notebook, parameters beside config and run_dir.

    `makes` are how the names of the files begin that it leaves in the run, beside its notebook and page.
    """

    name: str
    notebook: str
    parameters: dict[str, Any]
    makes: tuple[str, ...] = ()


class TimeLimit(RetraceError):
    """The run took longer than it was given."""


def execute(stage: Stage, run: Run, deadline: float = math.inf) -> str:
    """Run the notebook into the run folder, as notebook and as page. Returns its conclusion.

    Raises RequestError for a parameter that the notebook does not have, RetraceError where it did not come to its
    end, TimeLimit where `deadline` (of `time.monotonic`) came first; the notebook as far as it came, and its page,
    are kept in all cases.
    """
    source = source_of(stage.notebook)
    parameters = {"config": str(run.path(CONFIG)), "run_dir": str(run.folder), **stage.parameters}
    check_parameters(source, parameters)
    run.path("stages", f"{stage.name}.json").unlink(missing_ok=True)
    scratch = run.path(f".{stage.name}.tmp.ipynb")
    error, others = None, _children() - forked_kernels()
    with _kernel_environment(), ThreadPoolExecutor(1) as thread:
        notebook = thread.submit(_papermill, source, scratch, parameters)
        try:
            _wait(notebook, stage.name, deadline, others)
            notebook.result()
        except papermill.PapermillExecutionError as failure:
            error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
        except RuntimeError as failure:  # a kernel that died
            error = str(failure).splitlines()[0]
        finally:
            _publish(scratch, run, stage.name)
    conclusion = run.conclusion(stage.name)
    if error or conclusion is None:
        reason = error or "the notebook ended before its last cell"
        raise RetraceError(f"{stage.name}: {reason} (the notebook so far: {shown_path(run.path(stage.name))}.ipynb)")
    return conclusion


def _papermill(source: Path, scratch: Path, parameters: dict[str, Any]) -> None:
    for name in ("papermill", "asyncio", "traitlets"):  # what they would log of a failure, the one error line says
        logging.getLogger(name).setLevel(logging.CRITICAL)
    use_forked_kernels()
    papermill.execute_notebook(
        linked(nbformat.read(source, as_version=4), "ipynb"), _literal(scratch), parameters,
        kernel_name="python3", cwd=str(source.parent), progress_bar=False,
        extra_arguments=["--log-level=CRITICAL"], shutdown_kernel="immediate",
    )  # fmt: skip


def _wait(notebook: Future, name: str, deadline: float, others: set[psutil.Process]) -> None:
    """Until the notebook is done. Whatever stops the wait kills its kernel first, which ends the notebook."""
    try:
        _warm_up()
        while not wait([notebook], timeout=0.2).done:
            if time.monotonic() > deadline:
                raise TimeLimit(f"{name}: the time limit was reached")
    except BaseException:
        while not notebook.done():  # again and again, as the kernel may only just be starting
            with suppress(KeyboardInterrupt):  # asked twice to end, it still takes the kernel along
                for child in _children() - others:
                    with suppress(psutil.Error):
                        child.kill()
                wait([notebook], timeout=0.2)
        raise


@cache
def _warm_up() -> None:
    """Write a first page for nobody, while the first notebook works: what it needs takes longer to come up than it."""
    from lib.experiments.pages import render

    render(source_of("01_traces"))


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def check_parameters(source: Path, parameters: dict[str, Any]) -> None:
    """Refuse a parameter that the notebook's parameters cell does not name, or whose type is another there."""
    known = _declared(source)
    for name, value in parameters.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise RequestError(f"{source.name}: {name!r}: no such parameter; {hint}")
        if type(value) is not type(known[name]):
            expected, got = type(known[name]).__name__, type(value).__name__
            raise RequestError(f"{source.name}: {name}: expected {expected}, got {got}")


def _declared(source: Path) -> dict[str, Any]:
    """Parameter → default, of the one cell tagged `parameters`."""
    cells = [
        cell for cell in nbformat.read(source, as_version=4).cells if "parameters" in cell.metadata.get("tags", [])
    ]
    if len(cells) != 1:
        raise RetraceError(f"{source}: {len(cells)} cells tagged parameters, expected one")
    assignments = [node for node in ast.parse(cells[0].source).body if isinstance(node, ast.Assign)]
    return {target.id: ast.literal_eval(node.value) for node in assignments for target in node.targets}


def _publish(scratch: Path, run: Run, name: str) -> None:
    """The executed notebook under its final name, and its page; nothing where the kernel never started."""
    from lib.experiments.pages import render  # with nbconvert: not before a notebook is at work

    try:
        with suppress(FileNotFoundError, nbformat.reader.NotJSONError):  # cut off where the disk was full
            nbformat.read(scratch, as_version=4)
            atomic_write(run.path(f"{name}.ipynb"), scratch.read_bytes())
            atomic_write(run.path(f"{name}.html"), render(scratch, run))
    finally:
        scratch.unlink(missing_ok=True)


def _literal(path: Path) -> str:
    """papermill formats paths as templates; this one means itself."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def _kernel_environment() -> Iterator[None]:
    """What the kernels inherit, for as long as one is started; what the user set stands.

    The home is given whole, and our folder beside, as a kernel works in another folder than we do.
    """
    before = dict(os.environ)
    own = {**KERNEL_ENVIRONMENT, VARIABLE: terminal(), **before, "RETRACE_HOME": str(home()), STARTED_IN: os.getcwd()}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
            os.environ.update({name: before[name]} if name in before else {})
