"""What a training will need of memory, known before it begins: its step is compiled, and the compiler says.

    step, planned = compiled_step(config, Shapes(graph, trained, frozen), length=208)
    str(planned)     # "6,233,088 parameters, all trained; 25 MB weights, 50 MB optimizer, 310 MB gradients and
                     #  activations: peak 410 MB of 21.3 GB"

A plan that cannot fit is refused together with the settings that would.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import accumulate
from math import prod
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import psutil
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lib.config import Config, build, to_dict
from lib.data.batches import Batch
from lib.errors import RequestError
from lib.model.gemma import GemmaConfig
from lib.model.lora import split, with_adapters
from lib.model.mesh import ROWS, make_mesh, mesh_of, on_mesh, placed, shardings
from lib.model.weights import abstract
from lib.training.optimizer import make_optimizer
from lib.training.step import TrainState, make_train_step

# Of the memory that a control group may have: the files of limit and use, and the line of what can be had back.
LIMITS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class Plan(NamedTuple):
    """Counts of weights, and bytes on one device; `activations`: what a step needs beside its state, gradients too."""

    parameters: int
    trained: int
    weights: int
    optimizer: int
    activations: int
    peak: int
    room: int

    def __str__(self) -> str:
        trained = "all" if self.trained == self.parameters else f"{self.trained:,}"
        return (
            f"{self.parameters:,} parameters, {trained} trained; {_size(self.weights)} weights, "
            f"{_size(self.optimizer)} optimizer, {_size(self.activations)} gradients and activations: "
            f"peak {_size(self.peak)} of {_size(self.room)}"
        )


class Shapes(NamedTuple):
    """A model as training sees it, of arrays or of their shapes: what is trained, and what is not."""

    graph: nnx.GraphDef
    trained: dict[str, Any]
    frozen: dict[str, Any]


def divided(graph: nnx.GraphDef, params: dict[str, Any]) -> Shapes:
    """A model's weights as training sees them: where there are adapters, these alone are trained."""
    parts = split(params)
    return Shapes(graph, parts.adapters, parts.base) if parts.adapters else Shapes(graph, parts.base, {})


def shapes_of(model: GemmaConfig, config: Config) -> Shapes:
    """The shapes that this configuration trains a model of, without its weights."""
    lora = config.training.lora
    graph, params = abstract(model, config.model.dtype if lora else "float32")
    if lora is None:
        return divided(graph, params)
    made = {}

    def adapted() -> dict[str, Any]:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
        made["graph"], whole = with_adapters(graph, zeros, lora, 0)
        return whole

    whole = jax.eval_shape(adapted)
    return divided(made["graph"], whole)


def abstract_state(shapes: Shapes, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> TrainState:
    """What a training's state is made of: the shapes, each with its place on the mesh."""
    state = TrainState(jnp.int32(0), shapes.trained, jax.eval_shape(optimizer.init, shapes.trained))
    return placed(state, mesh)


def compiled_step(config: Config, shapes: Shapes, length: int, untrained: int = 0) -> tuple[jax.stages.Compiled, Plan]:
    """The training step for batches of `length` tokens a row, the first `untrained` never trained on; what it takes."""
    training = config.training
    optimizer, _ = make_optimizer(training)
    rows, mesh = (*micro_batches(config), length), make_mesh(config.parallelism)
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, ROWS))
    of_rows = partial(jax.ShapeDtypeStruct, rows, sharding=place)
    of_targets = partial(jax.ShapeDtypeStruct, (*rows[:2], length - untrained), sharding=place)
    batch = Batch(of_rows(jnp.int32), of_targets(jnp.int32), of_targets(bool), of_rows(jnp.int32))
    state, frozen = abstract_state(shapes, optimizer, mesh), placed(shapes.frozen, mesh)
    places = None if mesh is None else shardings(state, mesh)
    step = make_train_step(shapes.graph, optimizer, config.model.dtype, training.remat, places)
    with on_mesh(mesh):
        compiled = step.lower(state, frozen, batch).compile()
    return compiled, _plan(compiled, state, shapes._replace(frozen=frozen))


def micro_batches(config: Config) -> tuple[int, int]:
    """How many batches an update is made of, and their rows on all devices together.

    The update is the same on any number of devices, each of which takes at most per_device_batch_size rows at once:

        per_device_batch_size 8, grad_accum_steps 4     one device 4 × 8     data: 2  2 × 16     data: 8  1 × 32
    """
    training, parts = config.training, config.parallelism.data * config.parallelism.fsdp
    rows = training.per_device_batch_size * training.grad_accum_steps // parts  # of one device, in all
    least = -(-rows // training.per_device_batch_size)
    count = next(count for count in range(least, rows + 1) if rows % count == 0)
    return count, rows // count * parts


def check_plan(planned: Plan, model: GemmaConfig, config: Config, length: int, untrained: int = 0) -> None:
    """Raise RequestError where the plan does not fit, with settings that would."""
    if planned.peak <= planned.room:
        return
    problem = f"training needs {_size(planned.peak)} of memory, and there are {_size(planned.room)}: {planned}"
    for changed, settings in _smaller(config):
        found = compiled_step(changed, shapes_of(model, changed), length, untrained)[1]
        if found.peak <= planned.room:
            raise RequestError(f"{problem}. This would fit, with {_size(found.peak)}: --set {' --set '.join(settings)}")
    other = "model.dtype=bfloat16" if config.training.lora else "training.lora"
    raise RequestError(f"{problem}. Neither smaller batches, nor {other}, would fit; take a smaller model")


def _smaller(config: Config) -> Iterator[tuple[Config, list[str]]]:
    """The same training with less and less memory, and how to ask for it: what changes the result comes last."""
    size, narrow = config.training.per_device_batch_size, {"model.dtype": "bfloat16"}
    steps: list[dict[str, Any]] = [{"training.remat": True}]
    while size > 1 and size % 2 == 0:
        size //= 2
        steps.append({"training.per_device_batch_size": size, "training.grad_accum_steps":
                      config.training.grad_accum_steps * config.training.per_device_batch_size // size})  # fmt: skip
    if config.training.lora is None:
        steps += [{"training.optimizer": "adafactor"}, {"training.lora": {}} | narrow]
    asked = list(accumulate(steps, or_))
    if config.training.lora:
        asked += [narrow, asked[-1] | narrow]  # alone, as that is most of it: the optimizer has the adapters alone
    for settings in asked:
        shown = [f"'{name}={str(value).lower()}'" for name, value in settings.items()]
        yield _changed(config, settings), shown


def _changed(config: Config, settings: dict[str, Any]) -> Config:
    tree = to_dict(config)
    for name, value in settings.items():
        part, field = name.split(".")
        tree[part][field] = value
    return build(Config, tree, "")


def _plan(compiled: jax.stages.Compiled, state: TrainState, shapes: Shapes) -> Plan:
    memory = compiled.memory_analysis()
    weights = _bytes(state.params) + _bytes(shapes.frozen)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes  # not written into what came in
    step = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    return Plan(
        parameters=_count(shapes.trained) + _count(shapes.frozen),
        trained=_count(shapes.trained),
        weights=weights,
        optimizer=_bytes(state.opt_state),
        activations=memory.temp_size_in_bytes,
        # The base that training began with stays beside the weights that are trained.
        peak=step + (0 if shapes.frozen else weights),
        room=_room(mesh_of(state)) + _held(shapes),
    )


def _room(mesh: Mesh | None) -> int:
    """Bytes that one device has for us; those that are no cards share the memory of their host."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return limit - stats.get("bytes_in_use", 0)
    limits = free_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min([psutil.virtual_memory().available, *limits]) // _sharers(mesh)


def _sharers(mesh: Mesh | None) -> int:
    """How many devices of the mesh are on this host, as far as this process knows: its own, or all by `launch`."""
    if mesh is None:
        return 1
    all_here = os.environ.get("JAX_COORDINATOR_ADDRESS", "").startswith("127.0.0.1")
    return mesh.size if all_here else len(mesh.local_devices)


def free_in_groups(member: Path, groups: Path) -> list[int]:
    """Bytes that are left of each limit that a container or a batch job sets for this process; beyond, it is killed.

    `member` names its control groups (cgroups(7), of either version), whose folders are in `groups`. What is kept of
    files that nobody has read lately counts as free.
    """
    found: list[int] = []
    with suppress(OSError):
        for line in member.read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if (names := LIMITS.get(controllers)) is None:
                continue
            root = groups / controllers
            for folder in (inner := root / own.lstrip("/"), *inner.parents):
                with suppress(OSError, ValueError, KeyError):  # no limit is no file, or `max`
                    limit, used = (int((folder / name).read_text()) for name in names[:2])
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    found.append(max(0, limit - used + int(stat[names[2]])))
                if folder == root:
                    break
    return found


def _held(shapes: Shapes) -> int:
    """Bytes of the plan that are in memory already."""
    leaves = jax.tree.leaves((shapes.trained, shapes.frozen))
    return _bytes([leaf for leaf in leaves if isinstance(leaf, jax.Array)])


def _bytes(tree: Any) -> int:
    """On one device, where the leaves lie on many."""
    return sum(prod(_shard(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shard(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return sharding.shard_shape(leaf.shape) if isinstance(sharding, NamedSharding) else leaf.shape


def _count(tree: Any) -> int:
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
