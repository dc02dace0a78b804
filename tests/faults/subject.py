"""A run under test: the real command in a process of its own, with faults, and what must hold of what it left."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nbformat
import psutil

from lib.experiments.pipeline import STAGES
from lib.experiments.run import MANIFEST, STATE
from lib.files import repository_root, write_json

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what is started by itself in this folder
from small import as_words, changes

INJECT = Path(__file__).resolve().parent / "inject"
FULL = os.environ.get("RETRACE_FAULTS") == "full"
PATIENCE = 300  # seconds for anything that must come; a machine that does other work, too, may need them


def settings(**training: int) -> list[str]:
    """Words that make the smoke configuration small."""
    return as_words(changes(**training))


class Command:
    """`python -m lib …` at work."""

    def __init__(self, home: Path, *words: str | Path, faults: Iterable[dict[str, Any]] = ()):
        home.mkdir(parents=True, exist_ok=True)
        notes = Path(tempfile.mkdtemp(dir=home.parent, prefix="command_"))
        self.log, self.out, self.err = notes / "struck", notes / "out", notes / "err"
        environment = os.environ | {"RETRACE_HOME": str(home), "RETRACE_PROGRESS": ""}
        if faults := list(faults):
            path = os.pathsep.join(filter(None, [str(INJECT), os.environ.get("PYTHONPATH")]))
            environment |= {
                "PYTHONPATH": path, "RETRACE_FAULT": json.dumps(faults), "RETRACE_FAULT_LOG": str(self.log),
            }  # fmt: skip
        with open(self.out, "w") as out, open(self.err, "w") as err:  # no pipes: an orphan would keep them open
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lib", *map(str, words)],
                cwd=repository_root(), env=environment, stdout=out, stderr=err,
            )  # fmt: skip

    def family(self) -> set[psutil.Process]:
        """Its kernels, and whatever else it started."""
        return set(psutil.Process(self.process.pid).children(recursive=True))

    def until(self, there: Callable[[], Any], what: str) -> Any:
        """Wait for something that comes of its work."""
        deadline = time.monotonic() + PATIENCE
        while not (found := there()):
            assert self.process.poll() is None, f"ended before {what}: {self.end()}"
            assert time.monotonic() < deadline, f"no {what} within {PATIENCE} s"
            time.sleep(0.02)
        return found

    def struck(self) -> dict[str, Any]:
        """Wait until its fault strikes; the line that it left, with its `pid`."""
        lines = self.until(lambda: self.log.is_file() and self.log.read_text().splitlines(), "its fault")
        return json.loads(lines[0])

    def end(self) -> tuple[int, str, str]:
        """Its exit status, what it printed, and what it said of errors."""
        return self.process.wait(PATIENCE), self.out.read_text(), self.err.read_text()


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that are still at work; one that only waits to be reaped is not."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def gone_within(processes: Iterable[psutil.Process], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def torn(home: Path) -> list[str]:
    """Files under their final name that cannot be read: none may be there, at whatever moment a run was killed."""
    readers = {".json": json.loads, ".jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
               ".ipynb": lambda text: nbformat.reads(text, as_version=4)}  # fmt: skip
    found = []
    for path in home.rglob("*"):
        if path.suffix in readers and not path.name.startswith(".") and "arrays" not in path.parts:
            try:
                readers[path.suffix](path.read_text("utf-8"))
            except ValueError as error:
                found.append(f"{path.relative_to(home)}: {error}")
    return found


def temporary(folder: Path) -> list[str]:
    """What writers leave that are killed."""
    found = [*folder.rglob(".*.tmp"), *folder.rglob(".*.tmp.ipynb"), *folder.rglob("*.orbax-checkpoint-tmp*")]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def results(folder: Path) -> dict[str, Any]:
    """What a run promises to give again, bit for bit."""
    return json.loads((folder / "evidence.json").read_bytes())["results"]


def recorded(folder: Path) -> dict[str, list[str]]:
    """Stage → the files that it is recorded to have made; those that Orbax names at random, under one name."""
    found = {}
    for stage in STAGES:
        names = json.loads((folder / "stages" / f"{stage.name}.json").read_bytes())["files"]
        found[stage.name] = sorted({f"{name[:-32]}…" if "/d/" in name else name for name in names})
    return found


def rewound(done: Path, home: Path, stage: str) -> Path:
    """A copy of the home of a run that is done, in which the run has just come to a stage. Returns its folder."""
    shutil.copytree(done.parent, home)
    folder = home / done.name
    later = [entry.name for entry in STAGES]
    for name in later[later.index(stage) :]:
        record = folder / "stages" / f"{name}.json"
        for file in json.loads(record.read_bytes())["files"]:
            (folder / file).unlink(missing_ok=True)
        record.unlink()
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).unlink()
    kept = ("run_id", "created_at", "config_sha256", "attempts")
    write_json(folder / STATE, {name: manifest[name] for name in kept} | {"stage": stage})
    for place in sorted(folder.rglob("*/"), reverse=True):
        if not any(place.iterdir()):
            place.rmdir()
    return folder
