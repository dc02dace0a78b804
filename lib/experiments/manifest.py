"""The record of a run: what went in, what came out, on what machine, by which code.

Two runs with equal inputs and equal fingerprints end with the same bits.
"""

import subprocess
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from lib.config import Config
from lib.experiments.run import MANIFEST, STATE
from lib.files import atomic_write, home, repository_root, sha256_bytes, sha256_file, write_json
from lib.trace import utc_now

VERSION = "1.0"


def write_manifest(
    folder: Path,
    config: Config,
    status: str,
    identity: dict[str, Any],
    artifacts: dict[str, Any],
    inputs: dict[str, Any],
    metrics: dict[str, Any],
    wall_s: dict[str, float],
    fingerprint: dict[str, Any],
    error: str = "",
) -> dict[str, Any]:
    """Write `run_manifest.json`, the last file of a run. `status` is done, failed, interrupted or dry_run."""
    manifest = {
        "manifest_version": VERSION,
        "run_id": identity["run_id"],
        "created_at": identity["created_at"],
        "finished_at": utc_now(),
        "status": status,
        **({"error": error} if error else {}),
        "dataset_key": f"{config.dataset.dataset_name}-{config.dataset.dataset_version}",
        "training_config": asdict(config.training),
        "recipe": config.recipe,
        "seed": config.training.seed,
        **identity["code"],
        "artifacts_path": _relative(folder),
        "config": asdict(config),
        "inputs": inputs,
        "artifacts": artifacts,
        "metrics": metrics,
        "wall_s": {stage: round(seconds, 2) for stage, seconds in wall_s.items()},
        "fingerprint": fingerprint,
        "environment": environment(),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of a run but its manifest and state: path in the folder → sha256 and byte count."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for name, path in sorted(names.items())
        if name not in (MANIFEST, STATE)
    }


def environment() -> list[str]:
    """The installed packages, as pip would freeze them."""
    found = {item.metadata["Name"]: item.version for item in distributions() if item.metadata["Name"]}
    return sorted((f"{name}=={number}" for name, number in found.items()), key=str.casefold)


def save_code(folder: Path) -> dict[str, Any]:
    """Which code is at work: its commit, and what the working tree changed since, kept in the folder as `git.patch`.

    `git_untracked` counts files that git does not know and the patch cannot hold. Outside a checkout `git_sha` is None.
    """
    patch_file = folder / "git.patch"
    patch_file.unlink(missing_ok=True)
    try:
        sha, patch = _git("rev-parse", "HEAD").decode().strip(), _git("diff", "HEAD", "--binary")
        untracked = _git("ls-files", "--others", "--exclude-standard").count(b"\n")
    except (OSError, subprocess.CalledProcessError):
        return {"git_sha": None, "git_dirty": False}
    if patch:
        atomic_write(patch_file, patch)
    return {
        "git_sha": sha,
        "git_dirty": bool(patch or untracked),
        **({"git_patch_sha256": sha256_bytes(patch)} if patch else {}),
        **({"git_untracked": untracked} if untracked else {}),
    }


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(repository_root()), *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def _relative(folder: Path) -> str:
    """The folder from the repository, or from the home where that lies elsewhere; never a path of one machine."""
    for base in (repository_root(), home()):
        if folder.resolve().is_relative_to(base):
            return folder.resolve().relative_to(base).as_posix()
    return folder.name
