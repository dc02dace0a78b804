"""The whole main job as one command: the five notebooks, in order, into one run folder; the manifest last.

    run = run_pipeline(load_config("configs/quickstart.yaml", ["training.num_steps=50"]))

04_evaluate is executed twice, for the base before training and for the tuned model after it.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.config import Config
from lib.data.dataset import dataset_key
from lib.experiments.manifest import hash_files, save_code, write_manifest
from lib.experiments.notebooks import Stage, execute
from lib.experiments.run import STATE, Run, create_run
from lib.experiments.stages import datasets, find_eval_set

STAGES = [
    Stage("01_traces", "01_traces", {}),
    Stage("02_dataset", "02_dataset", {}),
    Stage("04_evaluate_before", "04_evaluate", {"model": "before"}),
    Stage("03_train", "03_train", {}),
    Stage("04_evaluate_after", "04_evaluate", {"model": "after"}),
    Stage("05_compare", "05_compare", {}),
]


def run_pipeline(config: Config, name: str = "", say: Callable[[str], None] = print) -> Run:
    """Execute the main job of this configuration into a new run folder, and write its manifest.

    Raises RequestError before anything is written where the request is wrong, RetraceError where a notebook
    fails; the manifest then says so, and what was made stays.
    """
    preflight(config)
    run = create_run(config, name)
    run.update(code=save_code(run.folder))
    say(f"{run.name}: {len(STAGES)} stages, from {config.name}")
    wall_s: dict[str, float] = {}
    status, error = "done", ""
    try:
        for stage in STAGES:
            _execute(stage, run, wall_s, say)
    except BaseException as failure:
        status, error = "failed", str(failure) or type(failure).__name__
        if isinstance(failure, KeyboardInterrupt):
            status, error = "interrupted", f"interrupted in {run.state.get('stage', 'its first moment')}"
        raise
    finally:
        _close(run, status, wall_s, error)
    return run


def preflight(config: Config) -> None:
    """Refuse, before a run folder is made, what could only fail later: the eval set and the weights must be there."""
    from lib.model.weights import find_released, is_from_scratch

    find_eval_set(config.evaluation.eval_set)
    if not is_from_scratch(config.model.name):
        find_released(config.model.name)


def _execute(stage: Stage, run: Run, wall_s: dict[str, float], say: Callable[[str], None]) -> None:
    run.update(stage=stage.name)
    started = time.perf_counter()
    try:
        conclusion = execute(stage, run)
    finally:
        wall_s[stage.name] = time.perf_counter() - started
    say(f"  {stage.name:<20} {wall_s[stage.name]:6.1f} s  {conclusion}")


def _close(run: Run, status: str, wall_s: dict[str, float], error: str) -> None:
    """The manifest, as the last file; then nobody is at work here any more."""
    trained = _read(run.path("checkpoint-final", "model.json"))
    dataset = _read(datasets() / dataset_key(run.config.dataset) / "manifest.json")
    eval_set = find_eval_set(run.config.evaluation.eval_set)
    write_manifest(
        run.folder,
        run.config,
        status,
        identity=run.state,
        inputs={
            "dataset": {"key": dataset_key(run.config.dataset), "content_sha256": dataset.get("content_sha256")},
            "eval_set": {"name": eval_set.name, "sha256": eval_set.sha256},
            "training": trained.get("inputs"),
        },
        artifacts=hash_files(run.folder),
        metrics={
            "training": trained.get("training"),
            "weights_sha256": trained.get("weights_sha256"),
            "evaluation": _read(run.path("comparison.json")) or None,
        },
        wall_s=wall_s,
        fingerprint=trained.get("fingerprint"),
        error=error,
    )
    run.path(STATE).unlink()


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that a stage wrote; empty where it did not come to it."""
    return json.loads(path.read_bytes()) if path.is_file() else {}
