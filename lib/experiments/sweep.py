"""A sweep at work: every trial an ordinary run, and one page at the end that compares them.

    report = run_sweep("configs/sweeps/lr.yaml")       # → runs/sweeps/lr-1f0c92ab/ and six run folders beside it
    report = resume_sweep(report.folder)               # what is done is kept, what was stopped goes on

A trial is executed by a command of its own, `python -m lib sweep FOLDER --trial 3`, which runs it, or goes on with it
as `resume RUN` does, under the settings that the sweep began with. concurrent.futures, or submitit where there is
Slurm, start these commands and wait for them; nothing here schedules anything. Whose run is whose is told by name: the
folder of a sweep is named after what its trials are, and a run after its sweep and trial, so that a sweep that was
killed finds everything again.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from filelock import FileLock

from lib.config import load_config, to_yaml
from lib.errors import RequestError
from lib.experiments.index import write_index
from lib.experiments.pipeline import preflight, resume_run, run_pipeline
from lib.experiments.run import at_work, check_in_home, status_of
from lib.experiments.sweep_report import Report, make_report, write_report
from lib.experiments.trials import SETTINGS, ExecutionConfig, SweepConfig, Trial, load_sweep, make_trials, run_of
from lib.files import atomic_write, child, home, shown_path, write_json

SWEEP, BASE = "sweep.yaml", "base.yaml"
INSTALL = "python -m pip install -r requirements-slurm.txt"

Say = Callable[[str], None]


class Planned(NamedTuple):
    """A sweep and all that it will do."""

    sweep: SweepConfig
    trials: list[Trial]

    @property
    def folder(self) -> Path:
        return child(home(), "sweeps", self.trials[0].name.rpartition("-")[0])


def plan(path: str) -> Planned:
    """What a file asks for, each trial's configuration built and checked. Raises RequestError, naming the trial."""
    sweep = load_sweep(path)
    trials = make_trials(sweep, sweep.base, path)
    for trial in trials:
        try:
            preflight(trial.config)
        except RequestError as error:
            raise RequestError(f"{path}: trial {trial.number} of {len(trials)} ({trial.label}): {error}") from None
    return Planned(sweep, trials)


def run_sweep(path: str, say: Say = print) -> Report:
    """Run the trials that a file asks for, but for those that are done, and write the page.

    Raises RequestError before anything is written where the request is wrong. A trial that fails does not stop the
    others; the report says so.
    """
    planned = plan(path)
    base, folder = load_config(planned.sweep.base), planned.folder
    with _executor(planned.sweep.execution, folder) as executor:
        folder.mkdir(parents=True, exist_ok=True)
        with at_work(folder):
            atomic_write(folder / BASE, to_yaml(base))
            atomic_write(folder / SWEEP, to_yaml(planned.sweep))
            if not (folder / SETTINGS).is_file():
                write_json(folder / SETTINGS, _settings())
            return _drive(folder, planned, executor, say)


def resume_sweep(folder: Path, say: Say = print) -> Report:
    """Go on with a sweep; where all trials are done, write its page again."""
    planned = read_sweep(folder)
    with _executor(planned.sweep.execution, folder) as executor, at_work(folder):
        return _drive(folder, planned, executor, say)


def read_sweep(folder: Path) -> Planned:
    """A sweep that was begun. Raises RequestError where its folder is named after another, or lies in another home."""
    sweep = load_sweep(folder / SWEEP)
    planned = Planned(sweep, make_trials(sweep, folder / BASE, str(folder / SWEEP)))
    if planned.folder.name != folder.resolve().name:
        raise RequestError(
            f"{shown_path(folder)}: {SWEEP} or {BASE} was edited, or a configuration has other keys since; start it as "
            "a sweep of its own"
        )
    check_in_home(folder, "sweeps", planned.folder.name)
    return planned


def run_trial(folder: Path, number: int, say: Say = print) -> None:
    """One trial, under the settings of its sweep: run, or gone on with, or left as it is where it is done.

    Waits where the trial is still at work for a sweep that was killed. Raises as `run_pipeline` and `resume_run` do.
    """
    trials = read_sweep(folder).trials
    if not 1 <= number <= len(trials):
        raise RequestError(f"--trial {number}: {shown_path(folder)} has trials 1 to {len(trials)}")
    trial = trials[number - 1]
    _take_settings(json.loads((folder / SETTINGS).read_bytes()))
    with FileLock(folder / f".{trial.name}.lock"):
        if run := run_of(trial):
            resume_run(str(run), say)
        else:
            run_pipeline(trial.config, trial.name, say)


# ---- all of them --------------------------------------------------------------------------------------------


def _drive(folder: Path, planned: Planned, executor: Any, say: Say) -> Report:
    """Every trial that is not done, then the page."""
    todo = [trial for trial in planned.trials if (run := run_of(trial)) is None or status_of(run) != "done"]
    execution = planned.sweep.execution
    say(
        f"{folder.name}: {len(planned.trials)} trials, {len(planned.trials) - len(todo)} done already; "
        f"{execution.at_once} at a time by {execution.executor}"
    )
    errors: dict[int, str] = {}
    for trial, error in _executed(folder, todo, executor):
        if error:
            errors[trial.number] = error
        say(f"  {trial.name}  {trial.label}  {f'failed: {error}' if error else 'done'}")
    settings = json.loads((folder / SETTINGS).read_bytes())
    report = make_report(folder, planned.sweep, planned.trials, settings, errors)
    write_report(report)
    write_index(home() / "index.html")
    return report


def _executed(folder: Path, trials: list[Trial], executor: Any) -> Iterator[tuple[Trial, str]]:
    """Each trial as it comes to its end, with what went wrong. Whatever stops the wait stops the trials first."""
    local = isinstance(executor, ThreadPoolExecutor)
    others = set(psutil.Process().children())
    with nullcontext() if local or not trials else executor.batch():
        jobs = [executor.submit(call, _command(folder, trial), _log(folder, trial), local) for trial in trials]
    waiting = {id(job): trial for job, trial in zip(jobs, trials, strict=True)}
    try:
        for job in _as_completed(jobs, local):
            yield waiting[id(job)], _error(job, _log(folder, waiting[id(job)]))
    except BaseException:
        if local:
            _stop_processes(executor, jobs, others)
        else:
            for job in jobs:
                job.cancel(check=False)
        raise


def call(command: list[str], log: Path, own_session: bool) -> int:
    """Execute a command to its end. Returns its exit status.

    What it says goes to a file, not to us: it goes on where we are killed. In a session of its own an interrupt from
    the terminal does not reach it: it comes to us, and we end each trial once. Slurm ends what it started itself.
    """
    with open(log, "ab") as out:
        return subprocess.run(
            command, env=os.environ | {"NO_COLOR": "1"}, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=own_session,
        ).returncode  # fmt: skip


def _command(folder: Path, trial: Trial) -> list[str]:
    python = [sys.executable, "-m", "lib", "--home", str(home())]
    return [*python, "sweep", str(folder.resolve()), "--trial", str(trial.number)]


def _log(folder: Path, trial: Trial) -> Path:
    return folder.resolve() / f"{trial.name}.log"


def _error(job: Any, log: Path) -> str:
    """What a trial's command said of its failure, in one line; empty where it did not fail."""
    try:
        status = job.result()
    except Exception as failure:  # whatever submitit, or the start of a process, has to say
        return " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
    if status < 0:
        return f"its process was ended by signal {-status}"
    said = log.read_text("utf-8", errors="replace").splitlines() if status else []
    return said[-1].removeprefix("error: ") if said else f"exit status {status}" if status else ""


# ---- executors ----------------------------------------------------------------------------------------------


@contextmanager
def _executor(execution: ExecutionConfig, folder: Path) -> Iterator[Any]:
    """Something with `submit`: a pool of threads that each wait for a process, or submitit's."""
    if execution.executor == "slurm":
        yield _slurm(execution, folder / "slurm")
    else:
        with ThreadPoolExecutor(execution.at_once) as pool:
            yield pool


def _slurm(execution: ExecutionConfig, logs: Path) -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise RequestError(f"execution.executor: slurm needs submitit; install it: {INSTALL}") from None
    asked = execution.slurm
    try:
        executor = submitit.SlurmExecutor(logs)
    except RuntimeError:
        raise RequestError("execution.executor: slurm, and this machine has no srun; log in to one of the cluster, "
                           "or use processes") from None  # fmt: skip
    executor.update_parameters(
        job_name="sweep",
        time=asked.minutes,
        cpus_per_task=asked.cpus,
        array_parallelism=execution.at_once,
        **({"partition": asked.partition} if asked.partition else {}),
        **({"account": asked.account} if asked.account else {}),
        **({"mem": f"{asked.memory_gb}GB"} if asked.memory_gb else {}),
        **({"gpus_per_node": asked.gpus} if asked.gpus else {}),
    )
    return executor


def _as_completed(jobs: list[Any], local: bool) -> Iterator[Any]:
    if local:
        return as_completed(jobs)
    from submitit.helpers import as_completed as submitted

    return submitted(jobs, poll_frequency=2)


def _stop_processes(pool: ThreadPoolExecutor, jobs: list[Any], others: set[psutil.Process]) -> None:
    """Ask the trials at work to end, each once, and wait until they have recorded it; the others do not begin."""
    pool.shutdown(wait=False, cancel_futures=True)
    while not all(job.done() for job in jobs):
        for process in set(psutil.Process().children()) - others:  # again, as one may only just be starting
            others.add(process)
            with suppress(psutil.Error):
                process.terminate()
        time.sleep(0.1)


# ---- settings -----------------------------------------------------------------------------------------------


def _settings() -> dict[str, str]:
    """The environment variables that bit-equality depends on, NPROC among them, as they are here."""
    from lib.training.fingerprint import HARMLESS  # imports jax

    def counts(name: str) -> bool:
        return name in ("NPROC", "XLA_FLAGS") or (
            name.startswith("JAX_") and not any(word in name for word in HARMLESS)
        )

    return {name: value for name, value in sorted(os.environ.items()) if counts(name)}


def _take_settings(recorded: dict[str, Any]) -> None:
    """Put the environment back to what it was when the sweep began; before jax computes anything."""
    for name in _settings().keys() - recorded.keys():
        del os.environ[name]
    os.environ.update(recorded)
