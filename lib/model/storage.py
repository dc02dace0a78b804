"""Trees of arrays on disk: written by Orbax, and proven by a digest that Orbax itself does not keep.

    save_tree(folder / "100", {"params": params})       # writes, waits, then stores the digest
    restore_tree(folder / "100", like)                  # DamagedError where a bit has flipped since

The digest covers (path, dtype, shape, bytes) of every leaf and is written last, so a folder without one was
never finished. Orbax reads a flipped bit without complaint, and casts where dtypes differ.

A tree that lies on many devices is written and read by all processes together, each its own part; the digest is of the
whole, so that it is the same wherever the parts lie.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lib.errors import RequestError, RetraceError
from lib.files import sealed, write_json
from lib.model.processes import OUT_OF_MEMORY, any_process, by_first, whole

DIGEST = "digest.json"
SEAL = "record_sha256"  # of digest.json itself, whose `sha256` is the tree's
UNSEALED = {"format_version", "sha256", "leaves", "logs"}  # all that the first ones hold, which have no seal
OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)  # what is wrong with it, not with its disk
FORMAT_VERSION = "1.0"


class DamagedError(RetraceError):
    """What is on disk is not what was saved."""


def tree_digest(tree: Any) -> str:
    """SHA-256 over the path, dtype, shape and bytes of every leaf, in the order of their paths."""
    digest = hashlib.sha256()
    for path, leaf in sorted(_leaves(tree).items()):
        array = np.ascontiguousarray(whole(leaf))
        digest.update(f"{path}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_tree(folder: Path, tree: Any, digest: str = "", **facts: Any) -> str:
    """Write a tree of arrays to a new folder and return its digest, which whoever has computed it gives.

    `facts` are kept beside the digest. What an earlier attempt left there is removed, and so is what this one wrote
    where it fails, as on a full disk: RetraceError then.
    """
    by_first(lambda: shutil.rmtree(folder, ignore_errors=True))
    digest = digest or tree_digest(tree)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _quiet_threads(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / "arrays").absolute(), tree)
            checkpointer.wait_until_finished()
        record = {"format_version": FORMAT_VERSION, "sha256": digest, "leaves": _shapes(tree)} | facts
        by_first(lambda: write_json(folder / DIGEST, record | {SEAL: sealed(record)["sha256"]}))
    except Exception as error:  # tensorstore has ValueError for a full disk, Orbax whatever its threads met
        _remove_for_good(folder)
        raise RetraceError(f"{folder}: cannot be written ({_reason(error)}); what was saved before it stands") from None
    return digest


def _remove_for_good(folder: Path) -> None:
    """Remove what a failed save has left, until it stays away: its other writes go on, and make the folder anew."""
    absent, until = 0, time.monotonic() + 10
    while absent < 10 and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        absent = 0 if folder.exists() else absent + 1


def is_saved(folder: Path) -> bool:
    """Whether a tree was completely written here."""
    return (folder / DIGEST).is_file()


def restore_tree(folder: Path, like: Any, digest: str = "") -> Any:
    """The tree that was saved; `like` gives its structure, shapes and dtypes. Raises DamagedError.

    A digest that is known from elsewhere must be that of the tree. Where it is not the files that stand in the way, but
    want of memory or a disk that does not answer, RetraceError says so; where a whole tree is another, RequestError.
    """
    try:
        recorded = json.loads((folder / DIGEST).read_bytes())
        if not (recorded.keys() <= UNSEALED or _is_sealed(recorded)):
            raise ValueError("edited after it was written")
        if (version := recorded["format_version"]) != FORMAT_VERSION:
            raise _other(folder, recorded, f"format_version {version!r} is not known, only {FORMAT_VERSION!r}")
        expected, leaves = recorded["sha256"], recorded["leaves"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if is_of_the_machine(error):
            raise unread(folder, error) from None
        raise DamagedError(f"{folder}: no readable {DIGEST} ({error})") from None
    if digest not in ("", expected):
        raise DamagedError(f"{folder}: holds another tree than the one that was recorded")
    for path, shape in _shapes(like).items():
        if leaves.get(path) != shape:
            raise _other(folder, recorded, f"leaf {path}: expected {shape}, the checkpoint has {leaves.get(path)}")
    if extra := sorted(leaves.keys() - _shapes(like).keys()):
        raise _other(folder, recorded, f"leaf {extra[0]} is in the checkpoint and not in the model")
    abstract = jax.tree.map(_placed, like)
    failure: Exception | None = None
    try:
        with _quiet_threads(), ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore((folder / "arrays").absolute(), abstract)
    except Exception as error:  # a damaged file raises whatever the reader of its part raises
        failure = error
    if any_process(failure is not None):
        if any_process(is_of_the_machine(failure)):
            raise unread(folder, failure)
        raise DamagedError(f"{folder}: cannot be read ({_reason(failure)})")
    if tree_digest(tree) != expected:
        raise DamagedError(f"{folder}: its arrays are not what was saved (digest differs)")
    leaves, structure = jax.tree.flatten(tree)
    del tree  # so that one leaf at a time is there twice
    for number, leaf in enumerate(leaves):
        leaves[number] = _unbound(leaf)
    return structure.unflatten(leaves)


def _other(folder: Path, recorded: dict[str, Any], problem: str) -> RetraceError:
    """What a record differs in is damage, unless it is as it was written: then the tree is another, and whole."""
    if not _is_sealed(recorded):
        return DamagedError(f"{folder}: {problem}")
    return RequestError(f"{folder}: {problem}; it is left as it is, for the code and packages that wrote it")


def _is_sealed(recorded: dict[str, Any]) -> bool:
    return recorded.get(SEAL) == sealed({name: value for name, value in recorded.items() if name != SEAL})["sha256"]


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """Where a leaf is read to: its own place on a mesh, else this process's device; never where it was saved from."""
    place = getattr(leaf, "sharding", None)
    if not isinstance(place, jax.sharding.NamedSharding):
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _unbound(leaf: jax.Array) -> jax.Array:
    """The array as jax makes its own where there is no mesh: not bound ("committed") to its device, as Orbax's are.

    For arrays that are bound, every program would be compiled once more.
    """
    return leaf if isinstance(leaf.sharding, jax.sharding.NamedSharding) else jnp.array(jax.device_get(leaf))


def _reason(error: Exception | None) -> str:
    """What the operating system said, where it did; of none, that it was another process that failed."""
    if error is None:
        return "by another process"
    if number := _errno(error):
        return os.strerror(number)
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _errno(error: Exception | None) -> int | None:
    """The number of an error of the system, which the libraries quote somewhere in their own words."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def is_of_the_machine(error: Exception | None) -> bool:
    """Whether a file could not be read for a reason that says nothing of what is in it."""
    short = isinstance(error, MemoryError) or any(said in str(error) for said in OUT_OF_MEMORY)
    return short or _errno(error) not in (None, *OF_THE_FILE)


def unread(path: Path, error: Exception | None) -> RetraceError:
    """What to raise of a folder or a file that is left for another try."""
    remedy = "where there is memory enough, and its disk answers, the same command reads it"
    return RetraceError(f"{path}: not read ({_reason(error)}), and left as it is; {remedy}")


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Orbax's threads print a failure with its stack, several times over and afterwards, too; one line says it."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda late: None if str(late.exc_value) == "Event loop is closed" else hook(late)
    yield
    sys.unraisablehook = hook  # but for a failure: its other writes end whenever they do


def _leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _shapes(tree: Any) -> dict[str, str]:
    """`{"['params']['embedding']": "float32[512,128]", …}`"""
    return {
        path: f"{np.dtype(leaf.dtype)}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in sorted(_leaves(tree).items())
    }
