"""Weights and batches over many devices: `parallelism: {data: 2, fsdp: 2, tensor: 2}` is a mesh of eight.

    rows of a batch         over data × fsdp: every device computes its own
    D of every matrix       over fsdp: each keeps a part, and gathers the rest for as long as it computes with it
    heads, F and V          over tensor: each computes its heads, its part of the feed-forward and of the vocabulary

With 1 everywhere there is no mesh, and the program is that of one device. Only the placing is said here; the
collectives are the compiler's (GSPMD, arXiv 2105.04663). fsdp is stage 3 of ZeRO (arXiv 1910.02054), tensor follows
Megatron-LM (arXiv 1909.08053). The optimizer's means lie where their weights do, as they have the same names.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lib.config import ParallelismConfig
from lib.errors import RequestError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Every matrix by the letters of its axes (gemma.py), of a projection out ← in, and what each letter is split over; a
# vector is whole everywhere.
LETTERS = {
    "embedding": "VD",
    "query": "NH←D", "key": "KH←D", "value": "KH←D", "output": "D←NH",
    "gate": "F←D", "up": "F←D", "down": "D←F",
}  # fmt: skip
OVER = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
WORDS = {"D": "embed_dim", "N": "num_heads", "F": "hidden_dim"}


@cache
def make_mesh(parallelism: ParallelismConfig) -> Mesh | None:
    """The mesh [data, fsdp, tensor] over all devices of all processes; None for 1 everywhere.

    Raises RequestError where the devices are not so many.
    """
    shape = (parallelism.data, parallelism.fsdp, parallelism.tensor)
    if prod(shape) == jax.process_count() == 1:
        return None
    if prod(shape) != jax.device_count():
        asked = " × ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        raise RequestError(
            f"parallelism: {asked} is {prod(shape)} devices, and jax sees {jax.device_count()}{processes}; "
            "make the product that, or show jax as many devices"
        )
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree of arrays lies on; None on one device."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def row_devices(mesh: Mesh | None) -> int:
    """How many parts the rows of a batch are in."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def on_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """While it lasts, `by_rows` knows of the mesh."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def by_rows(x: jax.Array) -> jax.Array:
    """The same numbers [B, …], on a mesh with the rows apart; else the compiler might keep fsdp's parts of D apart."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def by_heads(x: jax.Array) -> jax.Array:
    """The same numbers [B, K, …], on a mesh with the rows apart, and the key-value heads where they can be."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    heads = "tensor" if x.shape[1] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, heads))


# ---- weights --------------------------------------------------------------------------------------------------


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each leaf of a tree of weights, or of a training state, lies.

    Raises RequestError where an axis of the model cannot be split so.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(_letters(path), leaf.shape, mesh)), tree
    )


def placed(tree: Any, mesh: Mesh | None) -> Any:
    """The shapes of a tree, each with its place on the mesh; without one as they are."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree, shardings(tree, mesh),
    )  # fmt: skip


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays of a tree, each in its place on the mesh; without one as they are."""
    return tree if mesh is None else jax.tree.map(_put, tree, shardings(tree, mesh))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _letters(path: tuple) -> str:
    """The axes of a leaf by its path, empty where it is no matrix; LoRA's have its projection's outputs, or inputs."""
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    if names[-3:-2] == ["adapters"]:
        outputs, _, inputs = LETTERS[names[-2]].partition("←")
        return "R" + inputs if names[-1] == "a" else outputs + "R"
    return LETTERS.get(names[-1], "").replace("←", "") if names else ""


def _spec(letters: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if len(letters) != len(shape):  # Adafactor's means of rows and columns are small, and whole everywhere
        return PartitionSpec()
    over = dict(OVER)
    for letter, size in zip(letters, shape, strict=True):
        if letter == "K" and size % mesh.shape["tensor"]:  # fewer than the devices: each has all of them
            del over["K"]
        if letter == "V" and size % mesh.shape["tensor"]:  # of a tokenizer whose size is what it is
            over |= {"V": None, "D": ("fsdp", "tensor")}
    for letter, size in zip(letters, shape, strict=True):
        axes = over.get(letter) or ()
        axes = (axes,) if isinstance(axes, str) else axes
        if size % prod(mesh.shape[axis] for axis in axes):
            asked = " × ".join(f"parallelism.{axis} {mesh.shape[axis]}" for axis in axes)
            raise RequestError(f"{asked}: does not divide the model's {WORDS[letter]} {size}; take a divisor of it")
    return PartitionSpec(*(over.get(letter) for letter in letters))


# ---- rows -----------------------------------------------------------------------------------------------------


def own_rows(mesh: Mesh, rows: int) -> dict[tuple[int, int], list[jax.Device]]:
    """(first, end) of the rows that this process's devices compute, and which of them do.

    Two processes of two devices each, data 4, 8 rows:    process 0  {(0, 2): [d0], (2, 4): [d1]}
                                                          process 1  {(4, 6): [d2], (6, 8): [d3]}
    """
    parts: dict[tuple[int, int], list[jax.Device]] = {}
    places = NamedSharding(mesh, PartitionSpec(ROWS)).addressable_devices_indices_map((rows,))
    for device, (place,) in places.items():
        parts.setdefault(place.indices(rows)[:2], []).append(device)
    return parts


def assembled(make: Callable[[slice], Any], rows: int, mesh: Mesh) -> Any:
    """A tree of arrays [A, rows, …] on the mesh, of which each process makes its own rows alone by `make`."""
    pieces = []
    for part, devices in own_rows(mesh, rows).items():
        made = make(slice(*part))
        pieces += [jax.device_put(made, device) for device in devices]
    sharding = NamedSharding(mesh, PartitionSpec(None, ROWS))

    def together(*fields: jax.Array) -> jax.Array:
        shape = (fields[0].shape[0], rows, *fields[0].shape[2:])
        return jax.make_array_from_single_device_arrays(shape, sharding, fields)

    return jax.tree.map(together, *pieces)


def spread_rows(field: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array [rows, …] that every process has whole, its rows apart on the mesh."""
    return _put(field, NamedSharding(mesh, PartitionSpec(ROWS)))
