"""The Gemma decoder, whole, in one file: RMSNorm, rotary grouped-query attention, GeGLU, tied embedding.

    tokens [B, T] → embedding × √D → L × (attention, feed-forward, each behind an RMSNorm) → RMSNorm → hidden
    logits [B, T, V] = hidden · embeddingᵀ

Follows "Gemma: Open Models Based on Gemini Research and Technology" (arXiv 2403.08295). Axes: B batch, T query
length, S key length, N heads, K key-value heads, G = N / K, H head dim, D embed, F hidden, V vocabulary.

    >>> config = PRESETS["tiny"]
    >>> model = Gemma(config, nnx.Rngs(0))
    >>> tokens = jnp.ones((2, 8), jnp.int32)
    >>> hidden, _ = model(tokens, positions(tokens > 0), causal_mask(tokens > 0))
    >>> model.logits(hidden).shape
    (2, 8, 768)
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class GemmaConfig:
    """The shape of a Gemma model, in the terms of the paper's table 1."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


PRESETS = {
    # Trained from scratch in about a minute on two CPU cores, with the tokenizer of its own dataset.
    "tiny": GemmaConfig(768, num_layers=2, embed_dim=128, hidden_dim=512, num_heads=4, num_kv_heads=1, head_dim=32),
}

ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-6
MASKED = -2.0e38  # added to a score: exp() of it is exactly 0 in float32


class LayerCache(NamedTuple):
    """Keys and values of the tokens seen so far: two arrays [B, S, K, H]."""

    keys: jax.Array
    values: jax.Array


class Gemma(nnx.Module):
    """Token ids to hidden states; `logits` turns those into scores over the vocabulary."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _weight(rngs, config.vocab_size, config.embed_dim, fan_in=config.embed_dim)  # [V, D]
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim)

    def __call__(
        self,
        tokens: jax.Array,  # [B, T] int32
        positions: jax.Array,  # [B, T] int32: each token's place in its own text
        mask: jax.Array,  # [B, T, S] bool: True where a query may look at a key
        cache: list[LayerCache] | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, list[LayerCache] | None]:
        """Hidden states [B, T, D] and, where a cache came in, the cache with these tokens at `index` …."""
        x = self.embedding[tokens] * jnp.sqrt(jnp.float32(self.config.embed_dim))  # [B, T, D]
        rotation = rotary_angles(positions, self.config.head_dim)
        new_cache = []
        for number, layer in enumerate(self.layers):
            x, layer_cache = layer(x, rotation, mask, cache[number] if cache else None, index)
            new_cache.append(layer_cache)
        return self.final_norm(x), new_cache if cache else None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores over the vocabulary, float32: [..., D] → [..., V]."""
        return jnp.einsum("...D,VD->...V", hidden, self.embedding[...]).astype(jnp.float32)

    def empty_cache(self, batch: int, length: int) -> list[LayerCache]:
        """Room for `length` tokens of `batch` texts."""
        shape = (batch, length, self.config.num_kv_heads, self.config.head_dim)
        dtype = self.embedding[...].dtype
        return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in self.layers]


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = RMSNorm(config.embed_dim)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(
        self, x: jax.Array, rotation: jax.Array, mask: jax.Array, cache: LayerCache | None, index: jax.Array | int
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.attention(self.attention_norm(x), rotation, mask, cache, index)
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x)), cache


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; softmax in float32, as its sums lose bits in bfloat16."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.query = _weight(rngs, D, N, H, fan_in=D)
        self.key = _weight(rngs, D, K, H, fan_in=D)
        self.value = _weight(rngs, D, K, H, fan_in=D)
        self.output = _weight(rngs, N, H, D, fan_in=N * H)

    def __call__(
        self, x: jax.Array, rotation: jax.Array, mask: jax.Array, cache: LayerCache | None, index: jax.Array | int
    ) -> tuple[jax.Array, LayerCache | None]:
        queries = rotate(jnp.einsum("BTD,DNH->BTNH", x, self.query[...]), rotation)
        keys = rotate(jnp.einsum("BSD,DKH->BSKH", x, self.key[...]), rotation)
        values = jnp.einsum("BSD,DKH->BSKH", x, self.value[...])
        if cache is not None:
            keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, keys, index, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(cache.values, values, index, axis=1)
            cache = LayerCache(keys, values)
        B, T, N, H = queries.shape
        K = keys.shape[2]
        queries = queries.reshape(B, T, K, N // K, H) * H**-0.5
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", queries, keys).astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(x.dtype)
        mixed = jnp.einsum("BKGTS,BSKH->BTKGH", weights, values).reshape(B, T, N, H)
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.output[...]), cache


class FeedForward(nnx.Module):
    """GeGLU (arXiv 2002.05202): one projection, through a tanh-approximated GELU, gates the other."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.hidden_dim
        self.gate = _weight(rngs, D, F, fan_in=D)
        self.up = _weight(rngs, D, F, fan_in=D)
        self.down = _weight(rngs, F, D, fan_in=F)

    def __call__(self, x: jax.Array) -> jax.Array:
        gated = jax.nn.gelu(jnp.einsum("BTD,DF->BTF", x, self.gate[...]), approximate=True)
        return jnp.einsum("BTF,FD->BTD", gated * jnp.einsum("BTD,DF->BTF", x, self.up[...]), self.down[...])


class RMSNorm(nnx.Module):
    """x / rms(x) × (1 + scale), in float32 (arXiv 1910.07467; the 1 + is Gemma's)."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.zeros(dim, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + NORM_EPSILON)
        return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


def rotary_angles(positions: jax.Array, head_dim: int) -> jax.Array:
    """Angle of each pair of dimensions at each position: [B, T] → [B, T, H/2] (arXiv 2104.09864)."""
    frequency = ROPE_BASE ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[..., None].astype(jnp.float32) * frequency


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate each pair (dimension i, dimension i + H/2) of x [B, T, N, H] by its angle."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def positions(valid: jax.Array) -> jax.Array:
    """Place of each token in its own text, padding on either side not counted: [B, T] bool → int32.

    valid      F F T T T        positions  0 0 0 1 2
    """
    return jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0).astype(jnp.int32)


def causal_mask(valid: jax.Array) -> jax.Array:
    """Every token sees itself and the valid ones before it: [B, T] bool → [B, T, T] bool."""
    T = valid.shape[-1]
    return jnp.tril(jnp.ones((T, T), bool))[None] & valid[:, None, :]


def parameter_count(config: GemmaConfig) -> int:
    """Number of weights of a model of this shape, without making one."""
    model = nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _weight(rngs: nnx.Rngs, *shape: int, fan_in: int) -> nnx.Param:
    """Normal with standard deviation 1/√fan_in, so that each layer keeps the scale of its input."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5)
