"""A tuned model out of the house: a folder for transformers, and a card that says where it is from.

    export_model("20261122_101500_quickstart", Path("exported"))

    exported/  config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json  README.md

The folder appears whole or not at all. What is exported is verified first: the weights against the digest in
`model.json`, and `model.json` against the hash that the manifest of the run has of it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from lib.errors import RequestError, RetraceError
from lib.experiments.model_card import CardFacts, model_card
from lib.experiments.run import CONFIG, MANIFEST, find_run, read_manifest
from lib.experiments.stages import command
from lib.files import atomic_folder, atomic_write, sha256_file, shown_path
from lib.model.lora import split
from lib.model.released import find_released, is_from_scratch
from lib.model.released_config import is_nested
from lib.model.releasing import weights_dtype, write_adapters, write_released
from lib.model.weights import Model, load_model, read_about, without_lora

TUNED = "checkpoint-final"


class Source(NamedTuple):
    """A checkpoint, and where a run made it: the name and the manifest of that run."""

    checkpoint: Path
    run: str = ""
    manifest: dict[str, Any] | None = None


class Exported(NamedTuple):
    """What was written."""

    name: str
    parameters: int
    dtype: str
    weights_sha256: str


def export_model(run: str, to: Path, dtype: str = "", adapters: bool = False) -> Exported:
    """Write the tuned model of a run, or of a checkpoint folder, into the new or empty folder `to`.

    LoRA's adapters are merged into the weights, or with `adapters` written by themselves, as peft reads them.

    Raises RequestError, or RetraceError where the checkpoint is not what was saved; then nothing is left there.
    """
    source = find_source(run)
    if to.resolve().is_relative_to((source.checkpoint.parent if source.run else source.checkpoint).resolve()):
        raise RequestError(f"{to}: lies in what is exported; give a folder beside it")
    with atomic_folder(to) as folder:
        model, about = load_model(source.checkpoint), read_about(source.checkpoint)
        if adapters:
            _write_adapters(folder, model, source, dtype)
        else:
            model = without_lora(model, dtype)
            write_released(folder, model, about.get("system_instruction", ""), dtype)
        held = "float32" if adapters else weights_dtype(model)
        facts = CardFacts(about, source.run, source.manifest, held, dtype or held, adapters)
        atomic_write(folder / "README.md", model_card(facts))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(split(model.params).adapters if adapters else model.params))
    return Exported(source.run or model.name, parameters, facts.stored, about["weights_sha256"])


def _write_adapters(folder: Path, model: Model, source: Source, dtype: str) -> None:
    if model.lora is None:
        raise RequestError(f"--adapters: {shown_path(source.checkpoint)} has none, all its weights were trained")
    if dtype:
        raise RequestError("--dtype: adapters are written as they were trained; leave it out beside --adapters")
    nested = not is_from_scratch(model.name) and is_nested(find_released(model.name))
    write_adapters(folder, model, nested)


def find_source(run: str) -> Source:
    """The checkpoint that is meant by a run or a checkpoint folder. Raises RequestError."""
    if "\0" not in run and (Path(run) / "model.json").is_file():
        return Source(Path(run))
    folder = find_run(run)
    checkpoint = folder / TUNED
    if not (checkpoint / "model.json").is_file():
        again = command("resume", run) if (folder / CONFIG).is_file() else "give its train command again"
        raise RequestError(f"{shown_path(folder)}: not trained to its end (no {TUNED}); {again}")
    manifest = read_manifest(folder)
    recorded = manifest["artifacts"].get(f"{TUNED}/model.json", {}).get("sha256")
    if recorded != sha256_file(checkpoint / "model.json"):
        raise RetraceError(f"{shown_path(checkpoint)}: not the model that {MANIFEST} records; see runs verify {run}")
    return Source(checkpoint, folder.resolve().name, manifest)
