"""MLflow and TensorBoard are told what a run logged, each step once, however often it was interrupted or told.

Those of the marker `mlflow` write a real tracking store and real event files, and read them back by the packages' own
readers; `make test-mlflow` installs these into an environment of their own.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.__main__ import main
from lib.config import Config, DatasetConfig, ModelConfig, TrainingConfig, load_config
from lib.data.renderer import Example
from lib.errors import RequestError, RetraceError
from lib.experiments import tracking
from lib.experiments.manifest import artifact_names, hash_files, write_manifest
from lib.experiments.stages import command
from lib.experiments.tracking import check_tracking, track, track_ended
from lib.files import repository_root
from lib.model.weights import Model
from lib.training.events import event_files
from lib.training.loop import train

CONFIG = Config(
    "toy",
    DatasetConfig("toy", "v1"),
    model=ModelConfig(max_length=80),
    training=TrainingConfig(
        num_steps=8, learning_rate=3e-2, warmup_steps=2, per_device_batch_size=2,
        log_every=1, eval_every=4, checkpoint_every=3,
    ),
    tracking=["tensorboard"],
)  # fmt: skip
LINES = [{"step": step, "loss": 1.0 / step, "seconds": 0.5 * step} for step in (1, 2, 3)]


def ended(folder: Path, status: str = "done", lines: list[dict] = LINES) -> Path:
    """A run that came to this end, with what it logged."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    evaluation = {"before": {"accuracy": 0.25}, "after": {"accuracy": 0.75}, "difference": 0.5, "sentence": "Improved."}
    write_manifest(
        folder, CONFIG, status,
        identity={"run_id": "0b1e", "created_at": "2025-01-01T00:00:00Z"},
        attempts=[{"git_sha": "c0ffee"}], artifacts=hash_files(folder), inputs={},
        metrics={"evaluation": evaluation if status == "done" else None, "weights_sha256": None},
        wall_s={"03_train": 2.0}, fingerprint={},
    )  # fmt: skip
    return folder


# ---- where nothing is installed -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", tracking.PACKAGES)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(name, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tracking.PACKAGES, name, "no-package-of-this-name")
    tracked = ["--set", f"tracking=[{name}]"]
    trains = ["train", "--config", "configs/smoke.yaml", "--data", "absent.jsonl", "--output", str(tmp_path / "o")]
    for words in (["run", "configs/smoke.yaml"], trains, [*trains, "--dry-run"]):
        assert main([*words, *tracked]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        assert f"tracking: {name} needs " in said.err and f"pip install -r requirements-{name}.txt" in said.err
    assert not home.exists() and not (tmp_path / "o").exists()
    assert (repository_root() / f"requirements-{name}.txt").is_file()


def test_trackers_are_chosen_from_those_there_are():
    assert load_config("configs/smoke.yaml", ["tracking=[mlflow, tensorboard]"]).tracking == ["mlflow", "tensorboard"]
    assert load_config("configs/smoke.yaml").tracking == []
    for wrong in ("[wandb]", "[mlflow, mlflow]", "mlflow"):
        with pytest.raises(RequestError, match="tracking: expected"):
            load_config("configs/smoke.yaml", [f"tracking={wrong}"])
    check_tracking([])


def test_without_trackers_nothing_is_written(tmp_path):
    with event_files(tmp_path, [], LINES) as tell:
        tell(LINES[0])
    track_ended(ended(tmp_path), [], print)
    assert (
        artifact_names(tmp_path)
        == {"metrics.jsonl"}
        == {path.name for path in tmp_path.iterdir()} - {"run_manifest.json"}
    )


def test_event_files_are_no_artefact_of_a_run(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_text("")
    assert artifact_names(ended(tmp_path)) == {"metrics.jsonl"}


def test_a_tracker_that_fails_is_told_of_in_one_line_and_fails_no_run(home, tmp_path, monkeypatch, capsys):
    def fail(*given: object) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(tracking, "_tell_mlflow", fail)
    monkeypatch.setattr(tracking, "check_tracking", lambda targets: None)
    said: list[str] = []
    track_ended(ended(tmp_path / "toy"), ["mlflow"], said.append)
    again = command("runs", "track", str(tmp_path / "toy"), "--to", "mlflow")  # it lies beside the home
    assert said == [f"MLflow was not told (no route to host); again: {again}"] and f"--home {home}" in again
    assert main(["runs", "track", str(tmp_path / "toy"), "--to", "mlflow"]) == 1
    assert capsys.readouterr().err == "error: MLflow was not told (no route to host)\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text(file.read_text().replace("0.5", "0.6", 1)),
        lambda file: file.write_text("{\n" + file.read_text()),
        lambda file: file.unlink(),
    ],
    ids=["digit", "line", "missing"],
)
def test_nobody_is_told_of_lines_that_are_not_those_that_were_logged(change, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "check_tracking", lambda targets: None)
    monkeypatch.setattr(tracking, "_tell_mlflow", lambda *given: pytest.fail("it was told"))
    change(ended(tmp_path / "toy") / "metrics.jsonl")
    assert main(["runs", "track", str(tmp_path / "toy"), "--to", "mlflow"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path}/toy/metrics.jsonl: not as run_manifest.json says, so nobody is told of it\n"


def test_a_server_that_does_not_answer_holds_a_run_up_for_seconds_unless_its_user_says_otherwise(tmp_path, monkeypatch):
    for name in tracking.MANNERS:
        monkeypatch.setenv(name, "of the user")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    seen: list[str] = []

    def away(tracking_uri: str) -> None:
        seen.extend(os.environ[name] for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"))
        raise ConnectionError("timed out")

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=away))
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=None, Param=None))
    monkeypatch.setattr(tracking, "check_tracking", lambda targets: None)
    with pytest.raises(RetraceError, match=r"MLflow was not told \(timed out\)"):
        track(ended(tmp_path / "toy"), ["mlflow"], print)
    assert seen == ["of the user", "10"]


# ---- against the real ones ----------------------------------------------------------------------------------


def scalars(folder: Path, tag: str) -> list:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found.Scalars(tag)


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard would draw."""
    return [(point.step, point.value) for point in scalars(folder, tag)]


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line]


@pytest.mark.mlflow
def test_tensorboard_sees_each_logged_step_once_though_training_was_killed(
    small_model: Model, examples: list[Example], tmp_path: Path
):
    def killed(line: dict[str, float]) -> None:
        if line["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small_model, examples, CONFIG, tmp_path, killed)
    assert [step for step, _ in points(tmp_path, "training/loss")] == [1, 2, 3, 4, 5]
    result = train(small_model, examples, CONFIG, tmp_path)
    assert result.resumed_from == 3 and len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert points(tmp_path, "training/loss") == logged(tmp_path, "loss") and len(logged(tmp_path, "loss")) == 8
    assert points(tmp_path, "training/held_out_loss") == logged(tmp_path, "held_out_loss")
    untold = train(small_model, examples, replace(CONFIG, tracking=[]), tmp_path / "untold")
    assert untold.weights_sha256 == result.weights_sha256


@pytest.mark.mlflow
def test_tensorboard_is_told_of_a_run_that_is_over_when_each_step_was(tmp_path: Path):
    folder = ended(tmp_path / "toy")
    os.utime(folder / "metrics.jsonl", (1735689600, 1735689600))
    for _ in range(2):
        assert track(folder, ["tensorboard"], print) == {"tensorboard": str(folder / "tensorboard")}
    assert points(folder, "training/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [point.wall_time for point in scalars(folder, "training/loss")] == [1735689599.0, 1735689599.5, 1735689600]


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A client of a store in a database of its own."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)  # where artefacts go, which no server keeps
    from mlflow import MlflowClient

    return MlflowClient()


def runs_of(client, experiment: str = "toy") -> list:
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


@pytest.mark.mlflow
def test_mlflow_has_parameters_figures_artefacts_and_the_runs_own_id(mlflow_store, tmp_path):
    track(ended(tmp_path / "20250101_toy"), ["mlflow"], print)
    [run] = runs_of(mlflow_store)
    assert run.info.run_name == "20250101_toy" and run.info.status == "FINISHED"
    assert run.data.tags["retrace.run_id"] == "0b1e" and run.data.tags["mlflow.source.git.commit"] == "c0ffee"
    assert run.data.params["training.num_steps"] == "8" and run.data.params["dataset.filters"] == "{}"
    assert run.data.metrics["evaluation/accuracy_after"] == 0.75 and run.data.metrics["seconds/03_train"] == 2.0
    assert run.info.end_time > run.info.start_time == 1735689600000
    assert {"run_manifest.json", "metrics.jsonl"} == {
        file.path for file in mlflow_store.list_artifacts(run.info.run_id)
    }


@pytest.mark.mlflow
def test_a_run_that_went_on_stays_one_run_and_no_step_is_logged_twice(mlflow_store, tmp_path):
    folder = tmp_path / "toy"
    track(ended(folder, "interrupted", LINES[:2]), ["mlflow"], print)
    assert runs_of(mlflow_store)[0].info.status == "KILLED"
    for _ in range(2):
        track(ended(folder), ["mlflow"], print)
    [run] = runs_of(mlflow_store)
    found = mlflow_store.get_metric_history(run.info.run_id, "training/loss")
    assert [(point.step, point.value) for point in found] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [point.timestamp - run.info.start_time for point in found] == [500, 1000, 1500]
    assert len(mlflow_store.get_metric_history(run.info.run_id, "evaluation/difference")) == 1
    assert run.info.status == "FINISHED" and run.data.tags["retrace.verdict"] == "Improved."


@pytest.mark.mlflow
def test_a_server_that_is_away_fails_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    said: list[str] = []
    track_ended(ended(tmp_path / "toy"), ["mlflow"], said.append)
    assert len(said) == 1 and said[0].startswith("MLflow was not told (") and "runs track toy" in said[0]


@pytest.mark.mlflow
def test_a_whole_run_tells_both_and_is_verified_and_stopped_and_resumed(tmp_path, monkeypatch):
    from lib.experiments.run import list_runs

    home = tmp_path / "home"
    monkeypatch.setenv("RETRACE_HOME", str(home))
    small = ["training.num_steps=4", "training.warmup_steps=1", "training.log_every=1", "evaluation.limit=4"]
    changes = [word for change in [*small, "tracking=[tensorboard, mlflow]"] for word in ("--set", change)]

    def command(*words: str) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "lib", *words]
        return subprocess.run(line, cwd=repository_root(), capture_output=True, text=True)

    stopped = command("run", "configs/smoke.yaml", *changes, "--time-limit", "15")
    assert stopped.returncode == 1 and "MLflow: run " in stopped.stdout, stopped.stderr
    [run] = list_runs()
    done = command("resume", run["run"])
    assert done.returncode == 0 and "MLflow: run " in done.stdout, done.stderr
    folder = home / run["run"]
    assert points(folder, "training/loss") == logged(folder, "loss") and len(logged(folder, "loss")) == 4
    assert command("runs", "verify", run["run"]).returncode == 0
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    [told] = runs_of(client, "smoke")
    assert told.info.status == "FINISHED" and told.info.run_name == run["run"]
    assert "report.html" in {file.path for file in client.list_artifacts(told.info.run_id)}
    assert [point.step for point in client.get_metric_history(told.info.run_id, "training/loss")] == [1, 2, 3, 4]
