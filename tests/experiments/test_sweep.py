"""A sweep for real: stopped, killed and gone on with, it comes to what the same trials come to one after the other."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from inert import static_problems
from small import CONFIG, SMALL, SmallRun

from lib.__main__ import main
from lib.config import load_config, to_dict, to_yaml
from lib.experiments import stages
from lib.experiments.evidence import EVIDENCE
from lib.experiments.run import at_work, list_runs, open_run, read_manifest
from lib.files import repository_root

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("processes_compile_once")]

SEEDS = [7, 8]  # the first is that of the smoke configuration
PATIENCE = 300  # seconds for anything that must come


class Toy(NamedTuple):
    """A sweep over two seeds, in a home of its own."""

    home: Path
    file: Path

    @property
    def folder(self) -> Path:
        [folder] = (self.home / "sweeps").iterdir()
        return folder

    @property
    def runs(self) -> list[Path]:
        """Run folders, by the number of their trial."""
        return sorted(self.home.glob("*_toy-*"), key=lambda folder: folder.name[-1])

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "lib", *(words or ("sweep", str(self.file)))], cwd=repository_root(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"RETRACE_HOME": str(self.home)},
        )  # fmt: skip

    def past(self, stage: str, number: int) -> bool:
        """Whether the trial has come past a stage."""
        return any((run / "stages" / f"{stage}.json").is_file() for run in self.runs if run.name.endswith(f"-{number}"))


def until(there: Callable[[], Any], process: subprocess.Popen) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := there()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def commands(process: subprocess.Popen, number: int) -> list[psutil.Process]:
    """The command of a trial."""
    children = psutil.Process(process.pid).children()
    return [child for child in children if child.cmdline()[-2:] == ["--trial", str(number)]]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "base.yaml").write_text(to_yaml(load_config(CONFIG, SMALL)))
    (folder / "toy.yaml").write_text(
        f"name: toy\nbase: {folder}/base.yaml\nvary: {{training.seed: {SEEDS}}}\nexecution: {{at_once: 2}}\n"
    )
    yield Toy(folder / "home", folder / "toy.yaml")


@pytest.fixture
def in_its_home(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRACE_HOME", str(toy.home))


# One sweep, which is stopped in one way after the other; each test takes it as the one before left it.


def test_asked_to_end_a_sweep_ends_its_trials_which_record_it(toy, in_its_home):
    process = toy.start()
    until(lambda: toy.past("01_traces", 1) and toy.past("01_traces", 2), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and said.startswith("error: terminated"), said
    assert gone(family) and [row["status"] for row in list_runs()] == ["interrupted"] * 2
    assert not (toy.folder / "sweep.html").exists()


def test_killed_it_is_started_again_and_waits_for_the_trial_that_lives_on(toy, in_its_home):
    killed = toy.start()
    until(lambda: commands(killed, 1) and commands(killed, 2), killed)
    [first], [second] = commands(killed, 1), commands(killed, 2)
    until(lambda: toy.past("02_dataset", 2), killed)
    killed.kill()
    killed.communicate()
    first.kill()
    again = toy.start()
    until(lambda: commands(again, 1), again)
    refused = toy.start()
    assert "another process is at work in it" in refused.communicate(timeout=PATIENCE)[1] and refused.returncode == 2
    until(lambda: toy.past("04_evaluate_before", 1), again)
    for command in commands(again, 1):  # as where memory was not enough
        command.kill()
    said, error = again.communicate(timeout=PATIENCE)
    assert again.returncode == 1 and "training.seed=7  failed: its process was ended by signal 9" in said
    assert error.startswith(f"error: {toy.folder.name}: 1 of 2 trials not done: ") and error.count("\n") == 1
    assert gone([second]) and len(toy.runs) == 2
    attempts = read_manifest(toy.runs[1])["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["interrupted", "done"]  # the second was by the killed sweep
    told = json.loads((toy.folder / "sweep.json").read_bytes())
    assert "01_traces" in (toy.folder / f"{told['trials'][1]['run'][16:]}.log").read_text()
    assert [(trial["status"], trial["error"]) for trial in told["trials"]] == [
        ("stale", "its process was ended by signal 9"), ("done", ""),
    ]  # fmt: skip
    assert "1 of 2 trials not done" in (toy.folder / "sweep.html").read_text()


def test_resumed_it_comes_to_the_same_results_as_one_after_the_other(
    toy, in_its_home, small_run: SmallRun, monkeypatch, capsys
):
    before = {path: path.stat().st_mtime_ns for path in toy.runs[1].rglob("*")}
    done = toy.start("resume", toy.folder.name)
    said, error = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, error
    assert said.startswith(f"{toy.folder.name}: 2 trials, 1 done already; 2 at a time by processes\n")
    assert before == {path: path.stat().st_mtime_ns for path in toy.runs[1].rglob("*")}
    assert len(toy.runs) == 2 and [row["status"] for row in list_runs()] == ["done"] * 2
    for seed, run in zip(SEEDS, toy.runs, strict=True):
        config = load_config(toy.file.with_name("base.yaml"), [f"training.seed={seed}"])
        assert read_manifest(run)["config"] == to_dict(config)
    monkeypatch.setenv("RETRACE_HOME", str(toy.home.with_name("alone")))
    alone = open_run(str(toy.file.with_name("base.yaml")), overrides=f"training.seed={SEEDS[1]}")
    stages.write_report(alone)
    expected = [small_run.folder, alone.folder]
    found = [json.loads((folder / EVIDENCE).read_bytes())["results"] for folder in (*toy.runs, *expected)]
    assert found[:2] == found[2:] and found[0]["weights_sha256"] != found[1]["weights_sha256"]


def test_the_page_and_the_summary_tell_of_both_trials(toy, in_its_home, capsys):
    assert main(["sweep", toy.folder.name, "--json"]) == 0  # all is done, so it is told again
    captured = capsys.readouterr()
    told = json.loads(captured.out[captured.out.index("{\n") : captured.out.rindex("}") + 1])
    assert [trial["run"] for trial in told["trials"]] == [run.name for run in toy.runs]
    assert told["settings"] == {"NPROC": "2"} and told["fingerprints_differ_in"] == {}
    accuracy = [row["after"] for row in sorted(list_runs(), key=lambda row: row["run"][-1])]
    assert [trial["score"]["accuracy"] for trial in told["trials"]] == accuracy
    best = f"seed={SEEDS[told['best'] - 1]} has the highest accuracy"
    expected = "Both trials have the same accuracy" if len(set(accuracy)) == 1 else best
    assert told["headline"].startswith(expected) and told["headline"] in captured.out
    assert static_problems(toy.folder / "sweep.html") == []
    for run in toy.runs:
        assert (toy.folder / f"../../{run.name}/report.html").is_file()


def test_one_trial_alone_is_done_already_and_one_that_is_not_there_is_refused(toy, in_its_home, capsys):
    assert main(["sweep", toy.folder.name, "--trial", "2"]) == 0
    assert "is done already" in capsys.readouterr().out
    assert main(["sweep", toy.folder.name, "--trial", "3"]) == 2
    assert "--trial 3" in capsys.readouterr().err


def test_an_edited_sweep_and_one_at_work_are_not_gone_on_with(toy, in_its_home, capsys):
    with at_work(toy.folder):
        assert main(["resume", str(toy.folder)]) == 2
    assert "another process is at work in it" in capsys.readouterr().err
    text = (toy.folder / "sweep.yaml").read_text()
    try:
        (toy.folder / "sweep.yaml").write_text(text.replace("- 8", "- 9"))
        assert main(["resume", toy.folder.name]) == 2
        assert "was edited, or a configuration has other keys since; start it as" in capsys.readouterr().err
    finally:
        (toy.folder / "sweep.yaml").write_text(text)
