"""A run folder: the configuration, everything the stages make, and at the end the manifest.

    run = open_run("configs/smoke.yaml")         # from a notebook: a folder of its own for this configuration
    run = create_run(config)                     # from the pipeline: runs/20261122_101500_quickstart/
    run.path("metrics.jsonl")

`run_manifest.json` is written last, so its presence means that nothing more will be. Until then `state.json`
says who is at work.
"""

import json
import os
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib.config import Config, load_config, to_yaml
from lib.errors import RequestError
from lib.files import atomic_write, child, home, sha256_bytes, write_json
from lib.trace import utc_now

MANIFEST, STATE = "run_manifest.json", "state.json"
MANIFEST_KEYS = {"status", "artifacts_path", "dataset_key", "recipe", "seed", "metrics", "wall_s"}


class Run:
    """One execution: its folder and its configuration."""

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config = folder, config

    def path(self, *names: str) -> Path:
        return self.folder.joinpath(*names)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def state(self) -> dict[str, Any]:
        """`run_id`, `created_at`, `pid`, and the stage that is at work."""
        return json.loads(self.path(STATE).read_bytes())

    def update(self, **facts: Any) -> None:
        write_json(self.path(STATE), self.state | facts)

    def conclude(self, stage: str, sentence: str) -> str:
        """Say that a notebook came to its end; the pipeline believes nothing else. Returns the sentence, to show."""
        write_json(self.path("stages", f"{stage}.json"), {"stage": stage, "sentence": sentence})
        return sentence

    def conclusion(self, stage: str) -> str | None:
        """What the notebook concluded, or None where it did not come to its end."""
        file = self.path("stages", f"{stage}.json")
        return json.loads(file.read_bytes())["sentence"] if file.is_file() else None


def create_run(config: Config, name: str = "") -> Run:
    """A new run folder, `<time>_<name>`. Raises RequestError where it cannot be made."""
    folder = child(home(), f"{datetime.now(UTC):%Y%m%d_%H%M%S}_{name or config.name}")
    if folder.exists():
        raise RequestError(f"{folder}: there is a run of this second and name already; start it again")
    return _made(folder, config)


def open_run(config: str, run_dir: str = "", overrides: str = "") -> Run:
    """The run that a notebook works on: `run_dir`, or else a folder that belongs to this configuration.

    `overrides` are `a.b=value`, separated by blanks; the pipeline gives none, as its configuration is resolved.
    """
    resolved = load_config(config, overrides.split())
    if run_dir:
        folder = Path(run_dir)
        if not (folder / STATE).is_file():
            raise RequestError(f"run_dir {run_dir}: not a run folder at work (no {STATE})")
        if load_config(folder / "config.yaml") != resolved:
            raise RequestError(
                f"run_dir {run_dir}: is a run of another configuration; give config {folder}/config.yaml"
            )
        return Run(folder, resolved)
    folder = child(home(), f"by_hand_{resolved.name}_{sha256_bytes(to_yaml(resolved).encode())[:8]}")
    return Run(folder, resolved) if (folder / STATE).is_file() else _made(folder, resolved)


def _made(folder: Path, config: Config) -> Run:
    run = Run(folder, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(run.path("config.yaml"), to_yaml(config))
        write_json(run.path(STATE), {"run_id": str(uuid.uuid4()), "created_at": utc_now(), "pid": os.getpid()})
    except OSError as error:
        raise RequestError(f"{folder}: cannot be written ({error.strerror}); choose another --home") from None
    return run


def list_runs() -> list[dict[str, Any]]:
    """Every run of this home, newest first: its folder's name, status and verdict."""
    found = [path.parent for name in (MANIFEST, STATE) for path in home().glob(f"*/{name}")]
    return [_listed(folder) for folder in sorted(set(found), key=lambda folder: folder.name, reverse=True)]


def read_manifest(run: str) -> dict[str, Any]:
    """The manifest of a run, named by its folder or by its name in this home. Raises RequestError."""
    for folder in (Path(run), home() / run):
        if (folder / MANIFEST).is_file():
            try:
                manifest = json.loads((folder / MANIFEST).read_bytes())
                if missing := MANIFEST_KEYS - manifest.keys():
                    raise ValueError(f"no {min(missing)}")
                return manifest
            except (ValueError, AttributeError) as error:
                raise RequestError(f"{folder / MANIFEST}: damaged ({error})") from None
    raise RequestError(f"run {run}: no {MANIFEST} there; python -m lib runs list shows the runs")


def _listed(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        return {"run": folder.name, "status": "open", "verdict": ""}
    manifest = read_manifest(str(folder))
    evaluation = manifest["metrics"].get("evaluation") or {}
    return {"run": folder.name, "status": manifest["status"], "verdict": evaluation.get("sentence", "")}
