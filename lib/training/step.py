"""One optimizer step: masked cross-entropy on the model's turn, accumulated over micro-batches by tokens.

A batch of A × B rows is A micro-batches; losses and gradients are summed over them and divided once by the
number of trained tokens, so that ragged rows weigh as they would in one large batch.

The logits of a large vocabulary are the memory peak of training, not the weights: 4 × 512 tokens over Gemma's 262,144
words are 2 GB, and their gradient as much again. So none are made of the first places, in which no row is trained on,
as prompts stand there; of these the last layer, too, works out keys and values alone. Of the others they are made a
part of the vocabulary at a time, and again where the gradient needs them. A batch whose logits are few is done at once.

Weights that are not trained go in beside the state, never inside the program: as constants they would be there twice.

The step is a jitted function of plain nested dicts (the split state of the model) whose buffers are donated:
`nnx.jit` on the module itself spends tens of milliseconds a call on walking the module in Python.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lib.data.batches import Batch
from lib.model.gemma import Gemma, causal_mask, in_dtype, positions
from lib.model.lora import Params, join

Loss = Callable[[Params, Params, Batch], tuple[jax.Array, jax.Array]]


class TrainState(NamedTuple):
    """Everything that training changes; the step is a scalar int32 array, 0 before the first update.

    `params` are the weights that are trained: all of them, or LoRA's adapters.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Of one optimizer step: mean loss in nats a trained token, norm of the gradient before clipping."""

    loss: jax.Array
    grad_norm: jax.Array
    tokens: jax.Array


CHUNK_LOGITS = 1 << 24  # numbers, 64 MiB in float32: more than these are never there at once


def sum_loss(graph: nnx.GraphDef, dtype: str = "float32", remat: bool = False) -> Loss:
    """(params, frozen, batch) → (cross-entropy summed over trained tokens, in nats; number of trained tokens).

    `frozen` is what `params` lack of the model's weights, {} where all are trained.
    """

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model: Gemma = nnx.merge(graph, in_dtype(join(frozen, params), dtype))
        places, mask, asked = positions(batch.segments), causal_mask(batch.segments), batch.targets.shape[1]
        hidden, _ = model(batch.tokens, places, mask, remat=remat, asked=asked)
        losses = token_losses(model, hidden, batch.targets)
        return jnp.sum(losses, where=batch.loss_mask), jnp.sum(batch.loss_mask)

    return loss


def token_losses(model: Gemma, hidden: jax.Array, targets: jax.Array, most: int = CHUNK_LOGITS) -> jax.Array:
    """Cross-entropy of each token in nats, float32: hidden [B, T, D], targets [B, T] → [B, T].

    Of more than `most` logits only those of a part of the vocabulary are there at once; the sum of their exponentials
    is carried on from part to part, beside the largest (as in arXiv 1805.02867).
    """
    embedding, tokens = model.embedding[...], targets.size
    V, D = embedding.shape
    least = max(1, -(-tokens * V // most))
    parts = next((count for count in range(least, 2 * least) if V % count == 0), least)
    size = -(-V // parts)
    if parts == 1:
        return optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets)

    @jax.checkpoint
    def add(sums: _Sums, part: tuple[jax.Array, jax.Array]) -> tuple[_Sums, None]:
        rows, start = part
        logits = model.logits(hidden, rows)  # [B, T, size]
        if parts * size > V:  # the last part is filled up
            logits = jnp.where(start + jnp.arange(size) < V, logits, -jnp.inf)
        largest = jax.lax.stop_gradient(jnp.maximum(sums.largest, logits.max(axis=-1)))
        total = sums.total * jnp.exp(sums.largest - largest) + jnp.exp(logits - largest[..., None]).sum(axis=-1)
        place = targets - start
        own = jnp.take_along_axis(logits, jnp.clip(place, 0, size - 1)[..., None], axis=-1)[..., 0]
        inside = (place >= 0) & (place < size)
        return _Sums(largest, total, jnp.where(inside, own, sums.target)), None

    start = _Sums(jnp.full(targets.shape, -jnp.inf), jnp.zeros(targets.shape), jnp.zeros(targets.shape))
    filled = jnp.pad(embedding, ((0, parts * size - V), (0, 0))) if parts * size > V else embedding
    pieces = filled.reshape(parts, size, D), jnp.arange(parts) * size
    sums, _ = jax.lax.scan(add, start, pieces)
    return jnp.log(sums.total) + sums.largest - sums.target


class _Sums(NamedTuple):
    """Of the parts of the vocabulary so far, all [B, T] float32: the largest logit, the sum of exp(logit - largest),
    and the logit of the target."""

    largest: jax.Array
    total: jax.Array
    target: jax.Array


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    dtype: str = "float32",
    remat: bool = False,
    places: TrainState | None = None,
) -> Callable:
    """The jitted (state, frozen, batch [A, B, T]) → (state, StepMetrics); the state that goes in is used up.

    `places` are the shardings of the state on a mesh, where it is to stay.
    """
    gradient = jax.value_and_grad(sum_loss(graph, dtype, remat), has_aux=True)

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        def accumulate(total: tuple, micro: Batch) -> tuple[tuple, None]:
            (loss, tokens), grads = gradient(state.params, frozen, micro)
            return jax.tree.map(jnp.add, total, (loss, tokens, grads)), None

        zero = (jnp.float32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, state.params))
        (loss, tokens, grads), _ = jax.lax.scan(accumulate, zero, batch)
        grads = jax.tree.map(lambda grad: grad / tokens, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = StepMetrics(loss / tokens, optax.global_norm(grads), tokens)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    if places is None:
        return jax.jit(train_step, donate_argnums=0)
    everywhere = NamedSharding(places.step.mesh, PartitionSpec())
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, everywhere))
