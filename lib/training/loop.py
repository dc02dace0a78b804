"""The training loop: examples in, metrics and checkpoints out, and the same bits every time.

    result = train(model, examples, config, run / "…", on_metrics=print)
    result.weights_sha256      # equal for equal examples, config and seed, resumed or not

    OUTPUT/metrics.jsonl       one line a logged step
    OUTPUT/checkpoints.jsonl   one line a checkpoint: the digest of weights and optimizer state, kept when it is not
    OUTPUT/checkpoints/        weights and optimizer state, to go on from
    OUTPUT/tensorboard/        the metrics once more, where TensorBoard is to be told (events.py)
    OUTPUT/checkpoint-final/   the tuned model; its presence means that training is done

Called again on the same output it goes on where it stopped; batches are a pure function of (seed, step).
"""

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lib.config import ONE_DEVICE, Config, ParallelismConfig
from lib.data.batches import Batch, Batches, make_batch, row_length, untrained
from lib.data.renderer import EncodedExample, Example, question_of
from lib.data.selection import is_held_out
from lib.data.validation import encode_all
from lib.errors import RequestError, RetraceError
from lib.files import atomic_write, is_sealed, sealed, write_json
from lib.model.lora import join
from lib.model.mesh import assembled, make_mesh, on_mesh, row_devices, shardings, spread, spread_rows
from lib.model.processes import by_first, explained, is_first
from lib.model.storage import DamagedError, tree_digest
from lib.model.weights import Model, load_model, read_about, save_model, with_lora
from lib.progress import progress
from lib.training.checkpoints import cut_logs, has_trained, logs_of, restore_latest, save_checkpoint, saved_steps
from lib.training.events import event_files
from lib.training.fingerprint import differences, fingerprint, setting
from lib.training.optimizer import make_optimizer
from lib.training.plan import Shapes, abstract_state, check_plan, compiled_step, divided, micro_batches
from lib.training.step import StepMetrics, TrainState, sum_loss
from lib.training.trainers import tunix_version
from lib.training.tunix import tunix_step


class TrainingResult(NamedTuple):
    """What training came to: `examples` that were trained on, and `held_out` others kept for the held-out loss.

    Losses are in nats a trained token; held_out_loss is None where nothing was held out.
    """

    steps: int
    examples: int
    held_out: int
    loss: float
    held_out_loss: float | None
    weights_sha256: str
    tokens_per_second: float
    seconds: float
    resumed_from: int


Metrics = dict[str, float]


def train(
    model: Model,
    examples: list[Example],
    config: Config,
    output: Path,
    on_metrics: Callable[[Metrics], None] = lambda line: None,
    warn: Callable[[str], None] = print,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Fine-tune the weights of `model`, or adapters beside them, on the model's turns of `examples`.

    Raises RequestError where an example does not fit, the output holds another run, or its logs are others than its
    checkpoints know; RetraceError, naming the step, where the loss is no longer a finite number; the checkpoints before
    that step stay.
    """
    mesh = make_mesh(config.parallelism)
    model = model._replace(params=spread(model.params, mesh))
    inputs = inputs_of(model, examples, config)
    try:
        if done := finished(output, inputs, config.parallelism, model):
            return done
    except DamagedError as error:
        warn(f"{error}; going back to the checkpoint before")
    encoded = encode_all(examples, model.tokenizer, config.model.max_length)
    held = [is_held_out(question_of(example.prompt, config.system_instruction)) for example in examples]
    tuned_on = [item for item, out in zip(encoded, held, strict=True) if not out]
    held_out = [item for item, out in zip(encoded, held, strict=True) if out]
    if not tuned_on:
        raise RequestError(f"all {len(examples)} examples fell to the held-out side; give more examples")
    changed: list[str] = []
    by_first(lambda: changed.extend(_changed(output, inputs, config, warn)))
    adapts: dict[str, Any] = {}
    if config.training.lora:
        about = {"dtype": str(model.params["embedding"].dtype), "weights_sha256": inputs["base_weights_sha256"]}
        adapts["adapts"] = {"seed": config.training.seed} | about
        model = with_lora(model, config.training.lora, config.training.seed)
        model = model._replace(params=spread(model.params, mesh))
    batches = Batches(tuned_on, config.training, config.model.max_length, micro_batches(config))
    shapes = divided(model.graph, model.params)
    longest, planned = compiled_step(config, shapes, batches.length, batches.untrained)
    say(planned)
    check_plan(planned, model.config, config, batches.length, batches.untrained)
    by_first(lambda: _claim(output, inputs, config))  # not before, as what is refused must leave the folder free
    step = _step(config, shapes, longest, batches)
    if config.training.trainer == "tunix":
        step = tunix_step(shapes, config)
    remedy = "halve training.per_device_batch_size and double training.grad_accum_steps: the same update in less memory"
    with explained("training", remedy):
        state, resumed_from, lines = _run(shapes, step, batches, held_out, config, output, on_metrics, warn)
    trained = model._replace(params=join(shapes.frozen, state.params))
    last = lines[-1]
    facts = {
        "steps": int(state.step),
        "examples": len(tuned_on),
        "held_out": len(held_out),
        "loss": last["loss"],
        "held_out_loss": last.get("held_out_loss"),
        "tokens_per_second": float(np.median([line["tokens_per_second"] for line in lines])),
        "seconds": last["seconds"],
        "resumed_from": resumed_from,
    }
    save_model(
        output / "checkpoint-final", trained, inputs=inputs, training=facts, logs=logs_of(output),
        fingerprint=fingerprint(config.parallelism),
        fingerprint_changed=changed, system_instruction=config.system_instruction, **adapts,
    )  # fmt: skip
    return _result(output)


def finished(
    output: Path,
    inputs: dict[str, Any] | None = None,
    parallelism: ParallelismConfig = ONE_DEVICE,
    base: Model | None = None,
) -> TrainingResult | None:
    """The result of training that is done in this folder, of these inputs where they are given, its base among them.

    Raises DamagedError as `tuned_model` does.
    """
    if not (output / "checkpoint-final" / "model.json").is_file():
        return None
    if inputs is not None:
        _refuse_other(output, read_about(output / "checkpoint-final")["inputs"], inputs)
    tuned_model(output, parallelism, base)
    return _result(output)


def tuned_model(output: Path, parallelism: ParallelismConfig = ONE_DEVICE, base: Model | None = None) -> Model:
    """The model of training that is done in this folder; `base` as `load_model` takes it.

    Raises DamagedError where it, or what was logged of its training, is not what was saved.
    """
    model = load_model(output / "checkpoint-final", parallelism, base)
    cut_logs(output, output / "checkpoint-final" / "model.json")
    return model


def _result(output: Path) -> TrainingResult:
    about = read_about(output / "checkpoint-final")
    return TrainingResult(weights_sha256=about["weights_sha256"], **about["training"])


def _run(
    shapes: Shapes,
    train_step: Callable,
    batches: Batches,
    held_out: list[EncodedExample],
    whole: Config,
    output: Path,
    on_metrics: Callable[[Metrics], None],
    warn: Callable[[str], None],
) -> tuple[TrainState, int, list[Metrics]]:
    """From the newest checkpoint, or from the start, to the last step."""
    config = whole.training
    optimizer, schedule = make_optimizer(config)
    schedule = jax.jit(schedule)
    mesh = make_mesh(whole.parallelism)
    state = restore_latest(output / "checkpoints", abstract_state(shapes, optimizer, mesh), warn)
    if state is None:
        state = _begun(jax.tree.map(jnp.array, shapes.trained), optimizer, mesh)  # a copy: the step uses its state up
    start = int(state.step)
    lines: list[Metrics] = []
    if is_first():
        lines = _lines_until(output / "metrics.jsonl", start)
        _lines_until(output / "checkpoints.jsonl", start)
    held_out_loss = _held_out_loss(shapes, held_out, whole)
    began = time.perf_counter() - (lines[-1]["seconds"] if lines else 0.0)
    clock, seen, batch = time.perf_counter(), 0, _batch(batches, start, mesh)
    at_work: deque[tuple[int, StepMetrics]] = deque()
    with (
        progress(config.num_steps, "training", "steps", initial=start) as bar,
        event_files(output, whole.tracking if is_first() else [], lines) as show,
    ):
        for step in range(start + 1, config.num_steps + 1):
            state, metrics = train_step(state, shapes.frozen, batch)
            at_work.append((step, metrics))
            seen += batches.tokens(step - 1)
            last = step == config.num_steps
            if not last:
                batch = _batch(batches, step, mesh)  # while the device is at work
            evaluates = held_out and (last or step % config.eval_every == 0)
            logs = last or evaluates or step % config.log_every == 0
            saves = last or step % config.checkpoint_every == 0
            while len(at_work) > (0 if logs or saves else 1):  # the device never waits for us: it has the next step
                number, found = at_work.popleft()
                losses = {"loss": float(found.loss), "gradient norm": float(found.grad_norm)}
                _refuse_not_finite(number, losses, schedule, output)
            if logs:
                now = time.perf_counter()
                line = _line(step, metrics, schedule, seen / (now - clock)) | {"seconds": round(now - began, 2)}
                if evaluates:
                    line["held_out_loss"] = held_out_loss(state.params)
                    _refuse_not_finite(step, {"held-out loss": line["held_out_loss"]}, schedule, output)
                _append(output / "metrics.jsonl", line)
                lines.append(line)
                show(line)
                on_metrics(line)
                bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
                clock, seen = time.perf_counter(), 0
            if saves:
                paused = time.perf_counter()
                digest = tree_digest(state)
                _append(output / "checkpoints.jsonl", {"step": step, "sha256": digest})
                if not last:
                    save_checkpoint(output / "checkpoints", state, digest)
                clock += time.perf_counter() - paused
            bar.update()
    return state, start, lines


def _step(config: Config, shapes: Shapes, longest: Callable, batches: Batches) -> Callable:
    """The training step for rows of any length, compiled once for each; for the longest it is `longest`."""
    compiled = {batches.length: longest}

    def step(state: TrainState, frozen: dict[str, Any], batch: Batch) -> tuple[TrainState, StepMetrics]:
        T = batch.tokens.shape[-1]
        if T not in compiled:
            compiled[T], _ = compiled_step(config, shapes, T, batches.untrained)
        return compiled[T](state, frozen, batch)

    return step


def _begun(params: dict, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> TrainState:
    """The state before the first step; on a mesh every part of it is made where it lies."""
    if mesh is None:
        return TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))  # as one program, not one a leaf
    places = shardings(jax.eval_shape(optimizer.init, params), mesh)
    return TrainState(spread(jnp.int32(0), mesh), params, jax.jit(optimizer.init, out_shardings=places)(params))


def _batch(batches: Batches, step: int, mesh: Mesh | None) -> Batch:
    """The batch of a step, the first of which is 0; on a mesh each process makes its own rows of it."""
    if mesh is None:
        return batches[step]
    return assembled(lambda rows: batches.part(step, rows), batches.shape[1], mesh)


def _held_out_loss(shapes: Shapes, examples: list[EncodedExample], config: Config) -> Callable[[dict], float]:
    """Mean loss over the held-out examples, in batches of one compiled shape."""
    loss, mesh = jax.jit(sum_loss(shapes.graph, config.model.dtype)), make_mesh(config.parallelism)
    B = config.training.per_device_batch_size * row_devices(mesh)
    length = row_length(max((len(example.tokens) for example in examples), default=1))
    rows, skipped = [[example] for example in examples], untrained(examples) if examples else 0
    batches = [_full(make_batch(rows[start : start + B], length, skipped), B) for start in range(0, len(rows), B)]
    if mesh is not None:
        batches = [Batch(*(spread_rows(field, mesh) for field in batch)) for batch in batches]

    def mean_loss(params: dict) -> float:
        with on_mesh(mesh):
            sums = [loss(params, shapes.frozen, batch) for batch in batches]
        return float(sum(float(total) for total, _ in sums) / sum(int(tokens) for _, tokens in sums))

    return mean_loss


def _full(batch: Batch, rows: int) -> Batch:
    """The batch with empty rows added, which count for nothing."""
    return Batch(
        *(np.concatenate([field, np.zeros((rows - len(field), field.shape[1]), field.dtype)]) for field in batch)
    )


def _line(step: int, metrics: StepMetrics, schedule: optax.Schedule, tokens_per_second: float) -> Metrics:
    return {
        "step": step,
        "loss": float(metrics.loss),
        "learning_rate": float(schedule(step - 1)),
        "grad_norm": float(metrics.grad_norm),
        "tokens_per_second": round(tokens_per_second, 1),
    }


def _refuse_not_finite(step: int, found: dict[str, float], schedule: optax.Schedule, output: Path) -> None:
    """Stop where a loss is no number; the weights that gave it are those after step - 1, so that one is no good."""
    if all(math.isfinite(value) for value in found.values()):
        return
    good = [saved for saved in saved_steps(output / "checkpoints") if saved < step - 1]
    raise RetraceError(
        f"training stopped at step {step}: {', '.join(f'{name} {value}' for name, value in found.items())}, at "
        f"learning rate {float(schedule(step - 1)):g}. "
        + (f"The checkpoint of step {good[-1]} is good. " if good else "No good checkpoint was written before it. ")
        + "Lower training.learning_rate or raise training.warmup_steps"
    )


def inputs_of(model: Model, examples: list[Example], config: Config) -> dict[str, Any]:
    """Everything that decides the result, as plain values to compare."""
    content = hashlib.sha256(
        "".join(json.dumps([example.prompt, example.response]) + "\n" for example in examples).encode()
    )
    inputs = {
        "model": model.name,
        "dtype": model.dtype,
        "base_weights_sha256": model.weights_sha256,
        "tokenizer_sha256": hashlib.sha256(model.tokenizer.to_json().encode()).hexdigest(),
        "examples_sha256": content.hexdigest(),
        "training": asdict(config.training),
    }
    if config.training.batching == "packed":
        inputs["max_length"] = config.model.max_length
    if config.training.trainer == "tunix":
        inputs["tunix"] = tunix_version()
    return inputs


def _claim(output: Path, inputs: dict[str, Any], config: Config) -> None:
    """Say in the output whose training it holds, and on what; one that came to nothing holds it no longer."""
    if not _is_claimed(output):
        claim = {"inputs": inputs, "fingerprint": fingerprint(config.parallelism)}
        write_json(output / "checkpoints" / "inputs.json", sealed(claim))


def _is_claimed(output: Path) -> bool:
    return (output / "checkpoints" / "inputs.json").is_file() and has_trained(output)


def _changed(output: Path, inputs: dict[str, Any], config: Config, warn: Callable[[str], None]) -> list[str]:
    """What was another in this or an earlier attempt than where the training began, which ends the promise of equal
    bits; nothing where it begins.

    Raises RequestError where the output holds another training, or where that is a setting that can be put back.
    """
    if not _is_claimed(output):
        return []
    claim, here = output / "checkpoints" / "inputs.json", fingerprint(config.parallelism)
    try:
        content = claim.read_bytes()
        if not is_sealed(content):
            raise ValueError("edited after it was written")
        found = json.loads(content)
        there = found["fingerprint"]
        _refuse_other(output, found["inputs"], inputs)
    except (ValueError, KeyError, TypeError) as error:
        raise RetraceError(f"{claim}: damaged ({error}); delete {claim.parent} and train again") from None
    changed = differences(there, here)
    earlier = found.get("changed", [])
    for name in changed:
        if variable := setting(name):
            raise RequestError(
                f"{output}: training began with {variable}={there.get(name, '')!r}, and here it is "
                f"{here.get(name, '')!r}: set it to the former to go on to the same bits, or train into another folder"
            )
        warn(f"training began with {name} {there.get(name, 'absent')}, here it is {here.get(name, 'absent')}: "
             "it goes on, but equal bits are not promised")  # fmt: skip
    if new := [name for name in changed if name not in earlier]:
        write_json(claim, sealed(found | {"changed": earlier + new}))
    return earlier + new


def _refuse_other(output: Path, there: dict[str, Any], inputs: dict[str, Any]) -> None:
    differs = [name for name in inputs if there.get(name) != inputs[name]]
    if differs == ["training"]:
        differs = [
            f"training.{key}" for key, value in inputs["training"].items() if there["training"].get(key) != value
        ]
    if differs:
        raise RequestError(
            f"{output}: holds a training run with other {', '.join(differs)}; give another output folder"
        )


def _lines_until(path: Path, step: int) -> list[Metrics]:
    """The logged lines up to a step; later ones, of steps that will be done again, are dropped from the file."""
    lines = list(_complete_lines(path)) if step else []  # from the start, nothing of an earlier attempt is read
    kept = [line for line in lines if line["step"] <= step]
    # Always, as a last line that was cut by a kill is no line, and the next would be written behind it.
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def _complete_lines(path: Path) -> Iterator[Metrics]:
    if path.is_file():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # the last may be cut by a kill
                yield json.loads(line)


def _append(path: Path, line: dict[str, Any]) -> None:
    if not is_first():
        return
    try:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:  # of a full disk, which tells no name
        error.filename = str(path)
        raise
