"""Everything that writes, on a disk that is full. test_storage.py executes this where FOLDER is a small disk:

    python tests/faults/full_disk.py FOLDER tmpfs DATA      a tmpfs of its own, filled up by a file
    python tests/faults/full_disk.py FOLDER limit DATA      no file may grow (RLIMIT_FSIZE), where none can be mounted

DATA is a file to train on. Prints one JSON object: what came of each fault.
"""

import hashlib
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damage
import subject

from lib.config import load_config
from lib.data.store import Store
from lib.experiments import notebooks, pipeline
from lib.experiments.run import Run, create_run, status_of
from lib.files import write_json
from lib.model import storage
from lib.training import loop

STUBS = {"02_dataset": "train.tunix_sft.jsonl", "05_compare": "eval_summary.json"}


@dataclass(frozen=True)
class Disk:
    """A folder on a disk that can be filled up, and freed again."""

    folder: Path
    by: str
    data: Path

    @contextmanager
    def full(self, leave: int = 0) -> Iterator[None]:
        """For as long as the block lasts: no room, but for so many bytes."""
        self.fill(leave)
        try:
            yield
        finally:
            self.free()

    def fill(self, leave: int = 0) -> None:
        if self.by == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(leave, 1), resource.RLIM_INFINITY))
            return
        with open(self.folder / "filler", "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                file.truncate(max(file.tell() - leave, 0))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (self.folder / "filler").unlink(missing_ok=True)

    def content(self) -> dict[str, str]:
        """Every file, by its digest; locks are empty."""
        found = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file() and path.name != "filler"}
        return {str(path): hashlib.sha256(content).hexdigest() for path, content in found.items() if content}


def refused(disk: Disk, *words: str | Path, leave: int = 0) -> dict[str, Any]:
    """What a command comes to while the disk is full, and whether every file is as it was then."""
    before = disk.content()
    with disk.full(leave):
        status, _, err = damage.command(*words)
    return {"status": status, "said": err, "intact": disk.content() == before}


def store(disk: Disk) -> dict[str, Any]:
    more = disk.folder.parent / "more.jsonl"
    game = ("traces", "generate", "--game", "high_card_duel")
    damage.command(*game, "--count", "60", "--seed", "7")
    damage.command(*game, "--count", "400", "--seed", "9000", "--no-persist", "--output", more)
    kept = Store(disk.folder / "home" / "store").content_hash()
    tries = [refused(disk, "traces", "import", more, leave=leave) for leave in (0, 4096, 20_480)]
    after = damage.command("traces", "import", more)
    return {"tries": tries, "after": after.status, "grew": Store(disk.folder / "home" / "store").content_hash() != kept}


def dataset(disk: Disk) -> dict[str, Any]:
    words = ("dataset", "build", "--name", "toy", "--version", "v1", "--filter", "seed=7")
    tries = [refused(disk, *words, leave=leave) for leave in (0, 4096, 20_480)]
    return {"tries": tries, "after": damage.command(*words).status}


def export(disk: Disk) -> dict[str, Any]:
    words = ("dataset", "export", "toy-v1", "--format", "tunix_sft", "--output", disk.folder / "train.jsonl")
    (disk.folder / "train.jsonl").write_text("old")
    return {"tries": [refused(disk, *words)], "after": damage.command(*words).status}


def report(disk: Disk) -> dict[str, Any]:
    for side, answer in {"before": "loss", "after": "win"}.items():
        record = {
            "trace_version": "1.0", "prompt": "Who wins?", "steps": [{"i": 0, "type": "step", "content": "x"}],
            "final_answer": answer, "completion": f"Answer: {answer}", "score": int(answer == "win"), "num_tokens": 3,
            "logprob": -0.5, "verdict": "correct" if answer == "win" else "wrong",
            "meta": {"eval_id": "1", "expected_answer": "win", "category": "all", "model": side, "eval_set": "toy",
                     "weights_sha256": side, "eval_set_sha256": "0", "source": "evaluation", "decoding": {},
                     "sample": 0},
        }  # fmt: skip
        (disk.folder / f"{side}.jsonl").write_text(json.dumps(record) + "\n")
    sides = [word for side in ("before", "after") for word in (f"--{side}", disk.folder / f"{side}.jsonl")]
    words = ("eval", "report", *sides, "--output", disk.folder / "delta_report.md")
    (disk.folder / "delta_report.md").write_text("old")
    return {"tries": [refused(disk, *words)], "after": damage.command(*words).status}


def notebook(disk: Disk) -> dict[str, Any]:
    """A notebook that is executed again: the one of the time before stays where there is no room for its successor."""
    run = create_run(load_config("configs/smoke.yaml"), "again")
    source = notebooks.source_of("01_traces").read_text()
    kept, scratch = [run.path("01_traces.ipynb"), run.path("01_traces.html")], run.path(".01_traces.tmp.ipynb")
    for path in kept:
        path.write_text("old")
    scratch.write_text(source)
    said = ""
    with disk.full():
        try:
            notebooks._publish(scratch, run, "01_traces")
        except OSError as error:
            said = f"error: {error.filename}: {error.strerror}\n"
    intact = all(path.read_text() == "old" for path in kept) and not scratch.exists()
    scratch.write_text(source)
    notebooks._publish(scratch, run, "01_traces")
    renewed = all(path.read_text() != "old" for path in kept)
    return {"tries": [{"status": int(bool(said)), "said": said, "intact": intact}], "after": int(not renewed)}


def manifest(disk: Disk) -> dict[str, Any]:
    """A run whose disk is full from its second stage on: with no room for a manifest, and with some."""

    def execute(stage: notebooks.Stage, run: Run, deadline: float) -> str:
        if stage.name == "02_dataset":
            disk.fill(leave)
        write_json(run.path(STUBS.get(stage.name, f"{stage.name}.ipynb")), ["x" * 200_000])
        return run.conclude(stage.name, "Done.")

    pipeline.execute, tries = execute, []
    words = ("run", "configs/smoke.yaml", "--name")
    for name, leave in {"none": 0, "some": 131_072}.items():
        said = damage.command(*words, name)
        [folder] = (disk.folder / "home").glob(f"*_{name}")
        left = sorted(path.name for path in folder.rglob("*.tmp*"))
        status = status_of(folder)
        disk.free()
        leave = 1 << 40
        pipeline.execute = lambda stage, run, deadline: run.conclude(stage.name, "Done.")
        again = damage.command("resume", folder)
        pipeline.execute = execute
        tries.append({"status": said.status, "said": said.err, "intact": not left, "run": status})
        assert status_of(folder) == "done" and not again.err, again
    return {"tries": tries, "after": 0}


def checkpoint(disk: Disk) -> dict[str, Any]:
    """A training whose disk is full when its second checkpoint is saved; then it has room again, and goes on."""
    settings = subject.settings(checkpoint_every=1)
    words = ("train", "--config", "configs/smoke.yaml", *settings, "--data", disk.data, "--output", disk.folder / "run")
    save = loop.save_checkpoint

    def on_full_disk(folder: Path, state: Any, digest: str) -> None:
        if int(state.step) == 2:
            disk.fill(leave=1 << 20)
        save(folder, state, digest)

    loop.save_checkpoint = on_full_disk
    failed = damage.command(*words)
    loop.save_checkpoint = save
    left = sorted(path.name for path in (disk.folder / "run" / "checkpoints").iterdir())
    whole = [name for name in left if storage.is_saved(disk.folder / "run" / "checkpoints" / name)]
    told = status_of(disk.folder / "run")
    disk.free()
    resumed = damage.command(*words)
    tries = [{"status": failed.status, "said": failed.err, "intact": left == ["1", "inputs.json"], "run": told}]
    return {"tries": tries, "after": resumed.status, "whole": whole, "resumed": resumed.out}


def main(folder: Path, by: str, data: Path) -> None:
    disk = Disk(folder, by, data)
    os.environ["RETRACE_HOME"] = str(folder / "home")
    found = {fault.__name__: fault(disk) for fault in (store, dataset, export, report, notebook, manifest, checkpoint)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
