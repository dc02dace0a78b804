"""Training on a file, outside a run: what `python -m lib train` does, and its dry run."""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lib.config import Config
from lib.data.batches import Batches
from lib.data.dataset import dataset_tokenizer
from lib.data.export import read_examples
from lib.data.renderer import Example, question_of
from lib.data.selection import is_held_out
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.data.validation import check_lengths, encode_all, measure_lengths
from lib.errors import RequestError
from lib.experiments.manifest import PATCH, hash_files, save_code, write_manifest
from lib.experiments.run import MANIFEST, STATE, at_work, read_manifest, sweep
from lib.experiments.tracking import check_tracking, track_ended
from lib.files import atomic_write, sha256_file, shown_path, write_json
from lib.trace import utc_now


def tokenizer_beside(data: Path, examples: list[Example]) -> tuple[Tokenizer, str]:
    """The small tokenizer of a training file, and where it is from: `tokenizer.json` beside it, or learned from it.

    A file that is a whole dataset gives the tokenizer that the dataset keeps, as both learn from the same text.
    """
    beside = data.parent / "tokenizer.json"
    if beside.is_file():
        return load_tokenizer(beside), "by tokenizer.json beside the file"
    return dataset_tokenizer(examples), "by a tokenizer learned from the file"


def train_on_file(
    config: Config,
    data: Path,
    output: Path,
    on_metrics: Callable[[dict], None],
    say: Callable[[str], None] = print,
) -> Any:
    """Fine-tune on a training file into `output`, with a manifest at the end. Returns the TrainingResult.

    `say` is told what is done, before the first step is. Of several processes all compute, and the first one writes.

    Raises RequestError for what is wrong with the request, RetraceError where training fails.
    """
    from lib.model.processes import by_first, is_first
    from lib.model.released import find_released, is_from_scratch
    from lib.model.storage import DamagedError
    from lib.model.weights import configured_base
    from lib.training.checkpoints import has_trained
    from lib.training.loop import finished, inputs_of, train

    check_tracking(config.tracking)
    examples = read_examples(data, config.recipe, config.system_instruction)
    if not is_from_scratch(config.model.name):
        find_released(config.model.name)
    tokenizer_file = output / "tokenizer.json"

    def prepare() -> None:
        sweep(output)
        say(f"training {config.model.name} on {_planned(examples, config)}, into {shown_path(output)}")
        if is_from_scratch(config.model.name):
            tokenizer = tokenizer_beside(data, examples)[0]
            other = tokenizer_file.is_file() and tokenizer_file.read_bytes() != tokenizer.to_json().encode()
            if other and has_trained(output):
                raise RequestError(f"{output}: holds a training run on other data; give another output folder")
            tokenizer.save(tokenizer_file)

    output.mkdir(parents=True, exist_ok=True)
    with at_work(output) if is_first() else nullcontext():
        by_first(prepare)
        model = configured_base(config, tokenizer_file)
        with suppress(DamagedError):
            if _is_recorded(output):
                inputs = inputs_of(model, examples, config)
                if done := finished(output, inputs, config.parallelism, model):
                    return done
        with _recorded(config, data, output, say) if is_first() else nullcontext(lambda *facts: None) as close:
            result = train(model, examples, config, output, on_metrics, say, say)
            metrics = {"training": result._asdict(), "weights_sha256": result.weights_sha256}
            close("done", metrics, {"train": result.seconds})
    by_first(lambda: track_ended(output, config.tracking, say))
    return result


@contextmanager
def _recorded(config: Config, data: Path, output: Path, say: Callable[[str], None]) -> Iterator[Callable]:
    """A state while the block lasts, and a manifest however it ends; a request that is refused changes neither.

    Begun before, it stays the same run, with an attempt more, but where it came to no checkpoint and was asked for
    otherwise.
    """
    from lib.training.checkpoints import has_trained
    from lib.training.fingerprint import fingerprint

    files = [output / MANIFEST, output / PATCH, output / STATE]
    kept = {file: file.read_bytes() for file in files if file.is_file()}
    attempt, before = {"started_at": utc_now(), **save_code(output)}, _earlier(output)
    asked = {"config": asdict(config), "inputs": _inputs(data)}
    if not has_trained(output) and asked != {name: before.get(name) for name in asked}:
        before = {}
    identity = {
        "run_id": before.get("run_id") or str(uuid.uuid4()),
        "created_at": before.get("created_at") or attempt["started_at"],
        "attempts": [*before.get("attempts", []), attempt],
    }
    close = partial(_write_manifest, config, data, output, identity, fingerprint(config.parallelism))
    write_json(output / STATE, identity | asked | {"stage": "train"})
    (output / MANIFEST).unlink(missing_ok=True)
    try:
        yield close
    except RequestError:
        for file in files:
            if file in kept:
                atomic_write(file, kept[file])
            else:
                file.unlink(missing_ok=True)
        raise
    except (KeyboardInterrupt, Exception) as failure:
        if isinstance(failure, KeyboardInterrupt):
            close("interrupted", error="interrupted in training")
        else:
            close("failed", error=str(failure) or type(failure).__name__)
        track_ended(output, config.tracking, say)
        raise


def _is_recorded(output: Path) -> bool:
    """Whether a manifest says that the training is done; one that was stopped just before still has to be written."""
    with suppress(RequestError):
        return read_manifest(output)["status"] == "done"
    return False


def _earlier(output: Path) -> dict[str, Any]:
    """What is known of an earlier attempt, from its manifest or its state; nothing of a dry run."""
    with suppress(RequestError):
        manifest = read_manifest(output)
        return manifest if manifest["status"] != "dry_run" else {}
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((output / STATE).read_bytes()))
    return {}


def check_training(config: Config, data: Path, output: Path) -> list[str]:
    """Everything that can be told before training, as lines to print; the manifest says `dry_run` and no figure.

    That of a training that came to no checkpoint stays what it is. Raises RequestError where training would be refused.
    """
    from lib.model.processes import by_first
    from lib.model.released import find_released, is_from_scratch
    from lib.model.weights import check_released, model_config
    from lib.training.checkpoints import has_trained
    from lib.training.fingerprint import fingerprint
    from lib.training.plan import check_plan, compiled_step, shapes_of
    from lib.training.trainers import tunix_version

    if has_trained(output):
        raise RequestError(f"{output}: holds a run already; give another --output")
    check_tracking(config.tracking)
    examples = read_examples(data, config.recipe, config.system_instruction)
    held = [is_held_out(question_of(example.prompt, config.system_instruction)) for example in examples]
    if all(held):
        raise RequestError(f"{data}: all {len(examples)} examples fall to the held-out side; give more examples")
    training = config.training
    recorded = bool(_earlier(output))
    lines = [
        "dry run: nothing is trained" + ("" if recorded else f", and {shown_path(output)}/{MANIFEST} says so"),
        f"data: {_planned(examples, config)}",
    ]
    try:
        if is_from_scratch(config.model.name):
            tokenizer, _ = tokenizer_beside(data, examples)
        else:
            folder = find_released(config.model.name, fetch=False)  # a dry run fetches nothing
    except RequestError as missing:
        lines.append(f"not checked: weights, and lengths in tokens; {missing}")
    else:
        if not is_from_scratch(config.model.name):
            check_released(config.model.name)
            tokenizer = load_tokenizer(folder / "tokenizer.json")
        found = measure_lengths(examples, tokenizer)
        check_lengths(found, config.model.max_length)
        shortest, longest = found.percentile(0), found.percentile(100)
        lines.append(f"tokens: {shortest} to {longest} an example, {found.trained_tokens} of {found.tokens} trained on")
        shape = model_config(config.model.name, tokenizer)
        tuned_on = [example for example, out in zip(examples, held, strict=True) if not out]
        batches = Batches(encode_all(tuned_on, tokenizer, config.model.max_length), training, config.model.max_length)
        _, planned = compiled_step(config, shapes_of(shape, config), batches.length, batches.untrained)
        check_plan(planned, shape, config, batches.length, batches.untrained)
        lines.append(f"model: {config.model.name}, {planned}")
    if training.trainer == "tunix":
        try:
            lines.append(f"trainer: google-tunix {tunix_version()}")
        except RequestError as missing:
            lines.append(f"not checked: the trainer; {missing}")
    machine = fingerprint(config.parallelism)

    def write() -> None:
        attempt = {"started_at": utc_now(), **save_code(output)}
        identity = {"run_id": str(uuid.uuid4()), "created_at": attempt["started_at"], "attempts": [attempt]}
        _write_manifest(config, data, output, identity, machine, "dry_run")

    if not recorded:
        by_first(write)
    return lines


def _inputs(data: Path) -> dict[str, Any]:
    return {"data": {"file": data.name, "sha256": sha256_file(data)}}


def _planned(examples: list[Example], config: Config) -> str:
    steps, batch = config.training.num_steps, config.training.per_device_batch_size * config.training.grad_accum_steps
    if config.training.batching == "packed":  # rows of several examples, and how many is not known yet
        return f"{len(examples)} examples; {steps} steps of {batch} packed rows"
    return f"{len(examples)} examples; {steps} steps of {batch} are {steps * batch / len(examples):.1f} epochs"


def _write_manifest(
    config: Config,
    data: Path,
    output: Path,
    identity: dict[str, Any],
    fingerprint: dict[str, Any],
    status: str,
    metrics: dict[str, Any] | None = None,
    wall_s: dict[str, float] | None = None,
    error: str = "",
) -> None:
    *attempts, last = identity["attempts"]
    write_manifest(
        output,
        config,
        status,
        identity={name: identity[name] for name in ("run_id", "created_at")},
        attempts=[*attempts, last | {"ended_at": utc_now(), "status": status}],
        inputs=_inputs(data),
        artifacts=hash_files(output),
        metrics=metrics or {},
        wall_s=wall_s or {},
        fingerprint=fingerprint,
        error=error,
    )
    (output / STATE).unlink(missing_ok=True)  # the state stays where no manifest could be written, and says so
