"""What is installed here, what the machine has, and what to do about each part that is missing.

    python -m lib doctor        # required parts first; status 0 where all of them are there

Nothing is fetched. UNGAR and reasoning-gym are started, to say their versions, and one file without a name is written,
by which the home proves that it can be.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lib.commands.manners import as_json, green, red, tell, tell_json, yellow
from lib.commands.parser import verb
from lib.errors import RequestError, RetraceError
from lib.files import home, repository_root

GIB = 1 << 30
MIN_DISK = 2 * GIB  # what a quickstart with its packages' caches takes, and some room
MIN_MEMORY = 2 * GIB  # available: the quickstart's training and its kernel take less
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLOURS = {"ok": green, "missing": red, "note": yellow}


class Part(NamedTuple):
    """One line: `state` is ok, note (there, but see `todo`), missing (and required) or absent (and optional)."""

    name: str
    state: str
    found: str
    todo: str = ""


def add(verbs: Any) -> None:
    verb(verbs, "doctor", doctor, "What is installed, what the machine has, and what to do about what is missing.",
         "doctor", "doctor --json")  # fmt: skip


def doctor(arguments: argparse.Namespace) -> None:
    groups = {"required": list(_required())}
    missing = [part.name for part in groups["required"] if part.state == "missing"]
    if "packages" not in missing:  # by which the others are asked
        groups["optional"] = list(_optional())
    if as_json():
        tell_json({"ok": not missing} | {name: [part._asdict() for part in parts] for name, parts in groups.items()})
    else:
        _show(groups)
    if missing:
        raise RetraceError(f"{', '.join(missing)}: needed, and not as it must be; what to do stands beside each")


def _show(groups: dict[str, list[Part]]) -> None:
    for name, parts in groups.items():
        tell(f"{name}:")
        for part in parts:
            state = COLOURS.get(part.state, str)(f"{part.state:<8}")
            tell("  ", state, f" {part.name:<15} {part.found or part.todo}")
            if part.found and part.todo:
                tell(f"{'':<27}→ {part.todo}")


# ---- what is required ---------------------------------------------------------------------------------------


def _required() -> Iterator[Part]:
    fits = (3, 11) <= sys.version_info < (3, 14)
    yield Part("Python", "ok" if fits else "missing", f"{platform.python_version()}, {sys.executable}",
               "" if fits else "3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12")  # fmt: skip
    yield _packages()
    yield _devices()
    yield _cores()
    yield from _room()


def _packages() -> Part:
    """The direct dependencies, each against its pin."""
    install = f"{_python()} -m pip install -r requirements.txt"
    pinned, absent, other = _pins(repository_root() / "requirements.txt"), [], []
    for name, wanted in pinned.items():
        found = _version(name)
        if not found:
            absent.append(name)
        elif found != wanted:
            other.append(f"{name} {found} (pinned: {wanted})")
    if absent:
        return Part("packages", "missing", f"{len(absent)} of {len(pinned)} absent: {', '.join(absent)}", install)
    if other:
        return Part("packages", "note", f"{len(other)} of {len(pinned)} not as pinned: {', '.join(other)}",
                    f"equal bits are promised with the pinned ones alone: {install}")  # fmt: skip
    return Part("packages", "ok", f"all {len(pinned)} as pinned in requirements.txt")


def _pins(file: Path) -> dict[str, str]:
    """Name → version of the direct dependencies, which stand above the rule."""
    lines = file.read_text("utf-8").partition("\n# ----")[0].splitlines()
    pairs = (line.split("#")[0].split(";")[0].strip().partition("==") for line in lines)
    return {name: version for name, _, version in pairs if version}


def _devices() -> Part:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # whatever a plug-in that does not fit the driver raises
        return Part("jax devices", "missing", f"{type(error).__name__}: {str(error).splitlines()[0][:100]}",
                    "JAX_PLATFORMS=cpu goes without the accelerator; docs/gpu.md says what one needs")  # fmt: skip
    kinds = {device.device_kind: sum(one.device_kind == device.device_kind for one in devices) for device in devices}
    found = f"jax {jax.__version__}: {', '.join(f'{count} × {kind}' for kind, count in kinds.items())}"
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        return Part("jax devices", "note", found, "there is an NVIDIA driver, and jax does not use it: docs/gpu.md")
    return Part("jax devices", "ok", found)


def _cores() -> Part:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Part("cores", "ok", f"{usable} usable of {os.cpu_count()}; work is divided by NPROC={os.environ['NPROC']}")


def _room() -> Iterator[Part]:
    """Memory, disk, and whether the home can be written."""
    with suppress(ImportError):  # which is told among the packages
        import psutil

        memory = psutil.virtual_memory()
        enough, found = memory.available >= MIN_MEMORY, f"{_size(memory.available)} available of {_size(memory.total)}"
        yield Part("memory", "ok" if enough else "note", found,
                   "" if enough else "the quickstart wants 2 GiB; end what else is at work")  # fmt: skip
    place = next(path for path in (home(), *home().parents) if path.exists())
    free = shutil.disk_usage(place).free
    yield Part("disk", "ok" if free >= MIN_DISK else "note", f"{_size(free)} free at {place}",
               "" if free >= MIN_DISK else "checkpoints and reports want more; give another --home")  # fmt: skip
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, "not a folder")
        _write_nothing(place)
    except OSError as error:
        yield Part("home", "missing", f"{home()}: {error.strerror}", "give another --home, or set RETRACE_HOME")
    else:
        yield Part("home", "ok", f"{home()}, {'can be written' if place == home() else 'made when it is needed'}")


def _write_nothing(folder: Path) -> None:
    import tempfile

    tempfile.TemporaryFile(dir=folder).close()


# ---- what is optional ---------------------------------------------------------------------------------------


def _optional() -> Iterator[Part]:
    from lib.tasks import reasoning_gym, ungar

    git = shutil.which("git")
    yield _part("git", git, "a run records its code by it, and reproduce needs it: install git")
    yield _engine("UNGAR", ungar.version, "High Card Duel by UNGAR itself: make test-ungar installs it, then "
                  "--ungar-python .venv-ungar/bin/python")  # fmt: skip
    yield _engine("reasoning-gym", reasoning_gym.version, f"its generators and verifiers: {reasoning_gym.INSTALL}, "
                  f"or {reasoning_gym.VARIABLE} (docs/reasoning_gym.md)")  # fmt: skip
    for name, package, what, file in [
        ("Tunix", "google-tunix", "training.trainer: tunix", "--no-deps -r requirements-tunix.txt"),
        ("tensorboardX", "tensorboardX", "tracking: [tensorboard]", "-r requirements-tensorboard.txt"),
        ("MLflow", "mlflow", "tracking: [mlflow]", "-r requirements-mlflow.txt"),
        ("submitit", "submitit", "sweeps on Slurm", "-r requirements-slurm.txt"),
        ("lm-eval", "lm_eval", "our models under lm-evaluation-harness", "-r requirements-harness.txt"),
        ("transformers", "transformers", "to load what export writes", "transformers torch"),
    ]:
        yield _part(name, _version(package), f"{what}: {_python()} -m pip install {file}")
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    yield _part("browser", browser, "reports are opened in one by the tests alone: apt-get install chromium")
    yield from _hub()
    yield _s3()


def _part(name: str, found: str | None, todo: str) -> Part:
    return Part(name, "ok", found) if found else Part(name, "absent", "", todo)


def _engine(name: str, version: Callable[[], str], todo: str) -> Part:
    try:
        return Part(name, "ok", version())
    except RequestError:
        return Part(name, "absent", "", todo)
    except RetraceError as error:  # it is there, and does not work
        return Part(name, "note", "", str(error))


def _hub() -> Iterator[Part]:
    """Released weights in the hub's cache, and who we are there."""
    from huggingface_hub import constants, get_token, scan_cache_dir

    names: list[str] = []
    with suppress(Exception):  # no cache yet, or one that is damaged: then there is none to use
        repositories = sorted(scan_cache_dir().repos, key=lambda repository: repository.repo_id)
        names = [repository.repo_id for repository in repositories if "gemma" in repository.repo_id.lower()]
    yield _part("Gemma weights", ", ".join(names),
                f"none in {constants.HF_HUB_CACHE}: hf download google/gemma-3-270m-it (docs/released_gemma.md); "
                "model.name: tiny needs none")  # fmt: skip
    yield _part("hub login", "a token is set" if get_token() else None,
                "for models whose licence must be accepted: hf auth login, or HF_TOKEN")  # fmt: skip


def _s3() -> Part:
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    named = "AWS_ACCESS_KEY_ID" if os.environ.get("AWS_ACCESS_KEY_ID") else str(file) if file.is_file() else ""
    return _part("S3 credentials", named, "for imports from s3://: AWS_ACCESS_KEY_ID … (docs/importing.md)")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> str:
    """As one would type it."""
    return ".venv/bin/python" if Path(sys.prefix) == repository_root() / ".venv" else "python"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
