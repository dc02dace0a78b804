"""Is a run still what was recorded? Every artefact against its hash, before anything reads what is in it.

verify_run(folder)      # ["edited: eval_after.jsonl", "missing: git.patch", "extra: notes.txt"], or []
"""

import json
from pathlib import Path
from typing import Any

from lib.data.dataset import load_dataset
from lib.errors import RetraceError
from lib.experiments.manifest import artifact_names
from lib.experiments.run import CONFIG, MANIFEST, STATE, read_manifest, run_folders
from lib.experiments.stages import datasets, find_eval_set, store
from lib.files import home, is_sealed, sha256_file

CONCLUSION = {"stage", "sentence"}  # what a notebook leaves, until the runner has recorded the stage


def verify_run(folder: Path) -> list[str]:
    """What is not as its manifest says: an artefact edited, missing or extra, or an input that changed since.

    Of a run that nobody concluded, what its stages recorded is checked.
    """
    if not (folder / MANIFEST).is_file() and (folder / STATE).is_file():
        return _edited_or_missing(folder, _recorded_by_stages(folder))
    try:
        manifest = read_manifest(folder)
    except RetraceError as error:
        return [f"edited: {MANIFEST} ({error})"]
    recorded = {name: facts["sha256"] for name, facts in manifest["artifacts"].items()}
    extra = [f"extra: {name}" for name in sorted(artifact_names(folder) - recorded.keys())]
    return _edited_or_missing(folder, recorded) + extra + _inputs(manifest)


def verify_home() -> list[str]:
    """What is not as recorded beside the runs: the store's segments, the datasets, and a run without its manifest."""
    begun = {path.parent for path in home().glob(f"[!.]*/{CONFIG}")}
    found = [f"missing: {folder.name}/{MANIFEST}" for folder in sorted(begun - set(run_folders()))]
    try:
        store().count()
    except RetraceError as error:
        found.append(str(error))
    for place in sorted(datasets().glob("[!.]*/")):
        try:
            load_dataset(datasets(), place.name)
        except RetraceError as error:
            found.append(str(error))
    return found


def _edited_or_missing(folder: Path, recorded: dict[str, str]) -> list[str]:
    found = []
    for name, sha256 in recorded.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            found.append(f"missing: {name}")
        elif sha256_file(file) != sha256:
            found.append(f"edited: {name}")
    return found


def _recorded_by_stages(folder: Path) -> dict[str, str]:
    recorded: dict[str, str] = {}
    for file in sorted(folder.glob("stages/*.json")):
        try:
            content = file.read_bytes()
            record = json.loads(content)
            if record.keys() != CONCLUSION and not is_sealed(content):
                raise ValueError("edited after it was written")
            recorded |= {name: facts["sha256"] for name, facts in record.get("files", {}).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            recorded[f"stages/{file.name}"] = "not readable"
    return recorded


def _inputs(manifest: dict[str, Any]) -> list[str]:
    """The dataset and the eval set of the run, where they are on this machine, are still those it read."""
    found, inputs = [], manifest["inputs"]
    if (dataset := inputs.get("dataset")) and dataset["content_sha256"] and (datasets() / dataset["key"]).is_dir():
        try:
            there = load_dataset(datasets(), dataset["key"]).manifest["content_sha256"]
            if there != dataset["content_sha256"]:
                found.append(f"edited: dataset {dataset['key']}, another content than the run was made of")
        except RetraceError as error:
            found.append(f"edited: dataset {dataset['key']} ({error})")
    if eval_set := inputs.get("eval_set"):
        try:
            if find_eval_set(manifest["config"]["evaluation"]["eval_set"]).sha256 != eval_set["sha256"]:
                found.append(f"edited: eval set {eval_set['name']}, another content than the run was made of")
        except RetraceError as error:
            found.append(f"missing: eval set {eval_set['name']} ({error})")
    return found
