"""What the tests of damage share: a whole run without kernels, the command in this process, and flipped bits."""

import io
import random
import shutil
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from lib.experiments import run as runs  # before nbformat, which lib.experiments makes quick to import

# isort: split
import nbformat

from lib.__main__ import main
from lib.experiments.notebooks import Stage
from lib.experiments.run import CONFIG, Run
from lib.files import atomic_write, repository_root

OFFSETS = 20


class Said(NamedTuple):
    """What a command came to: its exit status, what it printed, and what it said of errors."""

    status: int
    out: str
    err: str


def command(*words: str | Path) -> Said:
    """`python -m lib …`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = int(end.code or 0)
    return Said(status, out.getvalue(), err.getvalue())


def execute_here(stage: Stage, run: Run, deadline: float) -> str:
    """In the place of `notebooks.execute`: the cells of the notebook in this process, which has all compiled.

    With RETRACE_FAULTS=full in the environment notebooks are executed by kernels, as ever.
    """
    notebook = nbformat.read(repository_root() / "notebooks" / f"{stage.notebook}.ipynb", as_version=4)
    given = {"config": str(run.path(CONFIG)), "run_dir": str(run.folder), **stage.parameters}
    run.path("stages", f"{stage.name}.json").unlink(missing_ok=True)
    names: dict = {}
    try:
        with redirect_stdout(io.StringIO()):
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    exec(compile(cell.source, f"{stage.name}:{cell.id}", "exec"), names)
                    names.update(given if cell.id == "parameters" else {})
    finally:
        if lock := runs._held_by_this_kernel.pop(run.folder.resolve(), None):
            lock.release()
    atomic_write(run.path(f"{stage.name}.ipynb"), nbformat.writes(notebook))
    atomic_write(run.path(f"{stage.name}.html"), f"<title>{stage.name}</title>" + "<p>As it was read.</p>" * 20)
    return run.conclusion(stage.name)


def files(folder: Path) -> list[Path]:
    """Every file that holds something, but for locks."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path: Path, source: random.Random) -> int:
    """Turn one bit of a file over, in its place. Returns the offset."""
    content = bytearray(path.read_bytes())
    offset = source.randrange(len(content))
    content[offset] ^= 1 << source.randrange(8)
    path.write_bytes(content)
    return offset


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target, symlinks=True)


def one_line(said: str) -> bool:
    return said.startswith("error: ") and said.count("\n") == 1 and said.endswith("\n")


def names(findings: Iterable[str]) -> set[str]:
    """The files of lines such as `edited: eval_after.jsonl`."""
    return {finding.split(": ", 1)[1].split(" (")[0] for finding in findings}
