"""The Gemma decoder, three generations in one file: RMSNorm, rotary grouped-query attention, GeGLU, tied embedding.

    tokens [B, T] → embedding × √D → L × (attention, feed-forward, each behind an RMSNorm) → RMSNorm → hidden
    logits [B, T, V] = hidden · embeddingᵀ

                   Gemma 1              Gemma 2                        Gemma 3 (text)
    RMSNorm        before               before and after               before and after, and on queries and keys
    layers         all global           local, global, local …          five local, one global, five local …
    rotary base    10,000               10,000                         10,000 local, 1,000,000 global
    soft caps      none                 50 on scores, 30 on logits     none

Follows "Gemma: Open Models Based on Gemini Research and Technology" (arXiv 2403.08295), "Gemma 2: Improving Open
Language Models at a Practical Size" (arXiv 2408.00118) and "Gemma 3 Technical Report" (arXiv 2503.19786). Axes:
B batch, T query length, S key length, N heads, K key-value heads, G = N / K, H head dim, D embed, F hidden,
V vocabulary.

    >>> config = PRESETS["tiny"]
    >>> model = Gemma(config, nnx.Rngs(0))
    >>> tokens = jnp.ones((2, 8), jnp.int32)
    >>> hidden, _ = model(tokens, positions(tokens > 0), causal_mask(tokens > 0))
    >>> model.logits(hidden).shape
    (2, 8, 768)
"""

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lib.files import home
from lib.model.mesh import by_rows

# What took more than a tenth of a second to compile is kept, and the next process that needs the same has it at once.
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(home() / ".compiled"))
if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@dataclass(frozen=True)
class GemmaConfig:
    """The shape of a Gemma model, in the terms of table 1 of each paper; the defaults are those of Gemma 1."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    # Attention scores are divided by the root of this; None: of head_dim. The 27B models have 144 and 168.
    query_pre_attn_scalar: float | None = None
    # An RMSNorm on what attention and feed-forward give, too, before it is added to the stream.
    post_norms: bool = False
    # An RMSNorm over the H numbers of each query and key, before they are rotated.
    qk_norm: bool = False
    # Attention scores, and logits, stay within ± these: cap × tanh(score / cap).
    attention_cap: float | None = None
    logit_cap: float | None = None
    # Every so many layers is a global one; a local one sees so many tokens, its own the last of them.
    global_every: int = 1
    sliding_window: int | None = None
    # Rotary base of the global layers, and what the places are divided by in them.
    rope_base: float = 10_000.0
    rope_scale: float = 1.0

    def is_local(self, layer: int) -> bool:
        return (layer + 1) % self.global_every != 0


# What is the same in all sizes of a generation.
GENERATIONS = {
    1: {},
    2: {"post_norms": True, "global_every": 2, "attention_cap": 50.0, "logit_cap": 30.0},
    3: {"post_norms": True, "global_every": 6, "qk_norm": True, "rope_base": 1_000_000.0},
}

PRESETS = {
    # Trained from scratch in about a minute on two CPU cores, with the tokenizer of its own dataset.
    "tiny": GemmaConfig(768, num_layers=2, embed_dim=128, hidden_dim=512, num_heads=4, num_kv_heads=1, head_dim=32),
    #                        V        L   D     F       N   K   H
    "gemma-2b": GemmaConfig(256_000, 18, 2048, 16_384, 8, 1, 256),
    "gemma-7b": GemmaConfig(256_000, 28, 3072, 24_576, 16, 16, 256),
    "gemma2-2b": GemmaConfig(256_000, 26, 2304, 9_216, 8, 4, 256, sliding_window=4096, **GENERATIONS[2]),
    "gemma2-9b": GemmaConfig(256_000, 42, 3584, 14_336, 16, 8, 256, sliding_window=4096, **GENERATIONS[2]),
    "gemma3-270m": GemmaConfig(262_144, 18, 640, 2_048, 4, 1, 256, sliding_window=512, **GENERATIONS[3]),
    "gemma3-1b": GemmaConfig(262_144, 26, 1152, 6_912, 4, 1, 256, sliding_window=512, **GENERATIONS[3]),
    "gemma3-4b": GemmaConfig(
        262_208, 34, 2560, 10_240, 8, 4, 256, sliding_window=1024, rope_scale=8.0, **GENERATIONS[3]
    ),
}

NORM_EPSILON = 1e-6
LOCAL_ROPE_BASE = 10_000.0
MASKED = -2.0e38  # added to a score: exp() of it is exactly 0 in float32
FUSED = "cudnn"


class LayerCache(NamedTuple):
    """Keys and values of the tokens seen so far: two arrays [B, K, S, H], as the products of attention take them."""

    keys: jax.Array
    values: jax.Array


class View(NamedTuple):
    """Where a layer looks, the same for all local layers and for all global ones."""

    rotation: jax.Array  # [2, B, T, H/2]: cosine and sine of each pair's angle
    mask: jax.Array  # [B, T, S] bool


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
        remat: bool = False,
        asked: int | None = None,
    ) -> tuple[jax.Array, list[LayerCache] | None]:
        """Hidden states [B, T, D] and, where a cache came in, the cache with these tokens at `index` ….

        Query t stands at place index + t of the keys; without a cache the index is 0. One token of each row may stand
        at a place of its own: the index is then [B]. With `remat`, all that a gradient keeps of a layer is what went
        in (arXiv 1604.06174); the rest is computed again. Where the last `asked` places are all that is asked for, the
        hidden states are [B, asked, D], and of the others the last layer computes keys and values alone.
        """
        # The root is rounded to the weights' dtype first: so it was in the training of the released weights.
        x = self.embedding[tokens] * jnp.sqrt(jnp.float32(self.config.embed_dim)).astype(self.embedding.dtype)
        x = by_rows(x)
        views, new_cache = self._views(positions, mask, index), []
        T, last = tokens.shape[1], len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            view = views[self.config.is_local(number)]
            kept = asked if asked and number == last else T
            run = jax.checkpoint(layer, static_argnums=4) if remat else layer
            x, layer_cache = run(x, view, cache[number] if cache else None, index, kept)  # [B, kept, D]
            x = by_rows(x)
            new_cache.append(layer_cache)
        return self.final_norm(x), new_cache if cache else None

    def _views(self, positions: jax.Array, mask: jax.Array, index: jax.Array | int) -> dict[bool, View]:
        """By `is_local`: the view of the global layers, and of the local ones where there are any."""
        config = self.config
        views = {False: View(rotations(positions, config.head_dim, config.rope_base, config.rope_scale), mask)}
        if config.global_every > 1:
            near = mask & window_mask(*mask.shape[1:], index, config.sliding_window)
            views[True] = View(rotations(positions, config.head_dim, LOCAL_ROPE_BASE), near)
        return views

    def logits(self, hidden: jax.Array, rows: jax.Array | None = None) -> jax.Array:
        """Scores over the vocabulary, or over some `rows` [V, D] of the embedding, float32: [..., D] → [..., V]."""
        rows = self.embedding[...] if rows is None else rows
        if hidden.ndim == 2:
            scores = _one_place(hidden, rows)
        else:
            scores = jnp.einsum("...D,VD->...V", hidden, rows, preferred_element_type=jnp.float32)
        return soft_cap(scores, self.config.logit_cap)

    def empty_cache(self, batch: int, length: int) -> list[LayerCache]:
        """Room for `length` tokens of `batch` texts."""
        shape = (batch, self.config.num_kv_heads, length, self.config.head_dim)
        dtype = self.embedding[...].dtype
        return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in self.layers]


class Layer(nnx.Module):
    """Attention and feed-forward, each behind a norm, and from Gemma 2 on before another, added to the stream."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim)
        self.attention = Attention(config, rngs)
        self.attention_post_norm = RMSNorm(config.embed_dim) if config.post_norms else None
        self.feed_forward_norm = RMSNorm(config.embed_dim)
        self.feed_forward = FeedForward(config, rngs)
        self.feed_forward_post_norm = RMSNorm(config.embed_dim) if config.post_norms else None

    def __call__(
        self, x: jax.Array, view: View, cache: LayerCache | None, index: jax.Array | int, asked: int
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.attention(self.attention_norm(x), view, cache, index, asked)
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        x = x[:, -asked:] + attended
        fed = self.feed_forward(self.feed_forward_norm(x))
        if self.feed_forward_post_norm is not None:
            fed = self.feed_forward_post_norm(fed)
        return x + fed, cache


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; softmax in float32, as its sums lose bits in bfloat16.

    `adapters`, here and below, are what LoRA puts beside the projections, by their names (lora.py); usually none.
    """

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = (config.query_pre_attn_scalar or H) ** -0.5
        self.cap = config.attention_cap
        self.query = _weight(rngs, N, H, D, fan_in=D)
        self.key = _weight(rngs, K, H, D, fan_in=D)
        self.value = _weight(rngs, K, H, D, fan_in=D)
        self.output = _weight(rngs, D, N, H, fan_in=N * H)
        self.query_norm = RMSNorm(H) if config.qk_norm else None
        self.key_norm = RMSNorm(H) if config.qk_norm else None
        self.adapters = nnx.Dict()

    def __call__(
        self, x: jax.Array, view: View, cache: LayerCache | None, index: jax.Array | int, asked: int
    ) -> tuple[jax.Array, LayerCache | None]:
        """What the last `asked` places of x [B, …, D] draw from all that they see: [B, asked, D]."""
        rotation, mask = view.rotation[:, :, -asked:], view.mask[:, -asked:]
        queries = _project(self, "query", x[:, -asked:])  # [B, T, N, H]: T is `asked` from here on
        keys, values = _project(self, "key", x), _project(self, "value", x)  # [B, …, K, H]
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys = rotate(queries, rotation), rotate(keys, view.rotation)
        if cache is None and is_fused(queries, keys, self.cap):
            mixed = jax.nn.dot_product_attention(
                queries, keys, values, mask=mask[:, None], scale=self.scale, implementation=FUSED
            )
            return _project(self, "output", mixed), None
        B, T, N, H = queries.shape
        K = keys.shape[2]
        G = N // K
        queries = (queries * self.scale).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        if cache is not None:
            cache = LayerCache(_written(cache.keys, keys, index), _written(cache.values, values, index))
            keys, values = cache
        scores = jnp.einsum("BKqH,BKSH->BKqS", queries, keys, preferred_element_type=jnp.float32)
        scores = soft_cap(scores, self.cap).reshape(B, K, G, T, -1)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(x.dtype)
        mixed = jnp.einsum("BKqS,BKSH->BKqH", weights.reshape(B, K, G * T, -1), values)
        mixed = mixed.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
        return _project(self, "output", mixed), cache


class FeedForward(nnx.Module):
    """GeGLU (arXiv 2002.05202): one projection, through a tanh-approximated GELU, gates the other."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.hidden_dim
        self.gate = _weight(rngs, F, D, fan_in=D)
        self.up = _weight(rngs, F, D, fan_in=D)
        self.down = _weight(rngs, D, F, fan_in=F)
        self.adapters = nnx.Dict()

    def __call__(self, x: jax.Array) -> jax.Array:
        gated = jax.nn.gelu(_project(self, "gate", x), approximate=True)
        return _project(self, "down", gated * _project(self, "up", x))


class RMSNorm(nnx.Module):
    """x / rms(x) × (1 + scale), in float32 (arXiv 1910.07467; the 1 + is Gemma's)."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.zeros(dim, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + NORM_EPSILON)
        return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


def is_fused(queries: jax.Array, keys: jax.Array, cap: float | None) -> bool:
    """Whether attention of queries [B, T, N, H] to keys [B, S, K, H] is left to cuDNN, which keeps no scores
    (arXiv 2205.14135).

    What it takes, backwards too: one NVIDIA GPU, half precision, no cap on scores; heads above 128 on 9.x alone.
    """
    capability = getattr(jax.local_devices()[0], "compute_capability", "")  # "9.0"; of other makers a name, or none
    if not capability[:1].isdigit() or not jax.sharding.get_abstract_mesh().empty:
        return False
    T, S, H = queries.shape[1], keys.shape[1], queries.shape[3]
    fits = T % 2 == S % 2 == 0 and H % 8 == 0 and H <= (256 if capability.startswith("9.") else 128)
    return fits and cap is None and queries.dtype in (jnp.bfloat16, jnp.float16)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Almost x where it is small, and never beyond ± cap (arXiv 2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rotations(positions: jax.Array, head_dim: int, base: float = 10_000.0, scale: float = 1.0) -> jax.Array:
    """Cosine and sine of the angle of each pair of dimensions at each position: [B, T] → [2, B, T, H/2].

    After arXiv 2104.09864. `scale` divides the positions, so that a context so many times as long has angles known from
    the shorter one (arXiv 2306.15595). One array holds both, behind a barrier, as XLA on a CPU would else work them out
    again wherever they are used: for each head of each layer, forwards and backwards.
    """
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim) / scale
    angles = positions[..., None].astype(jnp.float32) * frequency
    return jax.lax.optimization_barrier(jnp.stack([jnp.cos(angles), jnp.sin(angles)]))


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Rotate each pair (dimension i, dimension i + H/2) of x [B, T, N, H] by its angle."""
    cos, sin = rotation[:, :, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def positions(segments: jax.Array) -> jax.Array:
    """Place of each token in its own text, where texts stand one behind the other: [B, T] → int32.

    segments   0 0 1 1 1 2 2        positions  0 1 0 1 2 0 1        padding, on either side, is a segment of its own
    """
    places = jnp.arange(segments.shape[-1], dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=-1)
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def causal_mask(segments: jax.Array) -> jax.Array:
    """Every token sees itself and those before it in its own segment: [B, T] → [B, T, T] bool."""
    T = segments.shape[-1]
    return jnp.tril(jnp.ones((T, T), bool))[None] & (segments[:, :, None] == segments[:, None, :])


def window_mask(queries: int, keys: int, index: jax.Array | int, window: int) -> jax.Array:
    """True where a key is no more than window - 1 places before the query at index + t: [T, S] or [B, T, S] bool.

    3 queries, 5 keys, index 2, window 2        0 1 1 1 1        what comes after the query
                                                0 0 1 1 1        is for the causal mask to cut
                                                0 0 0 1 1
    """
    return jnp.arange(keys) > jnp.asarray(index)[..., None, None] + jnp.arange(queries)[:, None] - window


def in_dtype(params: dict, dtype: str) -> dict:
    """The weights as they are computed with: every matrix in `dtype`; the norms' scales, which are few, as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)


def parameter_count(config: GemmaConfig) -> int:
    """Number of weights of a model of this shape, without making one; all its layers have as many."""

    def count(num_layers: int) -> int:
        model = nnx.eval_shape(lambda: Gemma(replace(config, num_layers=num_layers), nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    return count(1) + (config.num_layers - 1) * (count(2) - count(1))


def _written(cache: jax.Array, new: jax.Array, index: jax.Array | int) -> jax.Array:
    """The cache [B, K, S, H] with `new` [B, K, T, H] at `index` …, or each row of it where its own of [B] says."""
    if jnp.ndim(index) == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, index, axis=2)
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    return jax.vmap(write)(cache, new, index)


def _project(block: Attention | FeedForward, name: str, x: jax.Array) -> jax.Array:
    """x times the block's weight of that name, and what its adapter adds, where it has one."""
    weight = getattr(block, name)[...]
    B, T, *into = x.shape
    width = math.prod(into)
    projected = _times(x.reshape(B, T, width), weight.reshape(-1, width))
    projected = projected.reshape(B, T, *weight.shape[: -len(into)])
    return projected + block.adapters[name](x) if name in block.adapters else projected


@jax.custom_vjp
def _times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [B, T, I] times a matrix [O, I]: [B, T, O].

    Its gradient is written out, as XLA on a CPU would turn the larger of the two that the matrix's needs, and work out
    all that it is made of again in columns: with a GELU in it that took as long as the products.
    """
    if x.shape[1] == 1:
        return _one_place(x[:, 0], matrix).astype(x.dtype)[:, None]
    return jnp.einsum("BTI,OI->BTO", x, matrix)


def _one_place(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """The same of a single token of each row, x [B, I], as when decoding: [B, O] float32.

    The matrix stands on the left, and the barrier keeps XLA from turning that around: on a CPU it would then rearrange
    the matrix for each product, which takes two to three times as long as to multiply a few rows with it.
    """
    columns = jnp.einsum("OI,BI->OB", matrix, x, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(columns).T


def _times_forward(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _times(x, matrix), (x, matrix)


def _times_backward(given: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix = given
    if matrix.shape[0] > matrix.shape[1]:  # XLA turns the left one, which so is the narrower; the result is small
        of_matrix = jax.lax.optimization_barrier(jnp.einsum("BTI,BTO->IO", x, grad)).T
    else:
        of_matrix = jnp.einsum("BTO,BTI->OI", grad, x)
    return grad @ matrix, of_matrix


_times.defvjp(_times_forward, _times_backward)


def _weight(rngs: nnx.Rngs, *shape: int, fan_in: int) -> nnx.Param:
    """Normal with standard deviation 1/√fan_in, so that each layer keeps the scale of its input."""
    return nnx.Param(rngs.params.normal(shape, jnp.float32) * fan_in**-0.5)
