"""Greedy decoding with a key-value cache: many prompts at once, each answered as if it were alone.

Every batch has the same number of rows, and a prompt's row is padded on the left to a width that depends on
that prompt alone, so that what stands beside it changes neither its padding nor the compiled program:

    prompt width 32   . . . 2 4 9 17 5 | answer → → →
                      . 2 4 11 9 17 21 | answer → → →

Decoding stops when every row has written its end of turn, or at `max_new_tokens`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lib.model.gemma import Gemma, causal_mask, positions

WIDTH_MULTIPLE = 32


class Completion(NamedTuple):
    """Token ids that the model wrote, up to its end of turn; truncated where that never came."""

    tokens: list[int]
    truncated: bool


class _Decoding(NamedTuple):
    """State of the decoding loop; S = prompt width + max_new_tokens."""

    written: jax.Array  # scalar int32: tokens written so far in every row
    next_token: jax.Array  # [B] int32
    position: jax.Array  # [B] int32
    valid: jax.Array  # [B, S] bool
    cache: list
    output: jax.Array  # [B, max_new_tokens] int32
    done: jax.Array  # [B] bool


def generate(
    graph: nnx.GraphDef,
    params: dict,
    prompts: list[list[int]],
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    batch_size: int = 64,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Completion]:
    """The greedy completion of each prompt (token ids), in order, up to the first of `stop_ids`.

    `on_done` is told how many more are answered.
    """
    answers: list[Completion | None] = [None] * len(prompts)
    for width, chosen in _batches([len(prompt) for prompt in prompts], batch_size):
        tokens, valid = _left_padded([prompts[index] for index in chosen], width, batch_size)
        output = np.asarray(_decode(graph, params, tokens, valid, np.array(stop_ids, np.int32), max_new_tokens))
        for index, row in zip(chosen, output.tolist(), strict=False):
            answers[index] = _cut(row, stop_ids)
        on_done(len(chosen))
    return answers


def _batches(lengths: list[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """(width, indices of up to `batch_size` prompts that are padded to it), covering every prompt once."""
    widths = [-(-length // WIDTH_MULTIPLE) * WIDTH_MULTIPLE for length in lengths]
    for width in sorted(set(widths)):
        members = [index for index, own in enumerate(widths) if own == width]
        for start in range(0, len(members), batch_size):
            yield width, members[start : start + batch_size]


def _left_padded(prompts: list[list[int]], width: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and valid, both [rows, width]; rows without a prompt repeat the first one."""
    tokens, valid = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row in range(rows):
        prompt = prompts[row] if row < len(prompts) else prompts[0]
        tokens[row, width - len(prompt) :] = prompt
        valid[row, width - len(prompt) :] = True
    return tokens, valid


@partial(jax.jit, static_argnums=(0, 5))
def _decode(
    graph: nnx.GraphDef,
    params: dict,
    tokens: jax.Array,
    valid: jax.Array,
    stop_ids: jax.Array,
    max_new_tokens: int,
) -> jax.Array:
    """Output tokens [B, max_new_tokens]; from the first stop token on, the first of `stop_ids`."""
    model: Gemma = nnx.merge(graph, params)
    B, P = tokens.shape
    room = jnp.zeros((B, max_new_tokens), bool)
    places = positions(valid)  # [B, P]
    prefill_mask = jnp.concatenate([causal_mask(valid), jnp.broadcast_to(room[:, None], (B, P, max_new_tokens))], -1)
    hidden, cache = model(tokens, places, prefill_mask, model.empty_cache(B, P + max_new_tokens))
    start = _Decoding(
        written=jnp.int32(0),
        next_token=_greedy(model, hidden[:, -1]),
        position=places[:, -1] + 1,
        valid=jnp.concatenate([valid, room], axis=-1),
        cache=cache,
        output=jnp.full((B, max_new_tokens), stop_ids[0], jnp.int32),
        done=jnp.zeros(B, bool),
    )

    def going_on(state: _Decoding) -> jax.Array:
        return (state.written < max_new_tokens) & ~jnp.all(state.done)

    def write_one(state: _Decoding) -> _Decoding:
        output = state.output.at[:, state.written].set(jnp.where(state.done, stop_ids[0], state.next_token))
        index = P + state.written
        seen = state.valid.at[:, index].set(True)
        hidden, cache = model(state.next_token[:, None], state.position[:, None], seen[:, None], state.cache, index)
        return _Decoding(
            written=state.written + 1,
            next_token=_greedy(model, hidden[:, 0]),
            position=state.position + 1,
            valid=seen,
            cache=cache,
            output=output,
            done=state.done | jnp.isin(state.next_token, stop_ids),
        )

    return jax.lax.while_loop(going_on, write_one, start).output


def _greedy(model: Gemma, hidden: jax.Array) -> jax.Array:
    return jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)


def _cut(row: list[int], stop_ids: tuple[int, ...]) -> Completion:
    end = next((place for place, token in enumerate(row) if token in stop_ids), None)
    return Completion(row[:end], truncated=end is None)
