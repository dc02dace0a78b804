"""LoRA (arXiv 2106.09685): two thin matrices are trained beside each frozen projection: W x + B A x × alpha / rank.

    config = LoraConfig(rank=8, alpha=16.0, projections=["query", "value"])
    graph, params = with_adapters(base.graph, base.params, config, seed=42)
    frozen, adapters = split(params)          # what stays, and what is trained and saved
    merged(params, config)                    # weights of the ordinary model that computes the same: W + B A × …

B begins at zero, so that until the first update the adapted model is the base, exactly. A projection is named as in
gemma.py: query, key, value and output of the attention, gate, up and down of the feed-forward.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lib.config import LoraConfig
from lib.model.gemma import Gemma
from lib.model.mesh import LETTERS

BLOCKS = {"query": "attention", "key": "attention", "value": "attention", "output": "attention"}
BLOCKS |= {"gate": "feed_forward", "up": "feed_forward", "down": "feed_forward"}
ADAPTERS = "adapters"

Params = dict


class Adapter(nnx.Module):
    """x [..., in] → B A x × alpha / rank [..., out]: A [R, in], B [out, R], `in` and `out` may be several axes."""

    def __init__(self, outputs: tuple[int, ...], inputs: tuple[int, ...], config: LoraConfig, rngs: nnx.Rngs):
        bound = math.prod(inputs) ** -0.5  # as peft draws it
        self.a = nnx.LoRAParam(jax.random.uniform(rngs.params(), (config.rank, *inputs), jnp.float32, -bound, bound))
        self.b = nnx.LoRAParam(jnp.zeros((*outputs, config.rank), jnp.float32))
        self.inputs, self.scale = tuple(range(-len(inputs), 0)), config.alpha / config.rank

    def __call__(self, x: jax.Array) -> jax.Array:
        narrow = jnp.tensordot(x, self.a[...], axes=(self.inputs, self.inputs))  # [..., R]
        return jnp.tensordot(narrow, self.b[...], axes=((-1,), (-1,))) * self.scale


def add_adapters(model: Gemma, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Put an adapter beside each projection that the configuration names, in every layer."""
    for layer in model.layers:
        for name in config.projections:
            block = getattr(layer, BLOCKS[name])
            shape = getattr(block, name).shape
            outputs = LETTERS[name].index("←")
            block.adapters[name] = Adapter(shape[:outputs], shape[outputs:], config, rngs)


def with_adapters(graph: nnx.GraphDef, params: Params, config: LoraConfig, seed: int) -> tuple[nnx.GraphDef, Params]:
    """Graph and weights of the model with fresh adapters; its own weights are shared, not copied."""
    model = nnx.merge(graph, params)
    add_adapters(model, config, nnx.Rngs(seed))
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


class Parts(NamedTuple):
    """A tree of weights in two."""

    base: Params
    adapters: Params


def split(params: Params) -> Parts:
    """All but the adapters, and the adapters alone; `join` puts them together again."""
    base: Params = {}
    adapters: Params = {}
    for key, value in params.items():
        if key == ADAPTERS:
            adapters[key] = value
        elif isinstance(value, dict):
            rest, own = split(value)
            base |= {key: rest}
            adapters |= {key: own} if own else {}
        else:
            base[key] = value
    return Parts(base, adapters)


def join(base: Params, adapters: Params) -> Params:
    """One tree of both."""
    joined = dict(base)
    for key, value in adapters.items():
        joined[key] = join(joined[key], value) if key in joined else value
    return joined


def merged(params: Params, config: LoraConfig, dtype: str = "") -> Params:
    """The weights of the ordinary model that computes the same: each projection with its adapter added.

    The sums are of `dtype`, or else of the base's, in which an update below its last bit is lost.
    """
    base, adapters = split(params)
    for number, layer in adapters["layers"].items():
        for block, found in layer.items():
            for name, adapter in found[ADAPTERS].items():
                weight = base["layers"][number][block][name]
                base["layers"][number][block][name] = _added(weight, adapter, config, dtype)
    return base


def _added(weight: jax.Array, adapter: Params, config: LoraConfig, dtype: str) -> jax.Array:
    update = jnp.tensordot(adapter["b"], adapter["a"], axes=1) * (config.alpha / config.rank)
    return (weight.astype(jnp.float32) + update.astype(jnp.float32)).astype(dtype or weight.dtype)
