"""Released Gemma weights as Hugging Face keeps them: every tensor has its place in the model, or is refused by name.

    params = read_weights(folder, config, shapes)       # safetensors, in one file or in shards with an index
    write_weights(folder, config, params)               # the same the other way: no number changes

    model.layers.3.mlp.up_proj.weight [F, D]            ↔    params["layers"][3]["feed_forward"]["up"] [F, D]
    model.layers.3.self_attn.q_proj.weight [N × H, D]   ↔    params["layers"][3]["attention"]["query"] [N, H, D]

Of a gemma3 folder the parts for pictures are left aside: `vision_tower` and `multi_modal_projector`. All headers are
checked before the first number is read, and pickles are never opened. Written is the text model alone, block by block.
Format: https://huggingface.co/docs/safetensors.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lib.errors import RequestError
from lib.files import atomic_open, write_json
from lib.model.gemma import GemmaConfig
from lib.model.mesh import LETTERS
from lib.model.released import INDEX
from lib.model.released_config import generation_of, json_object

# ---- names ----------------------------------------------------------------------------------------------------

# Where the decoder's names begin, where a head may lie (the embedding, stored twice), and what is not for text.
LAYOUTS = {
    "model.": ("lm_head.weight", ()),
    "language_model.model.": ("language_model.lm_head.weight", ("vision_tower.", "multi_modal_projector.")),
    "model.language_model.": ("lm_head.weight", ("model.vision_tower.", "model.multi_modal_projector.")),
}
OUTSIDE = {"embedding": "embed_tokens", "final_norm": "norm"}
# Of layer N, between `layers.N.` and `.weight`. A linear layer is stored [out, in] there and [out…, in…] here.
LINEAR = {
    "attention.query":   "self_attn.q_proj",
    "attention.key":     "self_attn.k_proj",
    "attention.value":   "self_attn.v_proj",
    "attention.output":  "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up":   "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}  # fmt: skip
NORMS = {
    #                          Gemma 1                     Gemma 2                       Gemma 3
    "attention_norm":         ("input_layernorm",          "input_layernorm",            "input_layernorm"),
    "attention_post_norm":    (None,                       "post_attention_layernorm",   "post_attention_layernorm"),
    "feed_forward_norm":      ("post_attention_layernorm", "pre_feedforward_layernorm",  "pre_feedforward_layernorm"),
    "feed_forward_post_norm": (None,                       "post_feedforward_layernorm", "post_feedforward_layernorm"),
    "attention.query_norm":   (None,                       None,                         "self_attn.q_norm"),
    "attention.key_norm":     (None,                       None,                         "self_attn.k_norm"),
}  # fmt: skip


class Place(NamedTuple):
    """Where a leaf lies: the tensor, and its shape there; the numbers are in the same order."""

    name: str
    shape: tuple[int, ...]


def place(path: tuple[str | int, ...], shape: tuple[int, ...], config: GemmaConfig, prefix: str = "model.") -> Place:
    """The place of a leaf by its path in the tree of weights.

    ("layers", 3, "attention", "query"), [N, H, D]  →  model.layers.3.self_attn.q_proj.weight, [N × H, D]
    """
    if path[0] in OUTSIDE:
        return Place(f"{prefix}{OUTSIDE[path[0]]}.weight", shape)
    generation = generation_of(config)
    _, number, *rest = path
    own = ".".join(rest)
    if own in LINEAR:
        outputs = LETTERS[rest[-1]].index("←")
        stored = math.prod(shape[:outputs]), math.prod(shape[outputs:])
        return Place(f"{prefix}layers.{number}.{LINEAR[own]}.weight", stored)
    theirs = NORMS[own.removesuffix(".scale")][generation - 1]
    return Place(f"{prefix}layers.{number}.{theirs}.weight", shape)


# ---- files ----------------------------------------------------------------------------------------------------

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
BLOCK_BYTES = 1 << 23
SHARD_BYTES = 5_000_000_000
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Tensor(NamedTuple):
    """What the header of a safetensors file says about one tensor."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_weights(
    folder: Path, config: GemmaConfig, shapes: dict[str, Any], dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, Any]:
    """The weights in the structure of `shapes`, every leaf of `dtype`; the host holds hardly more than they weigh.

    Raises RequestError where a tensor is missing, left over, or of another shape or kind, and where a file is
    damaged or absent, before any weight is read.
    """
    tensors, places = check_weights(folder, config, shapes)
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    # The largest first: while it is converted there is not yet anything beside it.
    order = sorted(range(len(places)), key=lambda number: -paths[number][1].size)
    leaves = {number: _read(tensors, places[number], paths[number][1].shape, np.dtype(dtype)) for number in order}
    return jax.tree.unflatten(structure, [leaves[number] for number in range(len(places))])


def check_weights(folder: Path, config: GemmaConfig, shapes: dict[str, Any]) -> tuple[dict[str, Tensor], list[Place]]:
    """Every tensor of the folder by its name, and the place of each leaf of `shapes`, in their order.

    Raises RequestError as `read_weights` does; the headers are read, and of the weights only a stored head.
    """
    tensors = _tensors(folder)
    prefix = next((prefix for prefix in LAYOUTS if f"{prefix}embed_tokens.weight" in tensors), "model.")
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    places = [place(tuple(entry.key for entry in path), leaf.shape, config, prefix) for path, leaf in paths]
    _check_tensors(folder, tensors, {found.name: found.shape for found in places}, prefix)
    return tensors, places


def write_weights(folder: Path, config: GemmaConfig, params: dict[str, Any], dtype: str = "") -> None:
    """The weights as safetensors, all of `dtype` where it is given, else as they are; in shards where they are large.

    Beside the weights themselves the host holds some megabytes.
    """
    placed = [_placed(path, leaf, config, dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    shards = _shards(placed)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard)
    if len(shards) > 1:
        where = {own.place.name: name for name, shard in zip(names, shards, strict=True) for own in shard}
        total = sum(own.bytes for own in placed)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _check_tensors(folder: Path, tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], prefix: str) -> None:
    """Every tensor that is wanted is there, in its shape; every other one is known to be beside."""
    if missing := [name for name in wanted if name not in tensors]:
        raise RequestError(f"{folder}: no tensor {_named(missing)} in its safetensors files")
    for name, shape in wanted.items():
        found = tensors[name]
        if found.shape != shape:
            raise RequestError(f"{found.file}: tensor {name} has shape {found.shape}, expected {shape}")
        if found.dtype not in ("F32", "BF16", "F16"):
            raise RequestError(f"{found.file}: tensor {name} holds {found.dtype}; read are F32, BF16 and F16")
    head, vision = LAYOUTS[prefix]
    beside = {name for name in tensors if name == head or name.startswith(vision)}
    if left := sorted(tensors.keys() - wanted.keys() - beside):
        raise RequestError(f"{folder}: {len(left)} tensors have no place in the model: {_named(left)}")
    if head in tensors:
        _check_head(tensors[head], tensors[f"{prefix}embed_tokens.weight"])


def _check_head(head: Tensor, embedding: Tensor) -> None:
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if not same or not all(np.array_equal(*pair) for pair in zip(_blocks(head), _blocks(embedding), strict=True)):
        raise RequestError(
            f"{head.file}: tensor {head.name} is not the embedding; Gemma's head is, and no other is read"
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by its name."""
    index = _index(folder)
    found: dict[str, Tensor] = {}
    for path in sorted({folder / name for name in index.values()}) or _without_index(folder):
        for tensor in _header(path):
            if tensor.name in found:
                raise RequestError(f"{path}: tensor {tensor.name} stands in {found[tensor.name].file.name} too")
            found[tensor.name] = tensor
    for name, shard in index.items():
        if name not in found or found[name].file.name != shard:
            raise RequestError(f"{folder / INDEX}: puts tensor {name} into {shard}, which does not hold it")
    return found


def _index(folder: Path) -> dict[str, str]:
    """Tensor name → the name of its shard; empty where there is no index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    index = json_object(path).get("weight_map")
    names = list(index.values()) if isinstance(index, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise RequestError(f"{path}: expected a weight_map from tensors to file names")
    if absent := sorted({name for name in names if not (folder / name).is_file()}):
        raise RequestError(f"{path}: names {_named(absent)}, which is not there; fetch the model again")
    return index


def _without_index(folder: Path) -> list[Path]:
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise RequestError(
            f"{folder}: {pickles[0]} may be a pickle, which runs code when it is read, so it is not; "
            "give a folder with .safetensors files"
        )
    raise RequestError(f"{folder}: no .safetensors file; other formats are not read")


def _header(path: Path) -> list[Tensor]:
    """The tensors of one file, which is as long as they need."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return [Tensor(name, path, tuple(own.get_shape()), own.get_dtype()) for name, own in slices.items()]
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path}: not readable as safetensors ({error}); fetch the model again") from None


def _read(tensors: dict[str, Tensor], found: Place, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """One leaf, filled block by block."""
    ours = _aligned(shape, dtype)
    theirs = ours.reshape(found.shape)
    row = 0
    for block in _blocks(tensors[found.name]):
        theirs[row : row + len(block)] = block
        row += len(block)
    return jax.device_put(ours, may_alias=True)


def _blocks(tensor: Tensor) -> Iterator[np.ndarray]:
    """The tensor's rows, some megabytes at a time."""
    total, rows = tensor.shape[0], max(1, BLOCK_BYTES // (4 * math.prod(tensor.shape[1:])))
    for start in range(0, total, rows):
        # Opened for each block: what has been read of a file stays in memory for as long as it is open.
        with safe_open(tensor.file, framework="numpy") as file:
            yield file.get_slice(tensor.name)[start : min(start + rows, total)]


class _Placed(NamedTuple):
    """A leaf that is to be written: where it lies there, and of which type."""

    place: Place
    leaf: jax.Array
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return self.leaf.size * self.dtype.itemsize


def _placed(path: tuple, leaf: jax.Array, config: GemmaConfig, dtype: str) -> _Placed:
    own = place(tuple(entry.key for entry in path), leaf.shape, config)
    return _Placed(own, leaf, np.dtype(jnp.dtype(dtype or leaf.dtype)))


def _shards(placed: list[_Placed]) -> list[list[_Placed]]:
    """In order, each shard as full as it gets; one that holds a single leaf may be larger."""
    shards: list[list[_Placed]] = [[]]
    for own in placed:
        if shards[-1] and sum(other.bytes for other in [*shards[-1], own]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(own)
    return shards


def _write_shard(path: Path, shard: list[_Placed]) -> None:
    """By hand, as the library's writer wants the whole file in memory: length of the header, header, numbers."""
    header, end = {"__metadata__": {"format": "pt"}}, 0  # without the format transformers 4 refuses it
    for own in shard:
        offsets = [end, end := end + own.bytes]
        header[own.place.name] = {"dtype": CODES[own.dtype.name], "shape": own.place.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_open(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for own in shard:
            file.writelines(_bytes(own))


def _bytes(own: _Placed) -> Iterator[bytes]:
    """The numbers of one leaf, some megabytes at a time."""
    theirs = np.asarray(own.leaf).reshape(own.place.shape)
    rows = max(1, BLOCK_BYTES // (4 * math.prod(theirs.shape[1:])))
    for start in range(0, len(theirs), rows):
        yield theirs[start : start + rows].astype(own.dtype).tobytes()


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that begins at a multiple of 64 bytes: what jax takes over on a CPU, where it would copy another."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
