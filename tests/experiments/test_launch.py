"""The launcher: processes that start and stop together, by the command line as a user gives it."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from lib.__main__ import main
from lib.commands import models
from lib.commands.manners import say
from lib.data.dataset import Dataset
from lib.data.export import export_lines
from lib.errors import RequestError, RetraceError, Terminated
from lib.experiments import launch
from lib.files import repository_root
from lib.model import processes
from lib.model.weights import load_model

CONFIG = """\
name: toy
dataset: {dataset_name: toy, dataset_version: v1}
recipe: answer_sft_v1
model: {max_length: 96}
training: {num_steps: 10, learning_rate: 3.0e-3, per_device_batch_size: 8, log_every: 1, eval_every: 5,
           checkpoint_every: 4}
evaluation: {limit: 6, batch_size: 5, max_new_tokens: 8}
"""
DISTRIBUTED = pytest.mark.distributed


@pytest.fixture(scope="module")
def place(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration for one device, one for four, and a training file."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "one.yaml").write_text(CONFIG)
    (folder / "four.yaml").write_text(CONFIG + "parallelism: {fsdp: 2, tensor: 2}\n")
    (folder / "data.jsonl").write_bytes(b"".join(export_lines(dataset.traces, "tunix_sft", "answer_sft_v1", "")))
    return folder


def training(place: Path, config: str, output: str, *more: str) -> list[str]:
    return ["train", "--config", str(place / config), "--data", str(place / "data.jsonl"), "--output",
            str(place / output), *more]  # fmt: skip


def command(*words: str) -> subprocess.Popen:
    """`python -m lib …`, in which each process sees two devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.Popen(
        [sys.executable, "-m", "lib", *words], cwd=repository_root(), env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


class Ended(NamedTuple):
    status: int
    said: str
    errors: str


def launched(*words: str, kill: int | None = None) -> Ended:
    """The end of a job of two processes, of which one may be killed once the seventh step is logged."""
    job = command("launch", "--processes", "2", *words)
    said = ""
    if kill is not None:
        while not said.endswith("\n") or "step      7" not in said:
            said += job.stdout.readline() or pytest.fail(job.communicate()[1])
        [victim] = [
            child
            for child in psutil.Process(job.pid).children(recursive=True)
            if child.environ().get("JAX_PROCESS_ID") == str(kill)
        ]
        victim.kill()
    try:
        rest, errors = job.communicate(timeout=60 if kill is not None else 400)
    finally:
        job.kill()
    return Ended(job.returncode, said + rest, errors)


class Trained(NamedTuple):
    job: Ended
    weights_sha256: str


def digest(said: str) -> str:
    [line] = [line for line in said.splitlines() if line.startswith("weights sha256")]
    return line.split()[-1]


def logged(output: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def undisturbed(place: Path, processes_compile_once: None) -> Trained:
    job = launched(*training(place, "four.yaml", "undisturbed"))
    assert job.status == 0, job.errors
    return Trained(job, digest(job.said))


def test_only_what_several_processes_can_do_is_launched(capsys: pytest.CaptureFixture):
    for words in (["run", "configs/smoke.yaml"], ["eval", "report"], []):
        assert main(["launch", "--processes", "2", *words]) == 2
        assert "expected train … or eval generate …; a run is one process" in capsys.readouterr().err
    assert main(["launch", "--processes", "2", "train", "--confg", "x"]) == 2
    assert "did you mean --config?" in capsys.readouterr().err
    assert main(["launch", "--processes", "0", *training(Path("x"), "a", "b")]) == 2
    assert "--processes: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "failure, status",
    [
        (RequestError("refused"), 2),
        (RetraceError("failed"), 1),
        (Terminated(), 143),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 0),
        (FileNotFoundError(2, "No such file", "data.jsonl"), 2),
        (OSError(28, "No space left", "metrics.jsonl"), 1),
        (MemoryError(), 1),
    ],
    ids=repr,
)
def test_a_process_of_a_job_ends_by_the_status_of_a_command_alone(
    failure: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
):
    def fail(arguments: argparse.Namespace) -> None:
        raise failure

    left: list[int] = []
    monkeypatch.setattr(models, "train", fail)
    monkeypatch.setattr(processes, "join_job", lambda: None)
    monkeypatch.setattr(
        "lib.commands.launch.atexit", SimpleNamespace(register=lambda leave, status: left.append(status))
    )
    words = training(Path("x"), "a", "b")
    assert main(words) == main(["launch", *words]) == status and left == [status]


@pytest.mark.parametrize("words", [["-q", "launch"], ["launch", "-q"]])
def test_quiet_is_meant_for_the_processes_too(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    started: list[list[str]] = []
    monkeypatch.setattr(models, "train", lambda arguments: say("a remark"))
    monkeypatch.setattr(processes, "join_job", lambda: None)
    monkeypatch.setattr(launch, "start", lambda words, processes: started.append(words))
    asked = training(Path("x"), "a", "b")
    assert main([*words, "--processes", "2", *asked]) == main(["launch", *started[0]]) == main([*words, *asked]) == 0
    assert capsys.readouterr().out == "" and main(["launch", *asked]) == 0
    assert capsys.readouterr().out == "a remark\n"


@pytest.mark.parametrize(
    "commands, status, named",
    [
        (["sleep 0.5; exit 2", "exit 1"], 2, None),  # the first has said why itself
        (["sleep 0.5; exit 1", "exit 2"], 2, "process 1 of 2 ended with status 2"),
        (["exit 1", "kill -KILL $$"], 1, "process 1 of 2 was killed by SIGKILL"),
        (["exit 1", "kill -ABRT $$"], 1, None),
        (["exit 2", "kill -ABRT $$"], 2, None),
        (["exit 0", "kill -ABRT $$"], 1, "process 1 of 2 was killed by SIGABRT"),
        (["exit 0", "exit 0"], 0, None),
    ],
)
def test_the_process_that_began_it_is_named_not_those_that_end_because_of_it(
    commands: list[str], status: int, named: str | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    given = iter(commands)
    monkeypatch.setattr(
        launch, "_child", lambda words, environment, errors: subprocess.Popen(["sh", "-c", next(given)], stderr=errors)
    )
    try:
        assert main(["launch", "--processes", "2", *training(Path("x"), "a", "b")]) == status
    except SystemExit as end:
        assert end.code == status and not named
    assert (named or "") in (said := capfd.readouterr().err) and bool(said) == bool(named)


def test_what_is_kept_in_a_file_is_without_colours(monkeypatch: pytest.MonkeyPatch):
    given = []
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(
        launch, "_child", lambda words, environment, errors: given.append(environment) or subprocess.Popen("true")
    )
    launch.start([], 2)
    assert [environment.get("NO_COLOR") for environment in given] == [None, "1"]


@DISTRIBUTED
def test_a_job_that_does_not_fit_its_devices_is_refused_in_one_sentence(place: Path):
    job = launched(*training(place, "four.yaml", "refused", "--set", "parallelism.tensor=1"))
    assert job.status == 2 and "fsdp 2 × tensor 1 is 2 devices, and jax sees 4 in 2 processes" in job.errors
    assert job.errors.count("\n") <= 2 and "Traceback" not in job.errors
    assert not (place / "refused" / "run_manifest.json").exists()


@DISTRIBUTED
def test_two_processes_log_the_losses_of_one_device_and_save_what_one_device_reads(place: Path, undisturbed: Trained):
    assert main(training(place, "one.yaml", "alone")) == 0
    for name, count in [("loss", 10), ("held_out_loss", 2)]:
        expected = logged(place / "alone", name)
        assert len(expected) == count and logged(place / "undisturbed", name) == pytest.approx(expected, abs=1e-5)
    tuned = load_model(place / "undisturbed" / "checkpoint-final")
    assert tuned.weights_sha256 == undisturbed.weights_sha256
    manifest = json.loads((place / "undisturbed" / "run_manifest.json").read_bytes())
    assert manifest["status"] == "done" and manifest["fingerprint"]["processes"] == 2


@DISTRIBUTED
@pytest.mark.parametrize("victim", [1, 0])
def test_a_process_that_is_killed_ends_the_job_which_resumes_to_the_same_bits(
    victim: int, place: Path, undisturbed: Trained
):
    words = training(place, "four.yaml", f"killed-{victim}")
    job = launched(*words, kill=victim)
    assert job.status == 1 and "Traceback" not in job.errors
    assert f"process {victim} of 2 was killed by SIGKILL, so the others were stopped" in job.errors
    assert not (place / f"killed-{victim}" / "checkpoint-final").exists()
    again = launched(*words)
    assert again.status == 0, again.errors
    assert "resumed from step 4" in again.said and digest(again.said) == undisturbed.weights_sha256


@DISTRIBUTED
def test_two_processes_pass_over_a_damaged_checkpoint_together(place: Path, undisturbed: Trained):
    words = training(place, "four.yaml", "damaged")
    assert launched(*words, "--set", "training.checkpoint_every=2", kill=1).status == 1
    newest = max((place / "damaged" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    file = max((newest / "arrays").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = launched(*words, "--set", "training.checkpoint_every=2")
    assert again.status == 0, again.errors
    assert "falling back to the checkpoint before" in again.said and "resumed from step 4" in again.said
    assert digest(again.said) == undisturbed.weights_sha256


@DISTRIBUTED
def test_adapters_are_trained_by_two_processes_as_by_one(place: Path, processes_compile_once: None):
    more = ("--set", "training.lora={rank: 2}", "--set", "training.num_steps=3")
    job = launched(*training(place, "four.yaml", "lora", *more))
    assert job.status == 0, job.errors
    assert main(training(place, "one.yaml", "lora-alone", *more)) == 0
    assert logged(place / "lora", "loss") == pytest.approx(logged(place / "lora-alone", "loss"), abs=1e-5)
    assert load_model(place / "lora" / "checkpoint-final").weights_sha256 == digest(job.said)


@DISTRIBUTED
def test_two_processes_give_the_answers_of_one_device(place: Path, undisturbed: Trained):
    """The batch of five is rounded up to six, so that each part has as many rows."""
    asked = ["eval", "generate", "--model", str(place / "undisturbed" / "checkpoint-final"),
             "--eval-set", "high_card_duel_v1", "--set", "evaluation.sampling.temperature=0.7"]  # fmt: skip
    files = {name: place / f"{name}.jsonl" for name in ("four", "one")}
    words = {name: [*asked, "--config", str(place / f"{name}.yaml"), "--output", str(files[name])] for name in files}
    job = launched(*words["four"])
    assert job.status == 0, job.errors
    assert main(words["one"]) == 0
    answers = {name: [json.loads(line)["completion"] for line in file.open()] for name, file in files.items()}
    assert answers["four"] == answers["one"] and len(answers["one"]) == 6
