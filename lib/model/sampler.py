"""Decoding with a key-value cache: many prompts at once, each answered as if it were alone.

Every batch has the same number of rows, and a prompt's row is padded on the left to a width that depends on
that prompt alone, so that what stands beside it changes neither its padding nor the compiled program:

    prompt width 32   . . . 2 4 9 17 5 | answer → → →
                      . 2 4 11 9 17 21 | answer → → →

Decoding stops when every row has written its end of turn, or at `max_new_tokens`. The next token is the likeliest one,
or at a temperature above 0 one drawn by the Gumbel-max trick, from what top-k and top-p leave. A row draws from a
stream of its own, made of the seed, the prompt and how often the same prompt came before: whoever asks a prompt five
times gets five samples, the same ones in any company.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lib.config import SamplingConfig
from lib.model.gemma import Gemma, causal_mask, positions
from lib.model.mesh import mesh_of, on_mesh, row_devices, spread_rows
from lib.model.processes import whole

WIDTH_MULTIPLE = 32
GREEDY = SamplingConfig()


class Completion(NamedTuple):
    """Token ids that the model wrote, up to its end of turn; truncated where that never came.

    `logprob` is the natural logarithm of the probability that the model gives to all of it, its end among it, at
    temperature 1 and with nothing left out.
    """

    tokens: list[int]
    truncated: bool
    logprob: float


class Likelihood(NamedTuple):
    """Natural logarithm of the probability of a given continuation, and whether greedy decoding writes it."""

    logprob: float
    greedy: bool


class Chance(NamedTuple):
    """One token of a continuation: its probability after all before it, and the likeliest tokens there with theirs."""

    token: int
    probability: float
    likeliest: list[tuple[int, float]]


class _Decoding(NamedTuple):
    """State of the decoding loop; S = prompt width + max_new_tokens."""

    written: jax.Array  # scalar int32: tokens written so far in every row
    next_token: jax.Array  # [B] int32
    next_logprob: jax.Array  # [B] float32
    position: jax.Array  # [B] int32
    valid: jax.Array  # [B, S] bool
    cache: list
    output: jax.Array  # [B, max_new_tokens] int32
    logprob: jax.Array  # [B] float32: of what is written
    done: jax.Array  # [B] bool


def generate(
    graph: nnx.GraphDef,
    params: dict,
    prompts: list[list[int]],
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    batch_size: int = 64,
    sampling: SamplingConfig = GREEDY,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Completion]:
    """The completion of each prompt (token ids), in order, up to the first of `stop_ids`.

    `on_done` is told how many more are answered. Where the weights lie on a mesh, the rows of a batch are spread over
    it, as many on each device: `batch_size` is then rounded up.
    """
    answers: list[Completion | None] = [None] * len(prompts)
    drawing, streams = replace(sampling, samples=1, seed=0), _streams(prompts, sampling.seed)
    mesh = mesh_of(params)
    rows = -(-batch_size // row_devices(mesh)) * row_devices(mesh)  # as many on each device
    for width, chosen in _batches([len(prompt) for prompt in prompts], batch_size):
        tokens, valid = _left_padded([prompts[index] for index in chosen], width, rows)
        keys = streams[np.array(chosen + chosen[:1] * (rows - len(chosen)))]
        stops = np.array(stop_ids, np.int32)
        if mesh is not None:
            tokens, valid, data = (spread_rows(field, mesh) for field in (tokens, valid, jax.random.key_data(keys)))
            keys = jax.random.wrap_key_data(data)
        with on_mesh(mesh):
            output, logprobs = _decode(graph, params, tokens, valid, keys, stops, max_new_tokens, drawing)
        for index, row, logprob in zip(chosen, whole(output).tolist(), whole(logprobs).tolist(), strict=False):
            answers[index] = _cut(row, stop_ids, logprob)
        on_done(len(chosen))
    return answers


def likelihoods(
    graph: nnx.GraphDef, params: dict, prompts: list[list[int]], continuations: list[list[int]], batch_size: int = 64
) -> list[Likelihood]:
    """How likely each continuation (token ids, at least one) is after its prompt, in order."""
    found: list[Likelihood | None] = [None] * len(prompts)
    whole = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
    for width, chosen in _batches([len(tokens) for tokens in whole], batch_size):
        tokens, valid = _left_padded([whole[index] for index in chosen], width, batch_size)
        counts = np.array([len(continuations[index]) for index in chosen], np.int32)
        counts = np.pad(counts, (0, batch_size - len(chosen)), constant_values=1)
        logprobs, greedy = _likelihood(graph, params, tokens, valid, counts)
        for index, logprob, likeliest in zip(chosen, logprobs.tolist(), greedy.tolist(), strict=False):
            found[index] = Likelihood(logprob, likeliest)
    return found


def chances(
    graph: nnx.GraphDef, params: dict, prompt: list[int], continuation: list[int], count: int = 5
) -> list[Chance]:
    """What the model makes of each token of a continuation (token ids), beside the `count` likeliest at its place."""
    whole = prompt + continuation
    [(width, _)] = _batches([len(whole)], 1)
    tokens, valid = _left_padded([whole], width, 1)
    own, ids, shares = (found[-len(continuation) :].tolist() for found in _chances(graph, params, tokens, valid, count))
    return [
        Chance(token, probability, list(zip(*likeliest, strict=True)))
        for token, probability, *likeliest in zip(continuation, own, ids, shares, strict=True)
    ]


def _streams(prompts: list[list[int]], seed: int) -> jax.Array:
    """Random keys [P], each of which depends on nothing but the seed, its prompt and its number among equal ones."""
    seen: Counter[bytes] = Counter()
    marks = np.zeros((len(prompts), 2), np.uint32)
    for place, prompt in enumerate(prompts):
        words = np.array(prompt, np.int32).tobytes()
        marks[place] = zlib.crc32(words), seen[words]
        seen[words] += 1
    return jax.vmap(lambda mark: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), mark[0]), mark[1]))(marks)


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


@partial(jax.jit, static_argnums=(0, 6, 7))
def _decode(
    graph: nnx.GraphDef,
    params: dict,
    tokens: jax.Array,
    valid: jax.Array,
    keys: jax.Array,
    stop_ids: jax.Array,
    max_new_tokens: int,
    sampling: SamplingConfig,
) -> tuple[jax.Array, jax.Array]:
    """Output tokens [B, max_new_tokens], from the first stop token on the first of `stop_ids`; their logprobs [B]."""
    model: Gemma = nnx.merge(graph, params)
    B, P = tokens.shape
    room = jnp.zeros((B, max_new_tokens), bool)
    places = positions(valid)  # [B, P]
    prefill_mask = jnp.concatenate([causal_mask(valid), jnp.broadcast_to(room[:, None], (B, P, max_new_tokens))], -1)
    hidden, cache = model(tokens, places, prefill_mask, model.empty_cache(B, P + max_new_tokens))
    first, first_logprob = _draw(model.logits(hidden[:, -1]), keys, jnp.int32(0), sampling)
    start = _Decoding(
        written=jnp.int32(0),
        next_token=first,
        next_logprob=first_logprob,
        position=places[:, -1] + 1,
        valid=jnp.concatenate([valid, room], axis=-1),
        cache=cache,
        output=jnp.full((B, max_new_tokens), stop_ids[0], jnp.int32),
        logprob=jnp.zeros(B, jnp.float32),
        done=jnp.zeros(B, bool),
    )

    def going_on(state: _Decoding) -> jax.Array:
        return (state.written < max_new_tokens) & ~jnp.all(state.done)

    def write_one(state: _Decoding) -> _Decoding:
        output = state.output.at[:, state.written].set(jnp.where(state.done, stop_ids[0], state.next_token))
        index = P + state.written
        seen = state.valid.at[:, index].set(True)
        hidden, cache = model(state.next_token[:, None], state.position[:, None], seen[:, None], state.cache, index)
        token, logprob = _draw(model.logits(hidden[:, 0]), keys, state.written + 1, sampling)
        return _Decoding(
            written=state.written + 1,
            next_token=token,
            next_logprob=logprob,
            position=state.position + 1,
            valid=seen,
            cache=cache,
            output=output,
            logprob=state.logprob + jnp.where(state.done, 0.0, state.next_logprob),
            done=state.done | jnp.isin(state.next_token, stop_ids),
        )

    ended = jax.lax.while_loop(going_on, write_one, start)
    return ended.output, ended.logprob


@partial(jax.jit, static_argnums=0)
def _likelihood(
    graph: nnx.GraphDef, params: dict, tokens: jax.Array, valid: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of the last `counts` [B] of tokens [B, T]: the sum of their logprobs [B], and whether all are likeliest [B]."""
    model: Gemma = nnx.merge(graph, params)
    hidden, _ = model(tokens, positions(valid), causal_mask(valid))
    logits = model.logits(hidden[:, :-1])  # [B, T-1, V]: what is expected at place t + 1
    T = tokens.shape[1]
    asked = jnp.arange(1, T)[None] >= T - counts[:, None]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    likeliest = jnp.argmax(logits, axis=-1) == tokens[:, 1:]
    return jnp.sum(jnp.where(asked, logprobs, 0.0), axis=-1), jnp.all(likeliest | ~asked, axis=-1)


@partial(jax.jit, static_argnums=(0, 4))
def _chances(
    graph: nnx.GraphDef, params: dict, tokens: jax.Array, valid: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of tokens [1, T] from the second on: their probabilities [T-1], the likeliest ids and theirs [T-1, count]."""
    model: Gemma = nnx.merge(graph, params)
    hidden, _ = model(tokens, positions(valid), causal_mask(valid))
    shares = jax.nn.softmax(model.logits(hidden[0, :-1]))  # [T-1, V]: what is expected at place t + 1
    likeliest, ids = jax.lax.top_k(shares, count)
    return jnp.take_along_axis(shares, tokens[0, 1:, None], axis=-1)[:, 0], ids, likeliest


def _draw(
    logits: jax.Array, keys: jax.Array, place: jax.Array, sampling: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """The next token [B] from logits [B, V], and the logarithm of its probability [B]."""
    if sampling.temperature:
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, place), logits.shape[1:]))(keys)
        tokens = jnp.argmax(_left(logits / sampling.temperature, sampling) + noise, axis=-1)
    else:
        tokens = jnp.argmax(logits, axis=-1)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), logprobs


def _left(logits: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """The logits [B, V] with -inf for what is never drawn.

    Left are the `top_k` highest, and of these the fewest that hold at least `top_p` of their probability:

        top_k=3, top_p=0.8:   probabilities .50 .20 .20 .10  →  .56 .22 .22 (0)  →  .56 .22 .22 (0)
        top_k=3, top_p=0.7:                                                      →  .71 .29 (0) (0)
    """
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        shares = jax.nn.softmax(ordered)
        above = jnp.cumsum(shares, axis=-1) - shares
        lowest = jnp.min(jnp.where(above < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def _cut(row: list[int], stop_ids: tuple[int, ...], logprob: float) -> Completion:
    end = next((place for place, token in enumerate(row) if token in stop_ids), None)
    return Completion(row[:end], truncated=end is None, logprob=logprob)
