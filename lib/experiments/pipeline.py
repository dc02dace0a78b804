"""The whole main job as one command: the five notebooks, in order, into one run folder; the manifest last.

    run = run_pipeline(load_config("configs/quickstart.yaml", ["training.num_steps=50"]))
    run = resume_run("20261122_101500_quickstart")       # goes on where that one stopped, to the same end

04_evaluate is executed twice, for the base before training and for the tuned model after it.

A stage that came to its end leaves `stages/<stage>.json`: its conclusion, the files it made with their hashes,
and a key over everything it was made from (configuration, eval set, notebook, and what the stages before it
made). A resumed run executes again only those whose key or files are not what was recorded.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lib.config import Config, load_config
from lib.data.dataset import dataset_key, list_datasets, sweep_datasets
from lib.errors import RequestError
from lib.evaluation.scoring import check_scorers
from lib.experiments.evidence import EVIDENCE
from lib.experiments.index import write_index
from lib.experiments.manifest import artifact_names, hash_files, save_code, write_manifest
from lib.experiments.notebooks import Stage, TimeLimit, execute
from lib.experiments.run import (
    CONFIG,
    MANIFEST,
    STATE,
    Run,
    at_work,
    check_in_home,
    create_run,
    end_orphan,
    find_run,
    read_manifest,
    sweep,
)
from lib.experiments.stages import CONTROLS, EXPORT, OUTPUTS, datasets, find_eval_set, source_of
from lib.experiments.tracking import check_tracking, track_ended
from lib.files import home, is_sealed, sealed, sha256_bytes, sha256_file, shown_path, write_json
from lib.tasks import reasoning_gym, ungar
from lib.trace import utc_now

STAGES = [
    Stage("01_traces", "01_traces", {}),
    Stage("02_dataset", "02_dataset", {}, (EXPORT,)),
    Stage("04_evaluate_before", "04_evaluate", {"model": "before"}, (OUTPUTS["before"], CONTROLS["before"])),
    Stage("03_train", "03_train", {}, ("metrics.jsonl", "checkpoints.jsonl", "checkpoints/", "checkpoint-final/")),
    Stage("04_evaluate_after", "04_evaluate", {"model": "after"}, (OUTPUTS["after"], CONTROLS["after"])),
    Stage("05_compare", "05_compare", {}, ("delta_report.md", "eval_summary.json", EVIDENCE, "report.html")),
]
CONTINUED = ("metrics.jsonl", "checkpoint")  # what a stage goes on from, and proves itself; nothing else stays
PAGES = (".ipynb", ".html")  # what a stage shows; the stages after it are made from its other files

Say = Callable[[str], None]


def run_pipeline(config: Config, name: str = "", say: Say = print, time_limit: float = math.inf) -> Run:
    """Execute the main job of this configuration into a new run folder, and write its manifest.

    Raises RequestError before anything is written where the request is wrong, RetraceError where a notebook
    fails or `time_limit` seconds are over; the manifest then says so, and what was made stays.
    """
    preflight(config)
    run = create_run(config, name)
    with _indexed(), at_work(run.folder):
        say(f"{run.name}: {len(STAGES)} stages, from {config.name}")
        _drive(run, say, time_limit)
    return run


def resume_run(name: str, say: Say = print, time_limit: float = math.inf) -> Run:
    """Go on with a run that was interrupted, failed, killed or timed out; one that is done is left as it is.

    Raises RequestError where it is still at work, is no run of the pipeline or one of another home, or its
    configuration was edited.
    """
    folder = find_run(name)
    if not (folder / CONFIG).is_file():
        raise RequestError(f"{shown_path(folder)}: no {CONFIG}, so it is no run of the pipeline; "
                           "a training is resumed by its own command, given again")  # fmt: skip
    check_in_home(folder, folder.name)
    run = Run(folder, load_config(folder / CONFIG))
    with _indexed(), at_work(folder):
        if (folder / MANIFEST).is_file() and read_manifest(folder)["status"] == "done":
            say(f"{run.name}: is done already")
            run.path(STATE).unlink(missing_ok=True)  # it was killed between its manifest and this
            return run
        state = _resumable(run)
        preflight(run.config)
        end_orphan(folder)
        sweep(folder)
        _reopen(run, state)
        say(f"{run.name}: resumed")
        _drive(run, say, time_limit)
    return run


@contextmanager
def _indexed() -> Iterator[None]:
    """`index.html` of the home tells of the run, however it ended."""
    try:
        yield
    finally:
        for stray in home().glob(".index.html.*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - stray.stat().st_mtime > 60:  # its writer was killed, as it takes no second
                    stray.unlink()
        write_index(home() / "index.html")


def preflight(config: Config) -> None:
    """Refuse, before a run folder is made, what could only fail later: eval set, scorer, weights and engine."""
    from lib.model.released import find_released, is_from_scratch
    from lib.training.trainers import tunix_version

    check_tracking(config.tracking)
    check_scorers(find_eval_set(config.evaluation.eval_set).items)
    if config.traces.engine == "ungar":
        ungar.version(config.traces.ungar_python)
    if config.traces.engine == "reasoning-gym":
        reasoning_gym.version()
    if not is_from_scratch(config.model.name):
        find_released(config.model.name)
        from lib.model.weights import check_released  # imports jax: not before there is something to check

        check_released(config.model.name)
    if config.training.trainer == "tunix":
        tunix_version()


def _resumable(run: Run) -> dict[str, Any]:
    """What is recorded of a run that can go on. Raises RequestError where it cannot, before anything is touched."""
    state = read_manifest(run.folder) if run.path(MANIFEST).is_file() else run.state
    if state.get("by_hand"):
        raise RequestError(f"{shown_path(run.folder)}: belongs to notebooks executed by hand; start a run of its own")
    if state["config_sha256"] != sha256_file(run.path(CONFIG)):
        raise RequestError(f"{shown_path(run.path(CONFIG))}: edited since the run began; start a new run with it")
    return state


def _reopen(run: Run, state: dict[str, Any]) -> None:
    """The run as one at work: what its manifest says of it goes back to its state, and the manifest away."""
    kept = ("run_id", "created_at", "config_sha256", "attempts")
    write_json(run.path(STATE), {name: state[name] for name in kept if name in state})
    run.path(MANIFEST).unlink(missing_ok=True)


def _drive(run: Run, say: Say, time_limit: float) -> None:
    """Every stage that is not there yet, then the manifest, whatever happens."""
    deadline = time.monotonic() + time_limit
    earlier, begun = run.state.get("attempts", []), {"started_at": utc_now()}
    run.update(attempts=[*earlier, begun], stage="")
    status, error = "done", ""
    try:
        run.update(attempts=[*earlier, begun | save_code(run.folder)])
        chain = _origin(run)
        for stage in STAGES:
            chain = _link(chain, _made(stage, run, chain, say, deadline))
    except BaseException as failure:
        status, error = "failed", str(failure) or type(failure).__name__
        if isinstance(failure, TimeLimit):
            status, error = "timed_out", f"{failure} ({time_limit:g} s)"
        if isinstance(failure, KeyboardInterrupt):
            status, error = "interrupted", f"interrupted in {run.state['stage'] or 'its first moment'}"
        with suppress(OSError):
            sweep(run.folder)  # the kernel may have been killed while it wrote
        sweep_datasets(datasets())
        raise
    finally:
        _close(run, status, error)
        track_ended(run.folder, run.config.tracking, say)


# ---- stages, made once -------------------------------------------------------------------------------------


def _made(stage: Stage, run: Run, chain: str, say: Say, deadline: float) -> dict[str, Any]:
    """The record of a stage: the one that is there, where all it speaks of is as it says, or else a new one."""
    key = _link(chain, {"notebook": sha256_file(source_of(stage.notebook)), "parameters": stage.parameters})
    record = _record(run, stage)
    damaged = _damaged(run, stage, record)
    if record.get("key") == key and not damaged:
        say(f"  {stage.name:<20} {'kept':>8}  {record['sentence']}")
        return record
    if damaged:
        say(f"  {stage.name}: {', '.join(damaged)} not as recorded; made again")
        _discard(run, record, damaged)
    for name in _made_by(stage, run):
        if not name.startswith(CONTINUED):
            run.path(name).unlink()
    run.update(stage=stage.name)
    started = time.perf_counter()
    sentence = execute(stage, run, deadline)
    seconds = time.perf_counter() - started
    files = hash_files(run.folder, _made_by(stage, run))
    record = sealed(
        {"stage": stage.name, "sentence": sentence, "key": key, "wall_s": round(seconds, 2), "files": files}
    )
    write_json(run.path("stages", f"{stage.name}.json"), record)
    say(f"  {stage.name:<20} {seconds:6.1f} s  {sentence}")
    return record


def _origin(run: Run) -> str:
    """What the first stage is made from: the configuration and the eval set."""
    return sha256_bytes(
        f"{sha256_file(run.path(CONFIG))} {find_eval_set(run.config.evaluation.eval_set).sha256}".encode()
    )


def _link(chain: str, made: dict[str, Any]) -> str:
    """The key of what comes after: of all that came before, and of the files (but for pages) that were made here."""
    if "files" in made:
        made = {name: facts["sha256"] for name, facts in made["files"].items() if not name.endswith(PAGES)}
    return sha256_bytes(json.dumps([chain, made], sort_keys=True).encode())


def _record(run: Run, stage: Stage) -> dict[str, Any]:
    """What was recorded of a stage that came to its end; empty where it did not, or the record is not readable."""
    try:
        content = run.path("stages", f"{stage.name}.json").read_bytes()
        record = json.loads(content)
        return record if {"key", "files", "sentence", "wall_s"} <= record.keys() and is_sealed(content) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _damaged(run: Run, stage: Stage, record: dict[str, Any]) -> list[str]:
    """What a stage made and is not there as it was; the dataset is kept outside of the run, and checked when read."""
    found = [
        name
        for name, facts in record.get("files", {}).items()
        if not run.path(name).is_file() or sha256_file(run.path(name)) != facts["sha256"]
    ]
    key = dataset_key(run.config.dataset)
    if record and stage.name == "02_dataset" and key not in list_datasets(datasets()):
        found.append(f"dataset {key}")
    return found


def _discard(run: Run, record: dict[str, Any], damaged: list[str]) -> None:
    """What a stage made, where part of it is damaged. A tuned model alone is made again from its checkpoints."""
    if all(name.startswith("checkpoint-final/") for name in damaged):
        shutil.rmtree(run.path("checkpoint-final"), ignore_errors=True)
        return
    for name in record["files"]:
        if run.path(name).is_dir() and not run.path(name).is_symlink():
            shutil.rmtree(run.path(name))
        run.path(name).unlink(missing_ok=True)


def _made_by(stage: Stage, run: Run) -> set[str]:
    """The files of a stage that are there; one that was killed may have made some of them an attempt before."""
    own = (f"{stage.name}.ipynb", f"{stage.name}.html", *stage.makes)
    return {name for name in artifact_names(run.folder) if name.startswith(own)}


# ---- the end -----------------------------------------------------------------------------------------------


def _close(run: Run, status: str, error: str) -> None:
    """The manifest, as the last file; then nobody is at work here any more."""
    trained = _read(run.path("checkpoint-final", "model.json"))
    dataset = _read(datasets() / dataset_key(run.config.dataset) / "manifest.json")
    records = {stage.name: _record(run, stage) for stage in STAGES}
    *earlier, last = run.state["attempts"]
    attempts = [*earlier, last | {"ended_at": utc_now(), "status": status}]
    write_manifest(
        run.folder,
        run.config,
        status,
        identity={name: run.state[name] for name in ("run_id", "created_at", "config_sha256")},
        attempts=attempts,
        inputs={
            "dataset": {"key": dataset_key(run.config.dataset), "content_sha256": dataset.get("content_sha256")},
            "eval_set": _eval_set(run.config.evaluation.eval_set),
            "training": trained.get("inputs"),
        },
        artifacts=hash_files(run.folder),
        metrics={
            "training": trained.get("training"),
            "weights_sha256": trained.get("weights_sha256"),
            "evaluation": _read(run.path("eval_summary.json")) or None,
        },
        wall_s={name: record["wall_s"] for name, record in records.items() if record},
        fingerprint=trained.get("fingerprint"),
        error=error,
    )
    run.path(STATE).unlink()


def _eval_set(name: str) -> dict[str, str | None]:
    """Its name and hash; none of one that was damaged or removed meanwhile."""
    try:
        found = find_eval_set(name)
        return {"name": found.name, "sha256": found.sha256}
    except RequestError:
        return {"name": name, "sha256": None}


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that a stage wrote; empty where it did not come to it, and where the file is damaged."""
    with suppress(FileNotFoundError, ValueError):
        return dict(json.loads(path.read_bytes()))
    return {}
