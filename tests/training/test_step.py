"""One optimizer step: the loss is its formula, micro-batches weigh by tokens, and nothing unmasked counts."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lib.config import LoraConfig, TrainingConfig
from lib.data.batches import Batch, make_batch, untrained
from lib.data.renderer import EncodedExample
from lib.model.gemma import causal_mask, positions
from lib.model.lora import split
from lib.model.weights import Model, with_lora
from lib.training.optimizer import ADAM_B2, make_optimizer
from lib.training.step import StepMetrics, TrainState, make_train_step, sum_loss, token_losses

pytestmark = pytest.mark.usefixtures("quickly_compiled")

T = 16
RAGGED = [(16, 3), (9, 8), (5, 1), (12, 6)]  # tokens, and how many of them are trained on


@pytest.fixture(scope="module")
def four(small_model: Model) -> list[EncodedExample]:
    """Four examples that are as different in length as four can be."""
    source = np.random.default_rng(0)
    return [
        EncodedExample(
            source.integers(0, small_model.config.vocab_size, n + 1).tolist(), [False] * (n + 1 - m) + [True] * m
        )
        for n, m in RAGGED
    ]


@pytest.fixture(scope="module")
def batch(four: list[EncodedExample]) -> Batch:
    """Each in a row of its own: [4, T]."""
    return make_batch([[example] for example in four], T)


@pytest.fixture(scope="module")
def gradient_of(small_model: Model) -> Callable[[Batch], tuple[float, dict]]:
    loss = jax.jit(jax.value_and_grad(sum_loss(small_model.graph), has_aux=True))
    return lambda batch: loss(small_model.params, {}, batch)


@pytest.fixture(scope="module")
def step(small_model: Model) -> Callable[[Batch], tuple[dict, StepMetrics]]:
    """(batch [4, T]) → the gradient that a step over its two halves followed, read off plain descent at rate 1."""
    optimizer = optax.sgd(1.0)
    train_step = make_train_step(small_model.graph, optimizer)

    def run(batch: Batch) -> tuple[dict, StepMetrics]:
        params = jax.tree.map(jnp.array, small_model.params)
        halves = Batch(*(field.reshape(2, 2, T) for field in batch))
        state, metrics = train_step(TrainState(jnp.int32(0), params, optimizer.init(params)), {}, halves)
        assert int(state.step) == 1
        return jax.tree.map(lambda old, new: np.asarray(old - new), small_model.params, state.params), metrics

    return run


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    """Every leaf within `tolerance` of the largest value of its own."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.fixture(scope="module")
def logits_of(small_model: Model) -> Callable[[Batch], np.ndarray]:
    @jax.jit
    def logits(batch: Batch) -> jax.Array:
        model = nnx.merge(small_model.graph, small_model.params)
        return model.logits(model(batch.tokens, positions(batch.segments), causal_mask(batch.segments))[0])

    return lambda batch: np.asarray(logits(batch))


def test_the_loss_is_the_naive_cross_entropy(batch: Batch, gradient_of, logits_of):
    logits, expected = logits_of(batch).astype(np.float64), 0.0
    for row in range(4):
        for t in range(T):
            if batch.loss_mask[row, t]:
                chances = np.exp(logits[row, t]) / np.exp(logits[row, t]).sum()
                expected -= np.log(chances[batch.targets[row, t]])
    (total, tokens), _ = gradient_of(batch)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert tokens == sum(m for _, m in RAGGED) == 18


def test_only_masked_targets_count(small_model: Model, batch: Batch, gradient_of):
    other = np.where(batch.loss_mask, batch.targets, (batch.targets + 7) % small_model.config.vocab_size)
    assert (other != batch.targets).sum() == 4 * T - 18
    (total, _), gradient = gradient_of(batch)
    (same, _), same_gradient = gradient_of(batch._replace(targets=other.astype(np.int32)))
    assert total == same
    jax.tree.map(np.testing.assert_array_equal, gradient, same_gradient)
    (changed, _), _ = gradient_of(batch._replace(targets=(batch.targets + 1) % small_model.config.vocab_size))
    assert changed != total


def test_no_logits_of_the_prompts_change_nothing(small_model: Model, gradient_of):
    source, shapes = np.random.default_rng(1), [(16, 3), (14, 2), (16, 7), (13, 4)]  # the shortest prompt has 9 tokens
    examples = [
        EncodedExample(source.integers(0, small_model.config.vocab_size, n).tolist(), [False] * (n - m) + [True] * m)
        for n, m in shapes
    ]
    rows = [[example] for example in examples]
    assert untrained(examples) == 8
    (total, tokens), gradient = gradient_of(make_batch(rows, T))
    (fewer, same), of_fewer = gradient_of(make_batch(rows, T, 8))
    assert tokens == same == sum(m for _, m in shapes)
    np.testing.assert_allclose(fewer, total, rtol=1e-6)
    assert_close(of_fewer, gradient, 1e-5)


def test_what_stands_in_the_padding_does_not_count(batch: Batch, gradient_of):
    (total, _), gradient = gradient_of(batch)
    filled = batch._replace(tokens=np.where(batch.segments > 0, batch.tokens, 9).astype(np.int32))
    assert (filled.tokens != batch.tokens).any()
    (same, _), same_gradient = gradient_of(filled)
    assert total == same
    assert_close(same_gradient, gradient, 1e-6)


def test_examples_of_one_row_are_as_if_alone(four: list[EncodedExample], batch: Batch, gradient_of, logits_of):
    packed = make_batch([four], sum(n for n, _ in RAGGED) + 3)
    alone, together = logits_of(batch), logits_of(packed)
    for row, (n, _) in enumerate(RAGGED):
        np.testing.assert_allclose(together[0][packed.segments[0] == row + 1], alone[row, :n], rtol=0, atol=2e-5)
    (total, tokens), gradient = gradient_of(packed)
    (expected, same_tokens), expected_gradient = gradient_of(batch)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert tokens == same_tokens
    assert_close(gradient, expected_gradient, 2e-6)


def test_no_example_of_a_row_sees_another(four: list[EncodedExample], logits_of):
    room = sum(n for n, _ in RAGGED) + 3
    packed = make_batch([four], room)
    before = logits_of(packed)[0]
    for segment in range(1, 5):
        here = packed.segments == segment
        after = logits_of(packed._replace(tokens=np.where(here, 9, packed.tokens).astype(np.int32)))[0]
        np.testing.assert_array_equal(after[~here[0]], before[~here[0]])
        assert (after[here[0]] != before[here[0]]).any()


def test_the_prompt_is_read_though_it_is_not_trained_on(batch: Batch, gradient_of):
    reworded = batch.tokens.copy()
    reworded[0, 0] += 1
    assert not batch.loss_mask[0, 0]
    assert gradient_of(batch._replace(tokens=reworded))[0][0] != gradient_of(batch)[0][0]


def test_accumulated_micro_batches_are_the_full_batch(batch: Batch, step, gradient_of):
    (total, tokens), gradient = gradient_of(batch)
    mean = jax.tree.map(lambda leaf: np.asarray(leaf) / int(tokens), gradient)
    found, metrics = step(batch)
    assert_close(found, mean, 2e-6)
    np.testing.assert_allclose(metrics.loss, total / tokens, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, optax.global_norm(mean), rtol=1e-6)
    assert metrics.tokens == 18


def test_micro_batches_weigh_by_their_tokens_not_alike(batch: Batch, step, gradient_of):
    halves = [
        gradient_of(Batch(*(np.concatenate([field[rows]] * 2) for field in batch)))[0] for rows in ([0, 1], [2, 3])
    ]
    alike = np.mean([total / tokens for total, tokens in halves])
    assert abs(float(step(batch)[1].loss) - alike) > 1e-3


# ---- the optimizer ------------------------------------------------------------------------------------------

PARAMS = {"matrix": jnp.array([[3.0, -4.0]]), "scale": jnp.array([5.0])}


def updated(config: TrainingConfig, grads: dict, steps: int = 1) -> dict:
    """The change of PARAMS by the last of some steps along the same gradient."""
    optimizer, _ = make_optimizer(config)
    state = optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, PARAMS)
    return updates


def test_weight_decay_shrinks_matrices_alone():
    config = TrainingConfig(num_steps=10, learning_rate=0.1, weight_decay=0.5)
    updates = updated(config, jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["matrix"], -0.1 * 0.5 * PARAMS["matrix"], rtol=1e-6)
    np.testing.assert_array_equal(updates["scale"], [0])


def test_gradients_are_clipped_by_their_global_norm_before_adam():
    config = TrainingConfig(num_steps=10, learning_rate=0.1, weight_decay=0.0, max_grad_norm=5.0)
    optimizer, _ = make_optimizer(config)
    grads = {"matrix": jnp.array([[30.0, 0.0]]), "scale": jnp.array([40.0])}  # norm 50: scaled to a tenth
    _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    second = state[1][0].nu  # Adam's mean of squares holds (1 - b2) g² after one step
    np.testing.assert_allclose(second["matrix"], [[(1 - ADAM_B2) * 9, 0]], rtol=1e-4)
    np.testing.assert_allclose(second["scale"], [(1 - ADAM_B2) * 16], rtol=1e-4)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    _, schedule = make_optimizer(TrainingConfig(num_steps=12, learning_rate=0.4, warmup_steps=4))
    rates = [float(schedule(step)) for step in range(13)]
    np.testing.assert_allclose(rates[:5], [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(rates[4:], [0.2 * (1 + np.cos(np.pi * n / 8)) for n in range(9)], atol=1e-6)
    _, schedule = make_optimizer(TrainingConfig(num_steps=12, learning_rate=0.4))
    assert float(schedule(0)) == pytest.approx(0.4)


def test_the_first_step_of_adam_is_as_long_as_the_learning_rate():
    config = TrainingConfig(num_steps=10, learning_rate=0.1, weight_decay=0.0)
    updates = updated(config, {"matrix": jnp.array([[0.3, -0.4]]), "scale": jnp.array([0.5])})
    np.testing.assert_allclose(updates["matrix"], [[-0.1, 0.1]], rtol=1e-4)


# ---- the loss in chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5, 16, 63])
def test_the_loss_in_chunks_and_its_gradient_equal_the_loss_at_once(tokens, small_model, batch):
    """However many tokens a chunk has, also where the last one is not full."""

    def mean(params: dict, most: int) -> jax.Array:
        model = nnx.merge(small_model.graph, params)
        hidden, _ = model(batch.tokens, positions(batch.segments), causal_mask(batch.segments))
        return jnp.mean(token_losses(model, hidden, batch.targets, most), where=batch.loss_mask)

    V = small_model.config.vocab_size
    naive, whole = jax.value_and_grad(mean)(small_model.params, batch.tokens.size * V)
    chunked, parts = jax.value_and_grad(mean)(small_model.params, tokens * V)
    assert float(chunked) == pytest.approx(float(naive), rel=1e-6)
    assert_close(parts, whole, 1e-5)


class Head(NamedTuple):
    """Of a model, what the loss asks for."""

    embedding: jax.Array

    def logits(self, hidden: jax.Array, rows: jax.Array | None = None) -> jax.Array:
        return jnp.einsum("...D,VD->...V", hidden, self.embedding if rows is None else rows)


@pytest.mark.parametrize("V", [11, 97, 211])
def test_a_vocabulary_that_no_number_divides_is_read_in_as_few_parts(V):
    """The last of them is filled up; of 11 in five parts nothing else is in it."""
    source, targets = np.random.default_rng(0), jnp.array([[0, V - 1, V // 2, 3]])
    embedding, hidden = (jnp.asarray(source.normal(size=size), jnp.float32) for size in ((V, 5), (1, 4, 5)))

    def mean(embedding: jax.Array, most: int) -> jax.Array:
        return token_losses(Head(embedding), hidden, targets, most).mean()

    at_once, whole = jax.value_and_grad(mean)(embedding, 4 * V)
    for parts in (2, 3, 5):
        most = -(-4 * V // parts)
        assert f"length={parts}" in str(jax.make_jaxpr(partial(mean, most=most))(embedding))
        loss, gradient = jax.value_and_grad(mean)(embedding, most)
        np.testing.assert_allclose(loss, at_once, rtol=1e-6)
        np.testing.assert_allclose(gradient, whole, atol=1e-6)


def test_the_logits_of_a_large_vocabulary_are_never_there_at_once(small_model):
    """What the compiler sets aside: the naive loss holds all logits and their gradient, the chunked one does not."""
    V, B, T, D = 50_000, 2, 64, 16

    def bytes_of(most: int) -> int:
        def mean(embedding: jax.Array, hidden: jax.Array) -> jax.Array:
            return token_losses(Head(embedding), hidden, jnp.zeros((B, T), jnp.int32), most).mean()

        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((V, D), (B, T, D))]
        return jax.jit(jax.grad(mean, argnums=(0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(B * T * V) > 4 * B * T * V > 4 * bytes_of(4 * V)


# ---- less memory --------------------------------------------------------------------------------------------


def gradient_with(model: Model, batch: Batch, **options: object) -> tuple[float, dict]:
    (loss, tokens), gradient = jax.jit(jax.value_and_grad(sum_loss(model.graph, **options), has_aux=True))(
        model.params, {}, batch
    )
    return float(loss / tokens), jax.tree.map(lambda leaf: leaf / tokens, gradient)


def test_a_layer_computed_twice_gives_the_same_loss_and_gradient(two_layer_model, batch):
    (kept, gradient), (again, recomputed) = (gradient_with(two_layer_model, batch, remat=on) for on in (False, True))
    assert again == pytest.approx(kept, rel=1e-6)
    assert_close(recomputed, gradient, 1e-5)


def test_in_bfloat16_the_loss_and_the_gradient_stay_float32_and_near(two_layer_model, batch):
    wide, _ = gradient_with(two_layer_model, batch)
    narrow, gradient = gradient_with(two_layer_model, batch, dtype="bfloat16")
    assert narrow != wide and narrow == pytest.approx(wide, rel=0.02)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(gradient)} == {"float32"}


def test_frozen_weights_have_no_gradient_and_count_all_the_same(two_layer_model, batch):
    adapted = with_lora(two_layer_model, LoraConfig(rank=2), seed=1)
    frozen, adapters = split(adapted.params)
    loss = jax.jit(jax.value_and_grad(sum_loss(adapted.graph), has_aux=True))
    (total, tokens), gradient = loss(adapters, frozen, batch)
    assert float(total / tokens) == gradient_with(two_layer_model, batch)[0]
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)
