"""Our Gemma against the one of transformers, for each generation: logits, greedy decoding and a training step.

goldens/ holds what transformers computed (make_goldens.py says how); no test here needs torch but the one marked
`parity`, which makes new goldens, with other weights and texts, by the interpreter that RETRACE_PARITY_PYTHON names.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

from lib.data.batches import Batch
from lib.model import gemma, sampler
from lib.model.gemma import Gemma, GemmaConfig, causal_mask, positions
from lib.model.released_config import read_config
from lib.model.released_weights import read_weights
from lib.model.sampler import generate
from lib.training.step import TrainState, make_train_step

HERE = Path(__file__).parent
NAMES = ("gemma1", "gemma2", "gemma3", "gemma3_nested")
LOGITS_CLOSE, WEIGHTS_CLOSE = 1e-4, 1e-5
FELT = 1e-3
NEVER = -1  # an id that no model writes

pytestmark = pytest.mark.usefixtures("quickly_compiled")


class Golden(NamedTuple):
    """A released folder as we load it, and what transformers computed with it."""

    config: GemmaConfig
    graph: nnx.GraphDef
    params: dict
    expected: dict[str, np.ndarray]
    folder: Path


@cache
def load(folder: Path) -> Golden:
    config = read_config(folder)
    graph, shapes = abstract(config)
    with np.load(folder / "golden.npz") as file:
        return Golden(config, graph, read_weights(folder, config, shapes), dict(file), folder)


def abstract(config: GemmaConfig) -> tuple[nnx.GraphDef, dict]:
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


@pytest.fixture(autouse=True)
def one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts are padded to the same width, so that each model's decoding is compiled once."""
    monkeypatch.setattr(sampler, "WIDTH_MULTIPLE", 64)


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load(HERE / "goldens" / request.param)


def logits(golden: Golden, params: dict) -> jax.Array:
    """[B, T, V] of the left-padded texts."""
    valid = jnp.asarray(golden.expected["valid"])
    model = nnx.merge(golden.graph, params)
    hidden, _ = model(jnp.asarray(golden.expected["tokens"]), positions(valid), causal_mask(valid))
    return model.logits(hidden)


def logit_difference(golden: Golden, found: jax.Array) -> float:
    return float(np.abs(np.asarray(found) - golden.expected["logits"])[golden.expected["valid"]].max())


def prompts(golden: Golden) -> list[list[int]]:
    rows = zip(golden.expected["tokens"], golden.expected["valid"], strict=True)
    return [tokens[valid].tolist() for tokens, valid in rows]


# ---- what is compared -----------------------------------------------------------------------------------------


def check_logits(golden: Golden) -> None:
    valid = golden.expected["valid"]
    assert valid.sum(1).max() > 4 * (golden.config.sliding_window or 0) and not valid[:, 0].all()
    difference = logit_difference(golden, jax.jit(partial(logits, golden))(golden.params))
    print(f"{golden.folder.name}: largest difference of a logit {difference:.1e}")
    assert difference <= LOGITS_CLOSE


def check_greedy(golden: Golden) -> None:
    expected = golden.expected["continuations"].tolist()
    found = generate(golden.graph, golden.params, prompts(golden), (NEVER,), len(expected[0]), batch_size=4)
    assert [completion.tokens for completion in found] == expected


def check_step(golden: Golden, scratch: Path) -> None:
    tokens, valid, trained_on = (golden.expected[name] for name in ("tokens", "valid", "trained_on"))
    batch = Batch(
        tokens[None, :, :-1], tokens[None, :, 1:], trained_on[None, :, 1:], valid[None, :, :-1].astype(np.int32)
    )
    about = json.loads(str(golden.expected["about"]))
    optimizer = optax.sgd(about["learning_rate"])
    own = jax.tree.map(jnp.array, golden.params)
    state = TrainState(jnp.int32(0), own, optimizer.init(own))
    state, metrics = make_train_step(golden.graph, optimizer)(state, {}, batch)
    assert float(metrics.loss) == pytest.approx(about["loss"], abs=1e-5)
    expected = stepped(golden, scratch)
    difference, moved = furthest(state.params, expected), furthest(golden.params, expected)
    print(
        f"{golden.folder.name}: largest difference of a weight {difference:.1e}, of weights that moved by {moved:.1e}"
    )
    assert difference <= WEIGHTS_CLOSE and moved > FELT


def stepped(golden: Golden, scratch: Path) -> dict:
    """The weights of transformers after its step."""
    names = [name for name in golden.expected if name.startswith("after.")]
    save_file({name.removeprefix("after."): golden.expected[name] for name in names}, scratch / "after.safetensors")
    return read_weights(scratch, golden.config, abstract(golden.config)[1])


def furthest(weights: dict, others: dict) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), weights, others)))


def test_logits_are_those_of_transformers(golden: Golden):
    check_logits(golden)


def test_greedy_decoding_is_that_of_transformers(golden: Golden):
    check_greedy(golden)


def test_a_training_step_is_that_of_transformers(golden: Golden, tmp_path: Path):
    check_step(golden, tmp_path)


def test_reading_in_pieces_into_a_cache_is_reading_at_once(golden: Golden):
    tokens, valid = golden.expected["tokens"], golden.expected["valid"]
    B, T = tokens.shape
    room = T + 3

    @jax.jit
    def read(tokens: jax.Array, places: jax.Array, cache: list, start: jax.Array) -> tuple[jax.Array, list]:
        model = nnx.merge(golden.graph, golden.params)
        seen = jnp.pad(jnp.asarray(valid), ((0, 0), (0, room - T)))[:, None]  # [B, 1, S]
        before = jnp.arange(room) <= start + jnp.arange(tokens.shape[1])[:, None]  # [T, S]
        hidden, cache = model(tokens, places, seen & before, cache, start)
        return model.logits(hidden), cache

    cache, found = nnx.merge(golden.graph, golden.params).empty_cache(B, room), []
    places = positions(jnp.asarray(valid))
    for start in range(0, T, 10):  # longer than the window, and of one length, which is compiled once
        piece, cache = read(*(whole[:, start : start + 10] for whole in (tokens, places)), cache, jnp.int32(start))
        found.append(piece)
    assert logit_difference(golden, jnp.concatenate(found, axis=1)) <= LOGITS_CLOSE


@pytest.fixture(scope="module")
def made_now(parity_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Goldens of other weights and texts, made by the transformers that is installed beside RETRACE_PARITY_PYTHON."""
    folder = tmp_path_factory.mktemp("goldens")
    command = [parity_python, str(HERE / "make_goldens.py"), "--output", str(folder), "--seed", "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_texts_drawn_now_agree_too(made_now: Path, name: str, tmp_path: Path):
    golden = load(made_now / name)
    check_logits(golden)
    check_greedy(golden)
    check_step(golden, tmp_path)


# ---- that a wrong constant cannot hide ------------------------------------------------------------------------


def fields(**changed: float | None) -> Callable:
    """The model with other numbers in its configuration."""

    def change(golden: Golden, patch: pytest.MonkeyPatch) -> Golden:
        return golden._replace(graph=abstract(replace(golden.config, **changed))[0])

    return change


def constant(name: str, value: object) -> Callable:
    """gemma.py with another value of one of its names."""

    def change(golden: Golden, patch: pytest.MonkeyPatch) -> Golden:
        patch.setattr(gemma, name, value)
        return golden

    return change


def both(first: Callable, second: Callable) -> Callable:
    return lambda golden, patch: second(first(golden, patch), patch)


def method(kind: type, own: Callable) -> Callable:
    """gemma.py with another way to call one of its modules."""

    def change(golden: Golden, patch: pytest.MonkeyPatch) -> Golden:
        patch.setattr(kind, "__call__", own)
        return golden

    return change


def scales(change_scale: Callable[[str, jax.Array], jax.Array]) -> Callable:
    """The norms with other scales, by their names."""

    def change(golden: Golden, patch: pytest.MonkeyPatch) -> Golden:
        def leaf(path: tuple, value: jax.Array) -> jax.Array:
            return change_scale(path[-2].key, value) if path[-1].key == "scale" else value

        return golden._replace(params=jax.tree_util.tree_map_with_path(leaf, golden.params))

    return change


def swapped_norms(golden: Golden, patch: pytest.MonkeyPatch) -> Golden:
    """The norm after attention and the norm before feed-forward, taken for each other."""
    layers = {
        number: layer
        | {"attention_post_norm": layer["feed_forward_norm"], "feed_forward_norm": layer["attention_post_norm"]}
        for number, layer in golden.params["layers"].items()
    }
    return golden._replace(params=golden.params | {"layers": layers})


def normed_after_adding(
    layer: gemma.Layer, x: jax.Array, view: gemma.View, cache: None, index: int, asked: int
) -> tuple:
    """A layer that norms the sum, not what it adds."""
    attended, cache = layer.attention(layer.attention_norm(x), view, cache, index, asked)
    x = layer.attention_post_norm(x + attended)
    return layer.feed_forward_post_norm(x + layer.feed_forward(layer.feed_forward_norm(x))), cache


def not_normed_before_feed_forward(
    layer: gemma.Layer, x: jax.Array, view: gemma.View, cache: None, index: int, asked: int
) -> tuple:
    attended, cache = layer.attention(layer.attention_norm(x), view, cache, index, asked)
    return x + attended + layer.feed_forward(x + attended), cache


def exact_gelu(layer: gemma.FeedForward, x: jax.Array) -> jax.Array:
    gated = jax.nn.gelu(x @ layer.gate[...].T, approximate=False)
    return (gated * (x @ layer.up[...].T)) @ layer.down[...].T


NORM = gemma.RMSNorm.__call__
LATER = NAMES[1:]
MUTATIONS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "norm's epsilon": (NAMES, constant("NORM_EPSILON", 1.2e-6)),
    "scale without 1 +": (NAMES, scales(lambda name, value: value - 1)),
    "exact gelu": (NAMES, method(gemma.FeedForward, exact_gelu)),
    "scores scaled by another number": (NAMES, fields(query_pre_attn_scalar=12.5)),
    "scores scaled by the head": (LATER, fields(query_pre_attn_scalar=None)),
    "rotary base": (("gemma1",), fields(rope_base=10_100.0)),
    "rotary base, local and global": (
        ("gemma2",),
        both(fields(rope_base=10_100.0), constant("LOCAL_ROPE_BASE", 10_100.0)),
    ),
    "global base": (("gemma2", "gemma3", "gemma3_nested"), fields(rope_base=500_000.0)),
    "local base": (("gemma2", "gemma3", "gemma3_nested"), constant("LOCAL_ROPE_BASE", 10_100.0)),
    "bases exchanged": (("gemma3", "gemma3_nested"), both(fields(rope_base=1e4), constant("LOCAL_ROPE_BASE", 1e6))),
    "positions not divided": (("gemma3_nested",), fields(rope_scale=1.0)),
    "positions divided by another number": (("gemma3_nested",), fields(rope_scale=8.1)),
    "cap on scores": (("gemma2",), fields(attention_cap=50.5)),
    "no cap on scores": (("gemma2",), fields(attention_cap=None)),
    "cap on logits": (("gemma2",), fields(logit_cap=30.1)),
    "a cap on logits": (("gemma1", "gemma3", "gemma3_nested"), fields(logit_cap=30.0)),
    "window one shorter": (LATER, fields(sliding_window=7)),
    "window one longer": (LATER, fields(sliding_window=9)),
    "no window": (LATER, fields(sliding_window=1000)),
    "other global layers": (LATER, fields(global_every=3)),
    "norms exchanged": (LATER, swapped_norms),
    "norm on the sum": (LATER, method(gemma.Layer, normed_after_adding)),
    "no norm before feed-forward": (("gemma1",), method(gemma.Layer, not_normed_before_feed_forward)),
    "no norm of queries and keys": (
        ("gemma3", "gemma3_nested"),
        method(gemma.RMSNorm, lambda norm, x: x if x.ndim == 4 else NORM(norm, x)),
    ),
}


@pytest.mark.parametrize("name, mutation", [(name, key) for key, (names, _) in MUTATIONS.items() for name in names])
def test_a_wrong_constant_is_seen_in_the_logits(name: str, mutation: str, monkeypatch: pytest.MonkeyPatch):
    golden = load(HERE / "goldens" / name)
    changed = MUTATIONS[mutation][1](golden, monkeypatch)
    difference = logit_difference(golden, logits(changed, changed.params))
    print(f"{name}, {mutation}: {difference:.1e}")
    assert difference > FELT
