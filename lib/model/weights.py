"""Where a model comes from: made from scratch, a released Gemma on disk, or a checkpoint of ours.

    base_model("tiny", seed=42, tokenizer_file=dataset.tokenizer_file)   # fresh weights of that seed
    base_model("google/gemma-2b-it", …)                                  # the local Hugging Face cache
    load_model(run / "checkpoint-final")                                 # what training wrote

A checkpoint of ours stands alone: `weights/`, `tokenizer.json`, and `model.json` with the shape, the name of
the base and the digest of the weights. Released weights are a Hugging Face folder (config.json, safetensors,
tokenizer.json) of the first Gemma generation, named by its path or its hub name.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.errors import RequestError, RetraceError
from lib.files import is_sealed, sealed, sha256_file, write_json
from lib.model.gemma import PRESETS, Gemma, GemmaConfig
from lib.model.released import find_released, is_from_scratch
from lib.model.storage import DamagedError, restore_tree, save_tree, tree_digest

FORMAT_VERSION = "1.0"


class Model(NamedTuple):
    """A model ready to use: its graph and weights (as `nnx.split` gives them, weights as a plain dict)."""

    name: str
    config: GemmaConfig
    graph: nnx.GraphDef
    params: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def weights_sha256(self) -> str:
        return tree_digest(self.params)


def base_model(name: str, seed: int, tokenizer_file: Path) -> Model:
    """The model before training. `seed` and `tokenizer_file` serve the ones made from scratch.

    Raises RequestError where a released model is not on this machine.
    """
    if is_from_scratch(name):
        tokenizer = load_tokenizer(tokenizer_file)
        config = model_config(name, tokenizer)
        graph, state = nnx.split(Gemma(config, nnx.Rngs(seed)))
        return Model(name, config, graph, nnx.to_pure_dict(state), tokenizer)
    return _released_model(name, find_released(name))


def model_config(name: str, tokenizer: Tokenizer) -> GemmaConfig:
    """The shape of a model, without its weights; made from scratch, its vocabulary is the tokenizer's."""
    if is_from_scratch(name):
        return replace(PRESETS[name], vocab_size=tokenizer.vocab_size)
    return _released_config(name, find_released(name))


def save_model(folder: Path, model: Model, **facts: Any) -> str:
    """Write a checkpoint that stands alone, `model.json` last; `facts` are kept in it. Returns the weights' digest."""
    digest = save_tree(folder / "weights", model.params)
    model.tokenizer.save(folder / "tokenizer.json")
    about = {
        "format_version": FORMAT_VERSION,
        "base": model.name,
        "config": asdict(model.config),
        "weights_sha256": digest,
        "tokenizer_file_sha256": sha256_file(folder / "tokenizer.json"),
    }
    write_json(folder / "model.json", sealed(about | facts))
    return digest


def load_model(folder: Path) -> Model:
    """The model of a checkpoint that `save_model` wrote. Raises RequestError, or DamagedError."""
    about = read_about(folder)
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file() or sha256_file(tokenizer_file) != about["tokenizer_file_sha256"]:
        raise DamagedError(f"{tokenizer_file}: not what was saved with the weights")
    config = GemmaConfig(**about["config"])
    graph, shapes = _abstract(config)
    params = restore_tree(folder / "weights", shapes, about["weights_sha256"])
    return Model(about["base"], config, graph, params, load_tokenizer(tokenizer_file))


def read_about(folder: Path) -> dict[str, Any]:
    """What `model.json` of a checkpoint says. Raises RequestError, or DamagedError."""
    file = folder / "model.json"
    if not file.is_file():
        raise RequestError(f"{folder}: not a checkpoint (no model.json); expected `base` or a RUN/checkpoint-final")
    try:
        about = json.loads(file.read_bytes())
        version = about["format_version"]
        if version == FORMAT_VERSION and not is_sealed(about):
            raise ValueError("edited after it was written")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{file}: damaged ({error})") from None
    if version != FORMAT_VERSION:
        raise RequestError(f"{file}: format_version {version!r} is not known, only {FORMAT_VERSION!r}")
    return about


def _released_model(name: str, folder: Path) -> Model:
    config = _released_config(name, folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(
            f"model {name}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding {config.vocab_size}; "
            f"{folder} does not belong together"
        )
    graph, shapes = _abstract(config)
    return Model(name, config, graph, _released_params(folder, config, shapes), tokenizer)


def _released_config(name: str, folder: Path) -> GemmaConfig:
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise RequestError(f"model {name}: {folder}/config.json is not readable ({error})") from None
    if not isinstance(found, dict):
        raise RequestError(f"model {name}: {folder}/config.json is not readable (expected an object)")
    if found.get("model_type") != "gemma":
        raise RequestError(
            f"model {name}: model_type {found.get('model_type')!r} is not read yet, only 'gemma' (the first generation)"
        )
    fields = {
        "vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "embed_dim": "hidden_size",
        "hidden_dim": "intermediate_size", "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    }  # fmt: skip
    if missing := [theirs for theirs in fields.values() if not isinstance(found.get(theirs), int)]:
        raise RequestError(f"model {name}: {folder}/config.json: expected a whole number as {missing[0]}")
    return GemmaConfig(**{ours: found[theirs] for ours, theirs in fields.items()})


def _released_params(folder: Path, config: GemmaConfig, shapes: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of the safetensors files in its place, as float32; none missing, none left over."""
    tensors = _tensor_files(folder)
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    used: set[str] = set()

    def take(name: str, shape: tuple[int, ...], transpose: bool = False) -> jax.Array:
        """A linear layer is stored [out, in] there and [in, out…] here."""
        if name not in tensors:
            raise RequestError(f"{folder}: no tensor {name} in its safetensors files")
        used.add(name)
        with safe_open(tensors[name], framework="flax") as file:
            array = np.asarray(file.get_tensor(name).astype(jnp.float32))
        array = array.T if transpose else array
        one_side_fits = array.shape[:1] == shape[:1] or array.shape[-1:] == shape[-1:]
        if array.size != np.prod(shape) or not one_side_fits:
            raise RequestError(f"{folder}: tensor {name} has shape {array.shape}, expected to fill {shape}")
        return jnp.asarray(array.reshape(shape))

    def layer(index: int) -> dict[str, Any]:
        own = f"model.layers.{index}."
        attention, mlp = f"{own}self_attn.", f"{own}mlp."
        return {
            "attention_norm": {"scale": take(f"{own}input_layernorm.weight", (D,))},
            "attention": {
                "query": take(f"{attention}q_proj.weight", (D, N, H), transpose=True),
                "key": take(f"{attention}k_proj.weight", (D, K, H), transpose=True),
                "value": take(f"{attention}v_proj.weight", (D, K, H), transpose=True),
                "output": take(f"{attention}o_proj.weight", (N, H, D), transpose=True),
            },
            "feed_forward_norm": {"scale": take(f"{own}post_attention_layernorm.weight", (D,))},
            "feed_forward": {
                "gate": take(f"{mlp}gate_proj.weight", (D, config.hidden_dim), transpose=True),
                "up": take(f"{mlp}up_proj.weight", (D, config.hidden_dim), transpose=True),
                "down": take(f"{mlp}down_proj.weight", (config.hidden_dim, D), transpose=True),
            },
        }

    params = {
        "embedding": take("model.embed_tokens.weight", (config.vocab_size, D)),
        "final_norm": {"scale": take("model.norm.weight", (D,))},
        "layers": {index: layer(index) for index in range(config.num_layers)},
    }
    if left := sorted(tensors.keys() - used - {"lm_head.weight"}):  # the head is the embedding, stored twice by some
        raise RequestError(f"{folder}: {len(left)} tensors have no place in the model, the first {left[0]}")
    if jax.tree.structure(params) != jax.tree.structure(shapes):
        raise RetraceError(f"{folder}: the loaded weights do not have the structure of the model")
    return params


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name → the safetensors file that holds it."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RequestError(f"{folder}: no .safetensors file; other formats are not read")
    found: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="flax") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise RequestError(f"{path}: not readable as safetensors ({error})") from None
    return found


def _abstract(config: GemmaConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Graph and shapes of a model, without making its weights."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)
