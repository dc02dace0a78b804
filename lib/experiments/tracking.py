"""Trackers that people have already are told of a run: TensorBoard while it trains, MLflow when it ends.

    check_tracking(config)                     # before anything runs: is what they need installed?
    track(run.folder, ["mlflow"], say)         # once a run has its manifest, however it ended; again changes nothing

An MLflow run has the folder's name, the run's own id as the tag `retrace.run_id`, the configuration as parameters, the
logged lines and the verdict's figures as metrics, and the report, manifest and evaluation outputs as artefacts. It is
found again by that tag: a run that went on after an interruption stays one, and no step is logged twice.

Where to: MLFLOW_TRACKING_URI, as everywhere, else a database in the home. The experiment: MLFLOW_EXPERIMENT_NAME, else
the name in the configuration.
"""

import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from lib.errors import RequestError, RetraceError
from lib.experiments.compare_runs import leaves
from lib.experiments.run import MANIFEST, read_manifest, trained_on
from lib.experiments.stages import command
from lib.files import home, sha256_bytes, shown_path

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow"}
ARTEFACTS = (
    MANIFEST, "config.yaml", "report.html", "delta_report.md", "eval_summary.json", "metrics.jsonl",
    "eval_before.jsonl", "eval_after.jsonl",
)  # fmt: skip
STATUS = {"done": "FINISHED", "interrupted": "KILLED", "timed_out": "KILLED"}
RUN_ID = "retrace.run_id"
MANNERS = {  # of MLflow: nobody else is told, and a server that is away, or does not answer, does not hold us up
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
BATCH = 100  # parameters, and metrics, that a server takes at once

Say = Callable[[str], None]


def check_tracking(targets: Iterable[str]) -> None:
    """Raises RequestError where a tracker's package is not installed."""
    for name in targets:
        try:
            importlib.metadata.version(PACKAGES[name])
        except importlib.metadata.PackageNotFoundError:
            raise RequestError(
                f"tracking: {name} needs {PACKAGES[name]}, which is not installed; install it with: "
                f"python -m pip install -r requirements-{name}.txt"
            ) from None


def track_ended(folder: Path, targets: Iterable[str], say: Say) -> None:
    """Tell MLflow, where it is to be told, of a run that has just ended; a server that fails does not fail the run."""
    if "mlflow" not in targets or not (folder / MANIFEST).is_file():
        return
    try:
        track(folder, ["mlflow"], say)
    except Exception as error:  # whatever the record holds: the run is over, and stays what it is
        name = folder.name if folder.resolve().parent == home() else str(folder.resolve())
        say(f"{error}; again: {command('runs', 'track', name, '--to', 'mlflow')}")


def track(folder: Path, targets: Iterable[str], say: Say) -> dict[str, str]:
    """Tell these trackers of a run that has a manifest. Returns where each was told. Raises RetraceError."""
    check_tracking(targets)
    manifest = read_manifest(folder)
    lines = _logged(folder, manifest["artifacts"])
    told = {}
    if "tensorboard" in targets:
        from lib.training.events import write_events

        if not lines:
            raise RequestError(f"{shown_path(folder)}: nothing was logged, so TensorBoard has nothing to show")
        told["tensorboard"] = shown_path(write_events(folder, lines))
        say(f"TensorBoard: {told['tensorboard']}; make tensorboard shows it")
    if "mlflow" in targets:
        try:
            told["mlflow"] = _tell_mlflow(folder, manifest, lines)
        except Exception as error:  # whatever a server, a network and the library between them raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise RetraceError(f"MLflow was not told ({reason})") from None
        say(f"MLflow: {told['mlflow']}")
    return told


def _tell_mlflow(folder: Path, manifest: dict[str, Any], lines: list[dict[str, float]]) -> str:
    """Returns where the run is: its id there, the experiment and the tracking store."""
    for name, value in MANNERS.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow.entities import Metric, Param

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri, place = _store()
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or manifest["config"]["name"]
    known = client.get_experiment_by_name(experiment)
    number = known.experiment_id if known else client.create_experiment(experiment, artifact_location=place)
    found = client.search_runs([number], f"tags.`{RUN_ID}` = '{manifest['run_id']}'")
    start, end = _milliseconds(manifest["created_at"]), _milliseconds(manifest["finished_at"])
    run = found[0] if found else client.create_run(number, start, {RUN_ID: manifest["run_id"]}, folder.name)
    id = run.info.run_id

    logged = {key: {metric.step for metric in client.get_metric_history(id, key)} for key in run.data.metrics}
    figures = [*_training(lines, start), *_verdict(manifest, end)]
    new = [Metric(*figure) for figure in figures if figure.step not in logged.get(figure.key, ())]
    settings = {name: str(value)[:6000] for name, value in leaves(manifest["config"])}
    params = [Param(*setting) for setting in settings.items() if setting[0] not in run.data.params]
    for at in range(0, max(len(new), len(params)), BATCH):
        client.log_batch(id, metrics=new[at : at + BATCH], params=params[at : at + BATCH])
    for key, value in _tags(manifest).items():
        client.set_tag(id, key, value)
    for file in ARTEFACTS:
        if (folder / file).is_file():
            client.log_artifact(id, str(folder / file))
    client.set_terminated(id, STATUS.get(manifest["status"], "FAILED"), end)
    return f"run {id} of experiment {experiment} in {uri}"


class Figure(NamedTuple):
    """One point; `timestamp` in milliseconds since 1970."""

    key: str
    value: float
    timestamp: int
    step: int


def _store() -> tuple[str, str | None]:
    """Where runs are told, and where their artefacts go, unless the server says."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, None
    place = home() / "mlflow"
    place.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{place / 'mlflow.db'}", (place / "artifacts").as_uri()


def _training(lines: list[dict[str, float]], start: int) -> Iterator[Figure]:
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "seconds"):
                yield Figure(f"training/{name}", value, start + int(1000 * line["seconds"]), int(line["step"]))


def _verdict(manifest: dict[str, Any], end: int) -> Iterator[Figure]:
    """The figures of the verdict, and the seconds of each stage."""
    evaluation = manifest["metrics"].get("evaluation") or {}
    for side in ("before", "after"):
        if side in evaluation:
            yield Figure(f"evaluation/accuracy_{side}", evaluation[side]["accuracy"], end, 0)
    for name in ("difference", "p_value", "n", "fixed", "broken"):
        if name in evaluation:
            yield Figure(f"evaluation/{name}", float(evaluation[name]), end, 0)
    for stage, seconds in manifest["wall_s"].items():
        yield Figure(f"seconds/{stage}", seconds, end, 0)


def _tags(manifest: dict[str, Any]) -> dict[str, str]:
    """What a run is searched by; the last two are names of MLflow's own."""
    evaluation = manifest["metrics"].get("evaluation") or {}
    tags = {
        "retrace.status": manifest["status"],
        "retrace.dataset": trained_on(manifest),
        "retrace.verdict": evaluation.get("sentence"),
        "retrace.weights_sha256": manifest["metrics"].get("weights_sha256"),
        "mlflow.source.git.commit": manifest.get("git_sha"),
        "mlflow.source.name": "python -m lib",
    }
    return {key: value for key, value in tags.items() if value}


def _logged(folder: Path, artifacts: dict[str, Any]) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl; the last may be cut by a kill. Raises RequestError where it was changed."""
    file = folder / "metrics.jsonl"
    content = file.read_bytes() if file.is_file() else b""
    if sha256_bytes(content) != artifacts.get(file.name, {}).get("sha256", sha256_bytes(b"")):
        raise RequestError(f"{shown_path(file)}: not as {MANIFEST} says, so nobody is told of it")
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def _milliseconds(stamp: str) -> int:
    return int(1000 * datetime.fromisoformat(stamp).timestamp())
