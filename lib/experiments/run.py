"""A run folder: the configuration, everything the stages make, and at the end the manifest.

    run = open_run("configs/smoke.yaml")         # from a notebook: a folder of its own for this configuration
    run = create_run(config)                     # from the pipeline: runs/20261122_101500_quickstart/
    run.path("metrics.jsonl")

`run_manifest.json` is written last, so its presence means that nothing more will be. Until then `state.json`
says what was begun, and a lock that ends with its process says whether anybody is still at work:

    status_of(run.folder)      # running, stale (its process is gone), done, failed, interrupted, timed_out, …
"""

import fcntl
import json
import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from lib.cards import card
from lib.config import Config, load_config, to_yaml
from lib.errors import RequestError, RetraceError
from lib.files import atomic_write, child, home, is_sealed, sha256_bytes, shown_path, write_json
from lib.trace import utc_now

MANIFEST, STATE, CONFIG = "run_manifest.json", "state.json", "config.yaml"
KERNELS = ("ipykernel", "lib.experiments.kernels")  # what the command of a kernel names, of a forked one its server's
LOCK, KERNEL_LOCK, KERNEL_PID = ".lock", ".kernel.lock", ".kernel.pid"
BOOKKEEPING = {MANIFEST, STATE, LOCK, KERNEL_LOCK, KERNEL_PID}  # of a run folder, and no artefact of the run
MANIFEST_VERSION = "1.0"
MANIFEST_KEYS = {
    "status",
    "artifacts_path",
    "artifacts",
    "dataset_key",
    "inputs",
    "recipe",
    "seed",
    "metrics",
    "wall_s",
}
ORPHAN_SECONDS = 5


class Run:
    """One execution: its folder and its configuration.

    run = open_run("configs/smoke.yaml")
    run                            # Run('by_hand_smoke_1f0c22aa', by_hand)
    run.path("metrics.jsonl")      # …/runs/by_hand_smoke_1f0c22aa/metrics.jsonl
    run.conclusion("03_train")     # "20 steps in 9 s, …", or None where that notebook did not come to its end

    In a notebook it shows itself as a card.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config = folder, config

    def path(self, *names: str) -> Path:
        return self.folder.joinpath(*names)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def state(self) -> dict[str, Any]:
        """`run_id`, `created_at`, and the stage that is at work. Raises RetraceError where it cannot be read."""
        try:
            return dict(json.loads(self.path(STATE).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise RetraceError(f"{self.path(STATE)}: damaged ({error}); start a new run with its {CONFIG}") from None

    def update(self, **facts: Any) -> None:
        write_json(self.path(STATE), self.state | facts)

    def conclude(self, stage: str, sentence: str) -> str:
        """Say that a notebook came to its end; the pipeline believes nothing else. Returns the sentence, to show."""
        write_json(self.path("stages", f"{stage}.json"), {"stage": stage, "sentence": sentence})
        return sentence

    def conclusion(self, stage: str) -> str | None:
        """What the notebook concluded, or None where it did not come to its end."""
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # a file that is damaged says nothing
            return json.loads(self.path("stages", f"{stage}.json").read_bytes())["sentence"]
        return None

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {status_of(self.folder)})"

    def _repr_html_(self) -> str:
        config, stages = self.config, sorted(file.stem for file in self.path("stages").glob("*.json"))
        facts = {
            "status": status_of(self.folder).replace("_", " "),
            "model": config.model.name,
            "dataset": f"{config.dataset.dataset_name}-{config.dataset.dataset_version}",
            "eval set": config.evaluation.eval_set,
        }
        return card(f"Run {self.name}", facts | {stage: self.conclusion(stage) for stage in stages})


# ---- making and opening ------------------------------------------------------------------------------------


def create_run(config: Config, name: str = "") -> Run:
    """A new run folder, `<time>_<name>`. Raises RequestError where it cannot be made."""
    stamp = f"{datetime.now(UTC):%Y%m%d_%H%M%S}_{name or config.name}"
    for number in range(1, 100):  # two runs of one second are told apart by a number
        folder = child(home(), stamp if number == 1 else f"{stamp}_{number}")
        with _writing(folder), suppress(FileExistsError):
            folder.mkdir(parents=True)
            return _begun(folder, config)
    raise RequestError(f"{folder}: there are too many runs of this second and name; start it again")


def open_run(config: str, run_dir: str = "", overrides: str = "") -> Run:
    """The run that a notebook works on: `run_dir`, or else a folder that belongs to this configuration.

    `overrides` are `a.b=value`, separated by blanks; the pipeline gives none, as its configuration is resolved.
    A run that the pipeline executes has one kernel at a time: this process is the only one that writes in it
    until it ends.
    """
    resolved = load_config(config, overrides.split())
    if run_dir:
        folder = Path(run_dir)
        if not (folder / STATE).is_file():
            raise RequestError(f"run_dir {run_dir}: not a run folder at work (no {STATE})")
        if load_config(folder / CONFIG) != resolved:
            raise RequestError(f"run_dir {run_dir}: is a run of another configuration; give config {folder}/{CONFIG}")
        _hold_as_kernel(folder)
        return Run(folder, resolved)
    folder = child(home(), f"by_hand_{resolved.name}_{sha256_bytes(to_yaml(resolved).encode())[:8]}")
    if (folder / STATE).is_file():
        return Run(folder, resolved)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return _begun(folder, resolved, by_hand=True)


def find_run(run: str) -> Path:
    """The folder of a run, named by its path or by its name in this home. Raises RequestError."""
    if "\0" not in run:
        for folder in (Path(run), home() / run):
            try:
                if (folder / MANIFEST).is_file() or (folder / STATE).is_file():
                    return folder.resolve()  # as kernels work in another folder than we do
            except PermissionError:
                raise RequestError(f"run {run}: {folder}: cannot be read (Permission denied)") from None
            except OSError:  # a name too long for a folder
                continue
    with suppress(OSError):  # a home that cannot be read holds none that could be meant
        if run and "\0" not in run and (home() / run).is_dir():
            raise RequestError(f"run {run}: no {MANIFEST} in {shown_path(home() / run)}: it never began, or lost it")
        if meant := [folder.name for folder in run_folders() if run and run in folder.name]:
            raise RequestError(f"run {run}: no such run in {shown_path(home())}; did you mean {meant[0]}?")
    raise RequestError(f"run {run}: no such run in {shown_path(home())}; python -m lib runs list shows those there are")


def check_in_home(folder: Path, *place: str) -> None:
    """Raises RequestError where the folder is not the one of this place in the home: what it needs is in another."""
    if home().joinpath(*place).resolve() != folder.resolve():
        its_own = folder.resolve().joinpath(*[".."] * len(place)).resolve()
        raise RequestError(
            f"{shown_path(folder)}: lies outside of the home {shown_path(home())}; "
            f"it goes on in its own alone: give --home {shown_path(its_own)}"
        )


def _begun(folder: Path, config: Config, **facts: Any) -> Run:
    run = Run(folder, config)
    text = to_yaml(config)
    atomic_write(run.path(CONFIG), text)
    identity = {"run_id": str(uuid.uuid4()), "created_at": utc_now(), "config_sha256": sha256_bytes(text.encode())}
    write_json(run.path(STATE), identity | facts)
    return run


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise RequestError(f"{folder}: cannot be written ({error.strerror}); choose another --home") from None


# ---- who is at work ----------------------------------------------------------------------------------------


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """The only process that drives this run, for as long as the block lasts. Raises RequestError where another is.

    The lock belongs to the process: killed in whatever way, it lets go.
    """
    lock = FileLock(folder / LOCK, timeout=1)  # long enough for one who only asks whether it is held
    try:
        lock.acquire()
    except Timeout:
        raise RequestError(
            f"{shown_path(folder)}: another process is at work in it; wait for its end, or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Remove what writers left that were killed; only where nobody else is at work in the folder."""
    for pattern in (".*.tmp", ".*.tmp.ipynb"):
        for stray in folder.rglob(pattern):
            stray.unlink(missing_ok=True)


def is_at_work(folder: Path) -> bool:
    """Whether a living process drives this run."""
    return _is_held(folder / LOCK)


def end_orphan(folder: Path) -> None:
    """Stop the kernel of an earlier attempt that outlived its runner, so that nothing of it is written from here on.

    Raises RetraceError where it does not end.
    """
    if not _is_held(folder / KERNEL_LOCK):
        return
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int((folder / KERNEL_PID).read_text()))
        if any(word.startswith(KERNELS) for word in process.cmdline()):
            process.send_signal(signal.SIGKILL)
    try:
        with FileLock(folder / KERNEL_LOCK, timeout=ORPHAN_SECONDS):
            pass
    except Timeout:
        raise RetraceError(
            f"{shown_path(folder)}: a kernel of an earlier attempt still writes in it and could not be stopped "
            f"(its process id is in {KERNEL_PID}); stop it and resume again"
        ) from None


_held_by_this_kernel: dict[Path, FileLock] = {}


def _hold_as_kernel(folder: Path) -> None:
    folder = folder.resolve()
    if folder in _held_by_this_kernel:
        return
    lock = FileLock(folder / KERNEL_LOCK, timeout=ORPHAN_SECONDS)  # the kernel of the stage before may just be ending
    try:
        lock.acquire()
    except Timeout:
        raise RequestError(f"run_dir {shown_path(folder)}: another kernel works in this run") from None
    atomic_write(folder / KERNEL_PID, str(os.getpid()))
    _held_by_this_kernel[folder] = lock


def _is_held(file: Path) -> bool:
    """Whether a living process holds the lock; asked by a shared one, so that two who ask do not see each other."""
    try:
        with open(file, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:  # nobody ever was at work there, or a file that may not be read
        return False


# ---- looking at runs ---------------------------------------------------------------------------------------


def status_of(folder: Path) -> str:
    """`running` where a living process is at work; else what the manifest says: done, failed, interrupted, timed_out
    or dry_run; else, as nobody wrote one, `stale`.

    `by_hand`: a folder where notebooks are executed one by one, which nobody concludes. `damaged`: a manifest
    that is not what was written.
    """
    if is_at_work(folder):
        return "running"
    try:
        if (folder / MANIFEST).is_file():
            return read_manifest(folder)["status"]
        return "by_hand" if json.loads((folder / STATE).read_bytes()).get("by_hand") else "stale"
    except (OSError, ValueError, AttributeError, RetraceError):
        return "damaged"


def list_runs() -> list[dict[str, Any]]:
    """Every run of this home, newest first: its folder's name, status, dataset, model, accuracy and verdict."""
    return [_listed(folder) for folder in run_folders()]


def run_folders() -> list[Path]:
    """The folder of every run of this home, newest first. Raises OSError where the home cannot be read."""
    if home().exists():
        os.scandir(home()).close()  # as glob takes what it may not read for empty
    found = {path.parent for name in (MANIFEST, STATE) for path in home().glob(f"[!.]*/{name}")}
    return sorted(found, key=lambda folder: folder.name, reverse=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run. Raises RequestError where there is none, or where it is not what was written."""
    file = folder / MANIFEST
    if not file.is_file():
        hint = f"its status is {status_of(folder)}" if (folder / STATE).is_file() else "it is no run"
        raise RequestError(f"{shown_path(folder)}: no {MANIFEST}; {hint}")
    try:
        content = file.read_bytes()
        manifest = json.loads(content)
        version = manifest["manifest_version"]
        if version == MANIFEST_VERSION and not is_sealed(content):
            raise ValueError("edited after it was written")
        if missing := MANIFEST_KEYS - manifest.keys():
            raise ValueError(f"no {min(missing)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise RequestError(f"{shown_path(file)}: damaged ({reason})") from None
    if version != MANIFEST_VERSION:
        raise RequestError(f"{shown_path(file)}: manifest_version {version!r} is not known, only {MANIFEST_VERSION!r}")
    return manifest


def trained_on(manifest: dict[str, Any]) -> str:
    """The dataset of a run, or the file that was trained on, whatever dataset its configuration names."""
    data = manifest["inputs"].get("data")
    return data["file"] if data else manifest["dataset_key"]


def _listed(folder: Path) -> dict[str, Any]:
    """One row; what an unfinished run does not say yet is empty."""
    row = {"run": folder.name, "status": status_of(folder), "verdict": "", "error": "", "created_at": "",
           "dataset": "", "model": "", "n": None, "before": None, "before_interval": None, "after": None,
           "after_interval": None, "wall_s": None, "report": (folder / "report.html").is_file()}  # fmt: skip
    try:
        manifest = read_manifest(folder)
    except RetraceError:
        return row
    evaluation = manifest["metrics"].get("evaluation") or {}
    sides = {name: evaluation.get(name) or {} for name in ("before", "after")}
    return row | {
        "verdict": evaluation.get("sentence", ""),
        "error": manifest.get("error", ""),
        "created_at": manifest["created_at"],
        "dataset": trained_on(manifest),
        "model": manifest["config"]["model"]["name"],
        "n": evaluation.get("n"),
        **{name: side.get("accuracy") for name, side in sides.items()},
        **{f"{name}_interval": side.get("interval") for name, side in sides.items()},
        "wall_s": round(sum(manifest["wall_s"].values()), 1),
    }
