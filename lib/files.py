"""The one way files are written, hashed and named.

Every file of a run is written to a temporary file beside its final place, flushed to disk, and
renamed over it, so that a reader sees the old content or the new, never a mixture:

    atomic_write(run / "metrics.json", b"{}")
    sha256_file(run / "metrics.json")        # "44136fa3…"
    child(home, "datasets", "quickstart-v1") # refuses "../x", "/etc", a name with a NUL …
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lib.errors import RequestError

STARTED_IN = "RETRACE_STARTED_IN"  # tells kernels, which work in notebooks/, where their runner was started
EVENTS = "tensorboard"  # the folder of event files, beside metrics.jsonl
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def repository_root() -> Path:
    """The folder that holds `lib`, `notebooks`, `configs` and `evalsets`."""
    return Path(__file__).resolve().parent.parent


def home() -> Path:
    """Where everything produced is kept: RETRACE_HOME where it is set, else `runs/` of the repository."""
    return Path(os.environ.get("RETRACE_HOME") or repository_root() / "runs").resolve()


def child(folder: Path, *names: str) -> Path:
    """`folder/name/…`, each name checked: letters, digits, `. _ + -`, at most 100, no leading dot.

    Raises RequestError for any other name, and for a link there that leads out of the folder.
    """
    for name in names:
        if not NAME.fullmatch(name):
            shown = name if len(name) <= 60 else name[:60] + "…"
            raise RequestError(
                f"name {shown!r} cannot become a file name: use 1 to 100 letters, digits and . _ + -, "
                "beginning with a letter or digit"
            )
    path = folder.joinpath(*names)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise RequestError(f"{path}: a link that leads out of {folder}; remove it, or use another name")
    return path


def places_of(name: str) -> list[Path]:
    """Where a path may lead: from the working directory, from that in which the run began, from the repository."""
    folders = [Path(), Path(os.environ.get(STARTED_IN, "")), repository_root()]
    return [folder / name for folder in folders]


def find_interpreter(name: str) -> str:
    """The Python of this name: a path, which may lead from several places.

    Empty: the one that runs this. A name that is no file's is returned as it is.
    """
    name = name or sys.executable
    return next((str(path) for path in places_of(name) if path.is_file()), name)


def shown_path(path: Path) -> str:
    """The path as a person at the prompt would type it: from the working directory where it lies below."""
    resolved = path.resolve()
    return str(resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved)


@contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` when the block ends, and leaves no trace when it raises.

    A link there is replaced, not followed. An OSError of writing it, as where the disk is full, names the file.
    Raises RequestError where a device or a pipe is at `path`.
    """
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = ""
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(scratch)
        if isinstance(error, OSError) and (not error.filename or str(error.filename).endswith(".tmp")):
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def check_replaceable(path: Path, advice: str = "give another name") -> None:
    """Raise RequestError where something is at `path` that no file may take the place of: a device, a pipe."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise RequestError(f"{path}: is no regular file; {advice}")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends, and leaves no trace when it raises.

    What an earlier writer of the same path left that was killed is removed first.
    Raises RequestError where there is something at `path` already but an empty folder. An OSError names `path`.
    """
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RequestError(f"{path}: there is something already; give a folder that is new or empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch, prefix = "", f".{path.name[:60]}."
    _remove_stale(path.parent, prefix)
    try:
        scratch = tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=".tmp")
        lock = _held(scratch)
        try:
            yield Path(scratch)
        finally:
            os.close(lock)
        os.chmod(scratch, 0o777 & ~_umask())
        os.replace(scratch, path)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and (not error.filename or scratch in str(error.filename)):
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def _remove_stale(folder: Path, prefix: str) -> None:
    """The folders of writers that were killed: a living one holds the lock of its own, and it ends with the process."""
    for stray in folder.glob(f"{glob.escape(prefix)}????????.tmp"):
        with suppress(OSError):  # held, or no folder
            os.close(_held(stray))
            shutil.rmtree(stray, ignore_errors=True)


def _held(folder: Path | str) -> int:
    """A handle that holds the folder's lock until it is closed. Raises OSError where another process holds it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def check_writable(path: Path) -> None:
    """Raise OSError where `path` could not be written: asked before long work whose result it is to hold."""
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        error.filename = str(path)
        raise


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` (text as UTF-8), whole or not at all."""
    with atomic_open(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: object) -> None:
    """`value` as indented UTF-8 JSON, keys in the order given."""
    atomic_write(path, _json(value))


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a digest of itself, by which `is_sealed` knows every later change of it."""
    return record | {"sha256": _digest(record)}


def is_sealed(content: bytes) -> bool:
    """Whether the bytes of a file are those that `write_json` made of a sealed record, white space and all."""
    return content == _json(sealed(json.loads(content))).encode()


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its own `sha256`, as JSON with sorted keys."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    return sha256_bytes(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
