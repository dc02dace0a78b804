"""The model against its formulas in float64 numpy: arXiv 2403.08295, 1910.07467, 2104.09864, 2002.05202."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from lib.model import gemma
from lib.model.gemma import (
    GENERATIONS,
    PRESETS,
    FeedForward,
    Gemma,
    GemmaConfig,
    RMSNorm,
    causal_mask,
    in_dtype,
    is_fused,
    parameter_count,
    positions,
    rotate,
    rotations,
)

CONFIG = GemmaConfig(vocab_size=37, num_layers=2, embed_dim=12, hidden_dim=20, num_heads=4, num_kv_heads=2, head_dim=6)
# float32 carries 24 bits; two layers of sums over at most 37 products lose some of the last ones.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def abstract(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict]:
    """Graph and shapes of a module."""
    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, nnx.to_pure_dict(state)


def drawn(shapes: dict) -> dict:
    """Random weights, the norms' scales too: those start at 0, which would leave them untested."""
    source = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(source.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


GRAPH, SHAPES = abstract(lambda: Gemma(CONFIG, nnx.Rngs(0)))


@pytest.fixture(scope="module")
def weights() -> dict:
    return drawn(SHAPES)


@pytest.fixture(scope="module")
def logits(weights: dict):
    """(tokens, valid) → logits [B, T, V] of the model under test."""

    @jax.jit
    def run(tokens: jax.Array, valid: jax.Array) -> jax.Array:
        model = nnx.merge(GRAPH, weights)
        return model.logits(model(tokens, positions(valid), causal_mask(valid))[0])

    return lambda tokens, valid=None: np.asarray(run(tokens, np.ones_like(tokens, bool) if valid is None else valid))


# ---- the reference: one text at a time, one formula a line ----------------------------------------------------


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale)


def rotated(x: np.ndarray) -> np.ndarray:
    """x [T, N, H]: at place t, the pair (i, i + H/2) turns by t / 10000^(2i/H)."""
    T, _, H = x.shape
    out = np.empty_like(x)
    for t in range(T):
        for i in range(H // 2):
            angle = t / 10_000 ** (2 * i / H)
            matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            out[t, :, [i, i + H // 2]] = matrix @ x[t, :, [i, i + H // 2]]
    return out


def attended(x: np.ndarray, own: dict) -> np.ndarray:
    """Each query head looks, with softmax weights, at the places up to its own through its group's key-value head."""
    query, key, value, output = (own[name] for name in ("query", "key", "value", "output"))
    T, N, H = len(x), query.shape[0], query.shape[1]
    queries, keys = rotated(np.einsum("TD,NHD->TNH", x, query)), rotated(np.einsum("TD,KHD->TKH", x, key))
    values, mixed = np.einsum("TD,KHD->TKH", x, value), np.zeros((T, N, H))
    for t in range(T):
        for n in range(N):
            k = n // (N // key.shape[0])
            scores = np.array([queries[t, n] @ keys[s, k] / np.sqrt(H) for s in range(t + 1)])
            shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            mixed[t, n] = sum(share * values[s, k] for s, share in enumerate(shares))
    return np.einsum("TNH,DNH->TD", mixed, output)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def fed_forward(x: np.ndarray, own: dict) -> np.ndarray:
    return (gelu(x @ own["gate"].T) * (x @ own["up"].T)) @ own["down"].T


def reference(tokens: list[int], weights: dict) -> np.ndarray:
    """Logits [T, V] of one text."""
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    embedding = weights["embedding"]
    x = embedding[tokens] * np.sqrt(embedding.shape[1])
    for number in sorted(weights["layers"]):
        layer = weights["layers"][number]
        x = x + attended(norm(x, layer["attention_norm"]["scale"]), layer["attention"])
        x = x + fed_forward(norm(x, layer["feed_forward_norm"]["scale"]), layer["feed_forward"])
    return norm(x, weights["final_norm"]["scale"]) @ embedding.T


# ---- the parts ----------------------------------------------------------------------------------------------


def test_rmsnorm_is_its_formula():
    x, scale = np.random.default_rng(0).normal(0, 3, (4, 12)), np.linspace(-1, 1, 12)
    graph, _ = abstract(lambda: RMSNorm(12))
    own = {"scale": jnp.asarray(scale, jnp.float32)}
    found = jax.jit(lambda x: nnx.merge(graph, own)(x))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, norm(x, scale), rtol=1e-6, atol=1e-6)


def test_rotation_is_its_formula():
    x = np.random.default_rng(0).normal(size=(9, 3, 8))
    found = jax.jit(lambda x: rotate(x, rotations(jnp.arange(9)[None], 8)))(jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(found[0], rotated(x), rtol=1e-5, atol=1e-6)


def test_no_layer_works_out_cosines_again():
    graph, state = nnx.split(Gemma(CONFIG, nnx.Rngs(0)))

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        hidden, _ = nnx.merge(graph, params)(tokens, positions(tokens), causal_mask(tokens))
        return jnp.sum(hidden**2)

    program = jax.jit(jax.grad(loss)).lower(nnx.to_pure_dict(state), jnp.ones((2, 8), jnp.int32)).compile().as_text()
    assert program.count(" cosine(") == program.count(" sine(") == 1


def test_rotated_products_depend_on_the_distance_alone():
    query, key = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 3, 1, 8)), jnp.float32)
    here, there = jnp.array([[3, 12, 102]]), jnp.array([[1, 10, 100]])

    @jax.jit
    def product(query: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sum(rotate(query, rotations(here, 8)) * rotate(key, rotations(there, 8)), axis=(0, 2, 3))

    products = product(query[:, :1].repeat(3, axis=1), key[:, :1].repeat(3, axis=1))
    np.testing.assert_allclose(products, products[0], rtol=1e-4)


def test_geglu_is_its_formula():
    graph, shapes = abstract(lambda: FeedForward(CONFIG, nnx.Rngs(0)))
    own, x = drawn(shapes), np.random.default_rng(0).normal(size=(1, 5, 12))
    found = jax.jit(lambda x: nnx.merge(graph, own)(x))(jnp.asarray(x, jnp.float32))
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), own)
    np.testing.assert_allclose(found[0], fed_forward(x[0], own), rtol=1e-5, atol=1e-5)


def test_masks_and_places_are_those_that_the_docstrings_draw():
    valid = jnp.array([[False, False, True, True, True]])
    assert positions(valid).tolist() == [[0, 1, 0, 1, 2]]
    assert positions(jnp.array([[0, 0, 1, 1, 1, 2, 2]])).tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    assert causal_mask(valid)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


# ---- the whole ----------------------------------------------------------------------------------------------

TOKENS = np.random.default_rng(5).integers(0, CONFIG.vocab_size, (3, 11)).astype(np.int32)


def test_the_whole_forward_is_the_reference(logits, weights: dict):
    found = logits(TOKENS)
    assert found.dtype == np.float32
    for row, text in enumerate(TOKENS):
        np.testing.assert_allclose(found[row], reference(text.tolist(), weights), **CLOSE)


def test_a_later_token_changes_nothing_before_it(logits):
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % CONFIG.vocab_size
    before, after = logits(TOKENS), logits(changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.abs(before[:, 7:] - after[:, 7:]).max(axis=(0, 2)) > 1e-3)


@pytest.mark.parametrize("left, right", [(0, 5), (5, 0), (2, 3)])
def test_padding_on_either_side_changes_nothing(logits, left: int, right: int):
    plain = logits(TOKENS)
    width = ((0, 0), (left, right))
    for pad in (0, 9):
        padded = np.pad(TOKENS, width, constant_values=pad)
        found = logits(padded, np.pad(np.ones_like(TOKENS, bool), width))
        np.testing.assert_allclose(found[:, left : left + 11], plain, **CLOSE)


def test_a_row_does_not_see_its_neighbours(logits):
    alone = np.concatenate([logits(TOKENS[row : row + 1]) for row in range(3)])
    np.testing.assert_allclose(logits(TOKENS), alone, **CLOSE)


def test_writing_into_a_cache_in_pieces_is_reading_at_once(logits, weights: dict):
    @jax.jit
    def write(tokens: jax.Array, cache: list, start: jax.Array) -> tuple[jax.Array, list]:
        model, places = nnx.merge(GRAPH, weights), start + jnp.arange(tokens.shape[1])
        mask = jnp.broadcast_to(jnp.arange(16) <= places[:, None], (3, len(places), 16))
        hidden, cache = model(tokens, jnp.broadcast_to(places, tokens.shape), mask, cache, start)
        return model.logits(hidden), cache

    cache, found = nnx.merge(GRAPH, weights).empty_cache(3, 16), []
    for start, stop in ((0, 5), (5, 6), (6, 11)):
        piece, cache = write(TOKENS[:, start:stop], cache, jnp.int32(start))
        found.append(piece)
    np.testing.assert_allclose(np.concatenate(found, axis=1), logits(TOKENS), **CLOSE)


def test_the_last_places_alone_are_the_same_for_less(weights: dict):
    def hidden_and_cache(weights: dict, asked: int | None, remat: bool) -> tuple[jax.Array, list]:
        model, seen = nnx.merge(GRAPH, weights), jnp.ones((3, 11), bool)
        cache = None if remat else model.empty_cache(3, 11)
        return model(TOKENS, positions(seen), causal_mask(seen), cache, remat=remat, asked=asked)

    run = jax.jit(hidden_and_cache, static_argnums=(1, 2))
    for remat in (False, True):
        whole, cache = run(weights, None, remat)
        for asked in (1, 4, 11):
            end, same_cache = run(weights, asked, remat)
            assert end.shape == (3, asked, CONFIG.embed_dim)
            np.testing.assert_allclose(end, whole[:, -asked:], **CLOSE)
            jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), same_cache, cache)
        work = [run.lower(weights, asked, remat).cost_analysis()["flops"] for asked in (None, 4)]
        assert work[1] < work[0] * 0.8  # of the last of a few layers, seven places of eleven


# The releases' own counts; of the 4B model that of its text part, with an embedding of 262,208.
PUBLISHED = {
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
}


def test_weights_are_counted_without_making_them(weights: dict):
    assert parameter_count(CONFIG) == sum(leaf.size for leaf in jax.tree.leaves(weights))
    assert {name: parameter_count(PRESETS[name]) for name in PUBLISHED} == PUBLISHED


def test_in_bfloat16_scores_norms_and_logits_are_computed_in_float32(weights: dict):
    """So the logits are the reference's but for the rounding of what flows between them, and not rounded themselves."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)

    @jax.jit
    def run(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model, valid = nnx.merge(GRAPH, narrow), jnp.ones(tokens.shape, bool)
        hidden, _ = model(tokens, positions(valid), causal_mask(valid))
        return hidden, model.logits(hidden)

    hidden, found = run(TOKENS)
    assert (hidden.dtype, found.dtype) == (jnp.bfloat16, jnp.float32)
    exact = np.asarray(hidden, np.float64) @ np.asarray(narrow["embedding"], np.float64).T
    np.testing.assert_allclose(found, exact, **CLOSE)
    expected = np.stack([reference(text.tolist(), narrow) for text in TOKENS])
    # Rounding to 8 bits loses up to 1/512 of a number; behind some fifty of them, a logit loses √50 / 512 = 1.4 %.
    assert np.abs(found - expected).mean() < 0.03 * np.abs(expected).mean()


LATEST = replace(CONFIG, head_dim=8, **GENERATIONS[3], sliding_window=4)
PACKED = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [1] * 12])  # two texts and padding; one text
NUMBERS = np.arange(24, dtype=np.int32).reshape(2, 12) % 37


def packed_logits(params: dict, graph: nnx.GraphDef, asked: int | None = None) -> jax.Array:
    model = nnx.merge(graph, params)
    return model.logits(model(NUMBERS, positions(PACKED), causal_mask(PACKED), asked=asked)[0])


@pytest.mark.parametrize("config", [replace(CONFIG, head_dim=8), LATEST])
def test_what_is_asked_of_cudnn_is_our_attention(config: GemmaConfig, monkeypatch: pytest.MonkeyPatch):
    graph, shapes = abstract(lambda: Gemma(config, nnx.Rngs(0)))
    params = drawn(shapes)
    expected = packed_logits(params, graph)
    monkeypatch.setattr(gemma, "is_fused", lambda queries, keys, cap: True)
    monkeypatch.setattr(gemma, "FUSED", "xla")  # the same function, where there is no card
    np.testing.assert_allclose(packed_logits(params, graph), expected, **CLOSE)
    np.testing.assert_allclose(packed_logits(params, graph, 8), expected[:, -8:], **CLOSE)


@pytest.mark.parametrize("asked", [None, 8])
def test_a_program_for_a_card_attends_by_cudnn_both_ways(asked: int | None, monkeypatch: pytest.MonkeyPatch):
    graph, shapes = abstract(lambda: Gemma(LATEST, nnx.Rngs(0)))
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 91000))
    monkeypatch.setattr(gemma, "is_fused", lambda queries, keys, cap: True)
    gradient = jax.jit(jax.grad(lambda params: packed_logits(in_dtype(params, "bfloat16"), graph, asked).sum()))
    program = gradient.trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$\w+", program)) == {
        "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward",
    }  # fmt: skip


@pytest.mark.parametrize(
    "capability, dtype, head_dim, cap, fused",
    [
        ("8.0", jnp.bfloat16, 128, None, True),
        ("8.0", jnp.bfloat16, 256, None, False),
        ("9.0", jnp.bfloat16, 256, None, True),
        ("10.0", jnp.bfloat16, 128, None, True),
        ("10.0", jnp.bfloat16, 256, None, False),
        ("12.0", jnp.bfloat16, 256, None, False),
        ("9.0", jnp.bfloat16, 256, 50.0, False),
        ("9.0", jnp.float32, 256, None, False),
        ("gfx942", jnp.bfloat16, 128, None, False),
        (None, jnp.bfloat16, 128, None, False),
    ],
)
def test_cudnn_is_asked_for_what_it_can(capability, dtype, head_dim, cap, fused, monkeypatch: pytest.MonkeyPatch):
    device = SimpleNamespace(compute_capability=capability) if capability else SimpleNamespace()
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    queries, keys = (jax.ShapeDtypeStruct((2, places, 4, head_dim), dtype) for places in (8, 12))
    assert is_fused(queries, keys, cap) is fused
    assert not is_fused(queries, jax.ShapeDtypeStruct((2, 11, 4, head_dim), dtype), cap)
