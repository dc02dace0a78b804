"""The record of a run: what went in, what came out, on what machine, by which code.

Two runs with equal inputs and equal fingerprints end with the same bits.
"""

import os
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from lib.config import Config
from lib.experiments.run import BOOKKEEPING, MANIFEST, MANIFEST_VERSION
from lib.files import EVENTS, atomic_write, home, repository_root, sealed, sha256_bytes, sha256_file, write_json
from lib.trace import utc_now

PATCH = "git.patch"
# What a run executes and reads of the repository: changes elsewhere in the tree do not touch it.
CODE = ("lib", "notebooks", "evalsets", "pyproject.toml", "requirements.txt")
LEAVINGS = {".ipynb_checkpoints", ".DS_Store", "Thumbs.db"}  # of JupyterLab and file managers, in any folder they show


def write_manifest(
    folder: Path,
    config: Config,
    status: str,
    identity: dict[str, Any],
    attempts: list[dict[str, Any]],
    artifacts: dict[str, Any],
    inputs: dict[str, Any],
    metrics: dict[str, Any],
    wall_s: dict[str, float],
    fingerprint: dict[str, Any],
    error: str = "",
) -> dict[str, Any]:
    """Write `run_manifest.json`, the last file of a run, with a digest of itself.

    `status` is done, failed, interrupted, timed_out or dry_run. `attempts` are the times that somebody was at work,
    each with its code; the code of the last one is the manifest's own.
    """
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        **identity,
        "finished_at": utc_now(),
        "status": status,
        **({"error": error} if error else {}),
        "dataset_key": f"{config.dataset.dataset_name}-{config.dataset.dataset_version}",
        "training_config": asdict(config.training),
        "recipe": config.recipe,
        "seed": config.training.seed,
        **code_of(attempts[-1]),
        "attempts": attempts,
        "artifacts_path": _relative(folder),
        "config": asdict(config),
        "inputs": inputs,
        "artifacts": artifacts,
        "metrics": metrics,
        "wall_s": {stage: round(seconds, 2) for stage, seconds in wall_s.items()},
        "fingerprint": fingerprint,
        "environment": environment(),
    }
    write_json(folder / MANIFEST, sealed(manifest))
    return manifest


def hash_files(folder: Path, names: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """Every file of a run but its bookkeeping, or those named: path in the folder → sha256 and byte count."""
    chosen = artifact_names(folder) if names is None else names
    return {
        name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in sorted(chosen)
    }


def artifact_names(folder: Path) -> set[str]:
    """The path in the folder of every file of a run, but its bookkeeping, what is made from metrics.jsonl for
    TensorBoard, and what is left by who looked at it; a link is named, never followed.
    """
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    names = {path.as_posix() for path in found if LEAVINGS.isdisjoint(path.parts)}
    return {name for name in names - BOOKKEEPING if not name.startswith(f"{EVENTS}/")}


def environment() -> list[str]:
    """The installed packages, as pip would freeze them."""
    abouts = [item.metadata for item in distributions()]  # a file that is read each time it is asked for
    found = {about["Name"]: about["Version"] for about in abouts if about["Name"]}
    return sorted((f"{name}=={number}" for name, number in found.items()), key=str.casefold)


def save_code(folder: Path) -> dict[str, Any]:
    """Which code is at work: its commit, and how the working tree differs from it, kept in the folder as `git.patch`.

    The patch holds new files too, where git does not ignore them. Outside a checkout `git_sha` is None.
    """
    patch_file = folder / PATCH
    patch_file.unlink(missing_ok=True)
    try:
        sha = _git("rev-parse", "HEAD").decode().strip()
        patch = _patch()
    except (OSError, subprocess.CalledProcessError):
        return {"git_sha": None, "git_dirty": False}
    if patch:
        atomic_write(patch_file, patch)
    return {
        "git_sha": sha,
        "git_dirty": bool(patch),
        **({"git_patch_sha256": sha256_bytes(patch)} if patch else {}),
    }


def code_of(attempt: dict[str, Any]) -> dict[str, Any]:
    """What `save_code` found, of an attempt that also says when it was."""
    return {name: value for name, value in attempt.items() if name.startswith("git_")}


def _patch() -> bytes:
    """From the commit to the files as they are, by an index and objects of our own: the user's stay as they are."""
    objects = (repository_root() / _git("rev-parse", "--git-path", "objects").decode().strip()).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        index = {
            "GIT_INDEX_FILE": str(Path(scratch, "index")),
            "GIT_OBJECT_DIRECTORY": scratch,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
        }
        there = [name for name in CODE if (repository_root() / name).exists()]
        _git("read-tree", "HEAD", **index)
        _git("add", "--all", "--", *there, **index)
        return _git("diff", "--cached", "--binary", "--no-color", "--no-ext-diff", "HEAD", "--", *CODE, **index)


def _git(*arguments: str, **environment: str) -> bytes:
    command = ["git", "-C", str(repository_root()), *arguments]
    return subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment}).stdout


def _relative(folder: Path) -> str:
    """The folder from the repository, or from the home where that lies elsewhere; never a path of one machine."""
    for base in (repository_root(), home()):
        if folder.resolve().is_relative_to(base):
            return folder.resolve().relative_to(base).as_posix()
    return folder.name
