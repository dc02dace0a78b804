"""Where a model comes from: made from scratch, a released Gemma on disk, or a checkpoint of ours.

    base_model("tiny", seed=42, tokenizer_file=dataset.tokenizer_file)   # fresh weights of that seed
    base_model("google/gemma-2b-it", …, dtype=jnp.bfloat16)              # the Hugging Face cache, or its hub
    load_model(run / "checkpoint-final")                                 # what training wrote
    load_model(run / "checkpoint-final", config.parallelism)             # the same, over many devices

A checkpoint of ours stands alone: `weights/`, `tokenizer.json`, and `model.json` with the shape, the name of
the base and the digest of the weights. One of LoRA holds the adapters alone, and is read with the base it names.
Released weights are a Hugging Face folder (config.json, safetensors, tokenizer.json) of a Gemma 1, 2 or 3, named by
its path or its hub name.
"""

import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lib.config import ONE_DEVICE, Config, LoraConfig, ParallelismConfig
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.errors import RequestError
from lib.files import is_sealed, sealed, sha256_file, write_json
from lib.model.gemma import PRESETS, Gemma, GemmaConfig
from lib.model.lora import join, merged, split, with_adapters
from lib.model.mesh import make_mesh, placed, spread
from lib.model.processes import by_first, explained
from lib.model.released import find_released, is_from_scratch
from lib.model.released_config import read_config
from lib.model.released_weights import check_weights, read_weights
from lib.model.storage import DamagedError, restore_tree, save_tree, tree_digest

FORMAT_VERSION = "1.0"
ABOVE_MINUS_ONE = np.nextafter(np.float32(-1), np.float32(0))


class Model(NamedTuple):
    """A model ready to use: its graph and weights (as `nnx.split` gives them, weights as a plain dict).

    `dtype` is what is computed in, whatever the weights are kept in; `lora` describes the adapters among them.
    `tuned_from` is the digest of the base's weights, where it was tuned from one.
    """

    name: str
    config: GemmaConfig
    graph: nnx.GraphDef
    params: dict[str, Any]
    tokenizer: Tokenizer
    dtype: str = "float32"
    lora: LoraConfig | None = None
    tuned_from: str = ""

    @property
    def weights_sha256(self) -> str:
        return tree_digest(self.params)

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.config.num_layers} layers, vocabulary {self.config.vocab_size:,})"


def base_model(name: str, seed: int, tokenizer_file: Path, dtype: str = "float32") -> Model:
    """The model before training, its weights of `dtype`. `seed` and `tokenizer_file` serve those made from scratch.

    Raises RequestError where a released model is not to be had, or is not what gemma.py computes.
    """
    if is_from_scratch(name):
        tokenizer = load_tokenizer(tokenizer_file)
        config = model_config(name, tokenizer)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), _fresh_weights(config, seed))
        return Model(name, config, abstract(config)[0], params, tokenizer)
    return _released_model(name, find_released(name), dtype)


def _fresh_weights(config: GemmaConfig, seed: int) -> dict[str, Any]:
    """Random weights: those of `Gemma(config, nnx.Rngs(seed))`, made by one program, to the bit."""
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract(config)[1]) if leaf.ndim > 1]

    @jax.jit
    def draw(key: jax.Array) -> dict[str, Any]:
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(sizes)))
        even = jax.vmap(lambda own: jax.random.uniform(own, max(sizes), minval=ABOVE_MINUS_ONE, maxval=1))(keys)
        return nnx.to_pure_dict(nnx.state(Gemma(config, _Drawn(jax.lax.erf_inv(even)))))

    return draw(jax.random.key(seed))


class _Drawn:
    """In the place of `nnx.Rngs`: normal numbers over √2 [matrices, N], drawn already, for one matrix after the other.

    Where each matrix draws its own, each is a loop of its own to XLA, and to compile them takes seconds. The √2 is left
    to be multiplied with the scale of the matrix first, as in those loops, or the last bits would be others.
    """

    def __init__(self, numbers: jax.Array):
        self.params = self
        self._numbers = iter(numbers)

    def normal(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        numbers = next(self._numbers)[: math.prod(shape)].reshape(shape)
        return (numbers * np.float32(math.sqrt(2))).astype(dtype)


def configured_base(config: Config, tokenizer_file: Path) -> Model:
    """`base_model` as the configuration trains and evaluates it: weights that will be trained are float32."""
    kept, mesh = config.model.dtype if config.training.lora else "float32", make_mesh(config.parallelism)
    remedy = "take a smaller model, or training.lora={} with model.dtype=bfloat16; --dry-run tells what it would need"
    with explained(f"reading the weights of {config.model.name}", remedy):
        with _read_by(mesh, config.model.name):
            base = base_model(config.model.name, config.training.seed, tokenizer_file, kept)
        return base._replace(dtype=config.model.dtype, params=spread(base.params, mesh))


def _read_by(mesh: Mesh | None, name: str) -> AbstractContextManager:
    """What goes to many devices is read on the host, as one of them may not hold it."""
    alone = mesh is None or is_from_scratch(name)
    if alone:
        return nullcontext()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        raise RequestError(
            f"reading {name} for several devices: JAX_PLATFORMS leaves out the host; add it: JAX_PLATFORMS=cuda,cpu"
        ) from None


def with_lora(base: Model, lora: LoraConfig, seed: int) -> Model:
    """The base with adapters that change nothing yet; its own weights are shared, not copied."""
    graph, params = with_adapters(base.graph, base.params, lora, seed)
    return base._replace(graph=graph, params=params, lora=lora)


def without_lora(model: Model, dtype: str = "") -> Model:
    """The same model with its adapters merged into its weights, in `dtype` as `merged` has it; one without any is
    itself."""
    if model.lora is None:
        return model
    params = merged(model.params, model.lora, dtype)
    return model._replace(graph=abstract(model.config)[0], params=params, lora=None)


def model_config(name: str, tokenizer: Tokenizer) -> GemmaConfig:
    """The shape of a model, without its weights; made from scratch, its vocabulary is the tokenizer's."""
    if is_from_scratch(name):
        return replace(PRESETS[name], vocab_size=tokenizer.vocab_size)
    return read_config(find_released(name))


def save_model(folder: Path, model: Model, **facts: Any) -> str:
    """Write a checkpoint that stands alone, `model.json` last; `facts` are kept in it. Returns the weights' digest.

    Of a model with adapters only these are written, and `facts` must hold `adapts`: seed, dtype and digest of its base.
    """
    saved = save_tree(folder / "weights", split(model.params).adapters if model.lora else model.params)
    digest = model.weights_sha256 if model.lora else saved
    about = {
        "format_version": FORMAT_VERSION,
        "base": model.name,
        "config": asdict(model.config),
        "dtype": model.dtype,
        "kept_in": str(model.params["embedding"].dtype),
        "weights_sha256": digest,
    }
    if model.lora:
        about |= {"lora": asdict(model.lora), "adapters_sha256": saved}

    def write() -> None:
        model.tokenizer.save(folder / "tokenizer.json")
        tokenizer = {"tokenizer_file_sha256": sha256_file(folder / "tokenizer.json")}
        write_json(folder / "model.json", sealed(about | tokenizer | facts))

    by_first(write)
    return digest


def load_model(folder: Path, parallelism: ParallelismConfig = ONE_DEVICE, base: Model | None = None) -> Model:
    """The model of a checkpoint that `save_model` wrote, over so many devices, on however many it was trained.

    Adapters are put beside `base` where it is given, which must be theirs; else it is read.
    Raises RequestError, or DamagedError.
    """
    mesh = make_mesh(parallelism)
    about = read_about(folder)
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file() or sha256_file(tokenizer_file) != about["tokenizer_file_sha256"]:
        raise DamagedError(f"{tokenizer_file}: not what was saved with the weights")
    tuned_from = about.get("inputs", {}).get("base_weights_sha256", "")
    if "lora" in about:
        return _load_adapted(folder, about, mesh, base)._replace(tuned_from=tuned_from)
    config = GemmaConfig(**about["config"])
    graph, shapes = abstract(config, about.get("kept_in", "float32"))
    params = restore_tree(folder / "weights", placed(shapes, mesh), about["weights_sha256"])
    tokenizer, dtype = load_tokenizer(tokenizer_file), about.get("dtype", "float32")
    return Model(about["base"], config, graph, params, tokenizer, dtype, tuned_from=tuned_from)


def _load_adapted(folder: Path, about: dict[str, Any], mesh: Mesh | None, base: Model | None) -> Model:
    """The base that the checkpoint names, with the adapters of the checkpoint."""
    adapts = about["adapts"]
    with _read_by(mesh, about["base"]):
        base = base or base_model(about["base"], adapts["seed"], folder / "tokenizer.json", adapts["dtype"])
    if base.weights_sha256 != adapts["weights_sha256"]:
        scratch = is_from_scratch(about["base"])
        remedy = "read it on the kind of device" if scratch else "fetch the release"
        raise RequestError(
            f"{folder}: its adapters were trained beside weights {adapts['weights_sha256'][:16]} of {about['base']}, "
            f"and here that is {base.weights_sha256[:16]}; {remedy} that they were trained on"
        )
    adapted = with_lora(base._replace(dtype=about["dtype"]), LoraConfig(**about["lora"]), seed=0)
    parts = split(spread(adapted.params, mesh))
    adapters = restore_tree(folder / "weights", parts.adapters, about["adapters_sha256"])
    return adapted._replace(params=join(parts.base, adapters))


def read_about(folder: Path) -> dict[str, Any]:
    """What `model.json` of a checkpoint says. Raises RequestError, or DamagedError."""
    file = folder / "model.json"
    if not file.is_file():
        raise RequestError(f"{folder}: not a checkpoint (no model.json); expected `base` or a RUN/checkpoint-final")
    try:
        content = file.read_bytes()
        about = json.loads(content)
        version = about["format_version"]
        if version == FORMAT_VERSION and not is_sealed(content):
            raise ValueError("edited after it was written")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{file}: damaged ({error})") from None
    if version != FORMAT_VERSION:
        raise RequestError(f"{file}: format_version {version!r} is not known, only {FORMAT_VERSION!r}")
    return about


def check_released(name: str) -> None:
    """Refuse what `base_model` would, before any weight is read: config.json, tokenizer, the header of every shard.

    Raises RequestError.
    """
    folder = find_released(name)
    config, _ = _read_beside(name, folder)
    check_weights(folder, config, abstract(config)[1])


def _released_model(name: str, folder: Path, dtype: jax.typing.DTypeLike) -> Model:
    config, tokenizer = _read_beside(name, folder)
    graph, shapes = abstract(config)
    return Model(name, config, graph, read_weights(folder, config, shapes, dtype), tokenizer)


def _read_beside(name: str, folder: Path) -> tuple[GemmaConfig, Tokenizer]:
    """What lies beside the weights, and belongs to them."""
    config, tokenizer = read_config(folder), load_tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(
            f"model {name}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding {config.vocab_size}; "
            f"{folder} does not belong together"
        )
    return config, tokenizer


def abstract(config: GemmaConfig, dtype: str = "float32") -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Graph and shapes of a model, without making its weights."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0))))
    return graph, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), nnx.to_pure_dict(state))
