"""Runs that are stopped, killed and fought over, for real: whatever happens, they tell it truly and end the same.

RETRACE_FAULTS=full in the environment kills at every point and at fifty moments, which takes half an hour; without
it some are chosen. The faults come from outside, see inject/sitecustomize.py.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import subject
import sweep
from small import CONFIG, RUN, SMALL, as_words
from subject import FULL, Command, alive, gone_within, temporary, torn

from lib.__main__ import main
from lib.config import load_config
from lib.errors import RequestError, RetraceError
from lib.experiments import run as run_module
from lib.experiments import stages
from lib.experiments.run import (
    at_work,
    create_run,
    end_orphan,
    is_at_work,
    list_runs,
    open_run,
    read_manifest,
    status_of,
)
from lib.files import atomic_write, repository_root

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("processes_compile_once")]

BEGIN = [*RUN, "--name", "victim"]
SEED = 22


def fault(at: str, do: str, **more: Any) -> dict[str, Any]:
    return {"at": at, "do": do, **more}


# ---- each write --------------------------------------------------------------------------------------------

WRITING = """
from pathlib import Path
from lib.files import atomic_write
atomic_write(Path({file!r}), "new" * 100_000)
"""


@pytest.mark.parametrize("before", [None, "old"], ids=["new file", "replaced file"])
@pytest.mark.parametrize("at, when", sweep.WRITES, ids=["before write", "before fsync", "before rename", "renamed"])
def test_f23_killed_while_it_is_written_a_file_is_the_old_one_or_the_new(at, when, before, tmp_path):
    file = tmp_path / "folder" / "file.json"
    if before:
        atomic_write(file, before)
    environment = os.environ | {
        "PYTHONPATH": str(subject.INJECT),
        "RETRACE_FAULT": json.dumps([fault(at, "kill", when=when)]),
    }
    words = [sys.executable, "-c", WRITING.format(file=str(file))]
    assert subprocess.run(words, cwd=repository_root(), env=environment).returncode == -signal.SIGKILL
    found = file.read_text() if file.is_file() else None
    assert found == ("new" * 100_000 if when == "after" else before)
    assert len(temporary(tmp_path)) == (when == "before")


# ---- the sweep ---------------------------------------------------------------------------------------------


def swept(which: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = [sys.executable, sweep.__file__, which, *([] if FULL else ["--few"])]
    with open(folder / "said", "w") as said:
        status = subprocess.run(words, cwd=repository_root(), stdout=subprocess.PIPE, stderr=said, text=True)
    *differences, count = status.stdout.splitlines() or [""]
    with capsys.disabled():
        print(f"\nkill sweep, {which}: {count}")
    assert status.returncode == 0, (differences, (folder / "said").read_text()[-3_000:])
    assert re.fullmatch(r"[1-9]\d* kills, 1 distinct hashes", count)


def test_f22_f23_f25_killed_at_each_write_of_the_runner_a_run_comes_to_the_same_end(tmp_path, capsys):
    swept("records", tmp_path, capsys)


def test_f24_f25_f26_killed_at_each_step_and_inside_each_save_a_training_comes_to_the_same_end(tmp_path, capsys):
    swept("training", tmp_path, capsys)


def test_f24_f25_killed_at_any_moment_of_a_save_a_training_comes_to_the_same_end(tmp_path, capsys):
    swept("moments", tmp_path, capsys)


def test_f22_f24_f25_killed_at_each_step_save_and_stage_boundary_a_run_comes_to_the_same_end(tmp_path, capsys):
    swept("pipeline", tmp_path, capsys)


# ---- a run that is stopped again and again -----------------------------------------------------------------


class Victim:
    """One run, which is stopped in one way after the other; each test takes it as the one before left it."""

    sleeper: psutil.Process | None = None  # a kernel of it that was stopped before it opened the run

    def __init__(self, home: Path):
        self.home = home

    @property
    def folder(self) -> Path:
        [folder] = self.begun
        return folder

    @property
    def begun(self) -> set[Path]:
        """A folder where a run was killed in its very first moment, before it said so, is not one."""
        return {
            path.parent for name in ("state.json", "run_manifest.json") for path in self.home.glob(f"*_victim*/{name}")
        }

    @property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.folder)

    def go_on(self, *words: str, faults: list[dict[str, Any]] | None = None) -> Command:
        """Begin the run, or go on with it."""
        return Command(self.home, *(["resume", self.folder] if self.begun else BEGIN), *words, faults=faults or [])


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    made = Victim(tmp_path_factory.mktemp("victim") / "home")
    yield made
    for process in alive(filter(None, [made.sleeper])):
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, processes_compile_once: None) -> Path:
    """The folder of the same job, done in this process, by hand, with nothing in its way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRACE_HOME", str(tmp_path_factory.mktemp("undisturbed")))
        run = open_run(CONFIG, overrides=" ".join(SMALL))
        stages.write_report(run)
    return run.folder


@pytest.fixture
def in_its_home(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRACE_HOME", str(victim.home))


STUCK = fault("lib.training.loop:_append", "sleep", text="metrics.jsonl", nth=2, who="kernel")  # it has a first line


def test_f20_a_run_out_of_time_is_timed_out_and_its_kernel_gone(victim, in_its_home, capsys):
    command = victim.go_on("--time-limit", "3")
    kernels = command.until(lambda: victim.begun and command.family(), "a kernel")
    status, _, said = command.end()
    assert status == 1 and re.fullmatch(r"error: \w+: the time limit was reached.*\n", said)
    assert victim.manifest["status"] == "timed_out" and "the time limit was reached (3 s)" in victim.manifest["error"]
    assert not alive(kernels) and not torn(victim.home) and not temporary(victim.home)
    main(["runs", "list"])
    assert capsys.readouterr().out.split()[:2] == [victim.folder.name, "timed_out"]


def test_f22_a_run_whose_runner_was_killed_at_any_moment_is_stale_and_whole(victim, in_its_home):
    moments, seen = random.Random(SEED), set()
    for _ in range(3):
        command = victim.go_on()
        command.until(lambda: victim.begun and is_at_work(victim.folder), "its lock")
        time.sleep(moments.uniform(0, 4))
        kernels = command.family()
        command.process.kill()
        assert command.end()[0] == -signal.SIGKILL
        assert not torn(victim.home) and gone_within(kernels, 5)
        seen.add(status_of(victim.folder))
    assert "stale" in seen and seen <= {"stale", "timed_out"}  # as it was, where it was killed in its first moment


@pytest.mark.parametrize(
    "sent, status",
    [([signal.SIGINT, signal.SIGINT], 130), ([signal.SIGTERM], 143)],
    ids=["SIGINT twice", "SIGTERM"],
)
def test_f21_f32_f34_a_run_that_is_interrupted_says_so_and_takes_its_kernel_along(
    sent, status, victim, in_its_home, capsys
):
    command = victim.go_on(faults=[STUCK])
    kernel = psutil.Process(command.struck()["pid"])
    assert status_of(victim.folder) == "running" and (victim.folder / "metrics.jsonl").is_file()
    assert main(["resume", victim.folder.name]) == 2
    assert re.fullmatch(r"error: .*: another process is at work in it; .*\n", capsys.readouterr().err)
    assert status_of(victim.folder) == "running"
    (victim.home / "datasets" / ".smoke-v1.killed_1.tmp").mkdir()  # of one that was killed as it built
    kernels = {kernel, *command.family()}
    for number in sent:
        command.process.send_signal(number)
        time.sleep(0.1)
    ended = command.end()
    assert ended[0] == status and len(ended[2].splitlines()) == 1 and gone_within(kernels, 5)
    assert victim.manifest["status"] == "interrupted" and "03_train" in victim.manifest["error"]
    notebook = nbformat.read(victim.folder / "03_train.ipynb", as_version=4)
    texts = {cell.id: str(cell.get("outputs")) for cell in notebook.cells}
    assert " parameters, " in texts["plan"] and texts[notebook.cells[-1].id] == "[]"
    assert not torn(victim.home) and not temporary(victim.home)
    main(["runs", "list"])
    assert capsys.readouterr().out.split()[:2] == [victim.folder.name, "interrupted"]


def test_f33_f34_a_kernel_that_outlives_its_runner_is_ended_before_the_run_goes_on(victim, in_its_home):
    command = victim.go_on(faults=[STUCK | {"do": "orphan"}])
    orphan = psutil.Process(command.struck()["pid"])
    try:
        assert command.end()[0] == -signal.SIGKILL and orphan.status() == psutil.STATUS_STOPPED
        assert free_within(victim.folder, 5) and status_of(victim.folder) == "stale"
        following = victim.go_on(faults=[fault("lib.experiments.run:open_run", "orphan", who="kernel")])
        victim.sleeper = psutil.Process(following.struck()["pid"])
        assert following.end()[0] == -signal.SIGKILL and not alive([orphan])
    finally:
        for process in alive([orphan]):
            process.kill()


def test_f20_f21_f22_f25_f34_however_often_it_was_stopped_it_comes_to_the_same_end(victim, in_its_home, undisturbed):
    status, _, said = victim.go_on().end()
    assert status == 0, said
    assert subject.results(victim.folder) == subject.results(undisturbed)
    assert status_of(victim.folder) == "done" and not torn(victim.home) and not temporary(victim.home)
    assert main(["runs", "verify", victim.folder.name]) == 0
    before = {path: path.stat().st_mtime_ns for path in victim.folder.rglob("*")}
    if victim.sleeper:  # of an attempt before, it wakes up when all is done
        victim.sleeper.resume()
        assert gone_within([victim.sleeper], 30)
    assert main(["resume", victim.folder.name]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in victim.folder.rglob("*")}


# ---- one folder, two processes -----------------------------------------------------------------------------


def free_within(folder: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_at_work(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_f32_f33_of_two_trainings_in_one_folder_the_second_is_refused_until_the_first_is_killed(
    undisturbed, tmp_path, capsys
):
    (tmp_path / "data").mkdir()
    for file in (undisturbed / stages.EXPORT, undisturbed.parent / "datasets" / "smoke-v1" / "tokenizer.json"):
        shutil.copy(file, tmp_path / "data")
    train = ["train", "--config", CONFIG, *as_words(SMALL), "--data", str(tmp_path / "data" / stages.EXPORT)]
    train += ["--output", str(tmp_path / "out")]
    first = Command(tmp_path / "home", *train, faults=[STUCK | {"do": "stop", "who": "runner"}])
    first.struck()  # it hangs, and so is at work
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main(train) == 2
    assert re.fullmatch(r"error: .*: another process is at work in it; .*\n", capsys.readouterr().err)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    first.process.kill()
    assert first.end()[0] == -signal.SIGKILL and free_within(tmp_path / "out", 5)
    assert status_of(tmp_path / "out") == "stale"
    assert main(train) == 0
    expected = subject.results(undisturbed)["weights_sha256"]
    assert f"weights sha256 {expected}\n" in capsys.readouterr().out
    assert status_of(tmp_path / "out") == "done" and not temporary(tmp_path)


def test_f32_runs_of_the_same_second_have_folders_of_their_own(home):
    config = load_config("configs/smoke.yaml")
    with ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(lambda number: create_run(config, "same"), range(8)))
    assert len({run.folder for run in runs}) == len({run.state["run_id"] for run in runs}) == 8
    assert {load_config(run.path("config.yaml")) == config for run in runs} == {True}


def test_f22_f25_at_random_moments_of_a_run_its_runner_is_killed(tmp_path, undisturbed, monkeypatch, capsys):
    """One run after the other, each resumed until it is done in spite of the kills."""
    moments, kills, finished = random.Random(SEED), 0, 0
    victim = Victim(tmp_path / "0")
    enough = 50 if FULL else 1
    while kills < enough or not finished:
        monkeypatch.setenv("RETRACE_HOME", str(victim.home))
        command = victim.go_on()
        try:
            command.process.wait(moments.uniform(0, 25) if kills < enough else subject.PATIENCE)
        except subprocess.TimeoutExpired:
            kernels = command.family()
            command.process.kill()
            kills += 1
        status, _, said = command.end()
        assert status in (0, -signal.SIGKILL), said
        assert not torn(victim.home) and (status == 0 or gone_within(kernels, 5))
        found = [row["status"] for row in list_runs()]
        assert found in ([], ["stale"], ["done"]) and (status or found == ["done"])
        if found == ["done"]:
            assert subject.results(victim.folder) == subject.results(undisturbed)
            finished += 1
            victim = Victim(tmp_path / str(finished))
    with capsys.disabled():
        print(f"\nkills at random moments: {kills}, {finished} runs came to the same end")


KERNEL = """
import sys, time
from lib.experiments.run import open_run
open_run(f"{sys.argv[1]}/config.yaml", sys.argv[1])
print("opened", flush=True)
time.sleep(600)
"""


def test_f34_a_run_has_one_kernel_at_a_time(home, monkeypatch):
    monkeypatch.setattr(run_module, "ORPHAN_SECONDS", 0.2)
    run = create_run(load_config("configs/smoke.yaml"))
    words = [sys.executable, "-c", KERNEL, str(run.folder)]
    with subprocess.Popen(words, cwd=repository_root(), stdout=subprocess.PIPE, text=True) as kernel:
        assert kernel.stdout.readline() == "opened\n"
        with pytest.raises(RequestError, match="another kernel works in this run"):
            open_run(str(run.path("config.yaml")), str(run.folder))
        with pytest.raises(RetraceError, match="could not be stopped .*kernel.pid.*; stop it and resume again"):
            end_orphan(run.folder)  # as it is no ipykernel, it is not shot
        assert kernel.poll() is None
        kernel.kill()
    end_orphan(run.folder)
    assert open_run(str(run.path("config.yaml")), str(run.folder)).folder == run.folder


LOOK = """
import sys
from pathlib import Path
from lib.experiments.run import is_at_work
print(sum(is_at_work(Path(sys.argv[1])) for _ in range(3_000)))
"""


def test_f22_those_who_only_ask_whether_a_run_is_at_work_do_not_take_each_other_for_it(tmp_path):
    with at_work(tmp_path):
        pass
    words = [sys.executable, "-c", LOOK, str(tmp_path)]
    asking = [subprocess.Popen(words, cwd=repository_root(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in asking] == ["0\n", "0\n"]
