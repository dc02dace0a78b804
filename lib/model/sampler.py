"""Decoding with a key-value cache: many prompts at once, each answered as if it were alone.

There are always as many rows. A prompt's row is padded on the left to a width that depends on that prompt alone, and
when its answer has come to its end of turn, or to `max_new_tokens`, the row is given to a prompt that waits (continuous
batching; Yu et al., "Orca", OSDI 2022):

    64 places   . . . 2 4 9 17 5 | answer → → →       . . 2 4 8 21 17 5 | answer → → → →
                . 2 4 11 9 17 21 | answer → → → → → → → → → → → →       . . . . 2 4 7 12 | answer → → →

Each row counts its own tokens and sees its own part of the cache, so that neither what stands beside it nor when it
came changes its padding, its numbers or the compiled program. On a CPU the rows are divided among lanes, one for each
core, which take their prompts from one queue. The next token is the likeliest one, or at a temperature above 0 one
drawn by the Gumbel-max trick, from what top-k and top-p leave. A row draws from a stream of its own, made of the seed,
the prompt and how often the same prompt came before: whoever asks a prompt five times gets five samples, the same ones
in any company.
"""

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from threading import Event, Lock
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lib.config import SamplingConfig
from lib.model.gemma import Gemma, LayerCache, causal_mask, positions
from lib.model.mesh import by_heads, by_rows, mesh_of, on_mesh, row_devices, spread_rows
from lib.model.processes import whole

WIDTH_MULTIPLE = 16  # to which a prompt is padded where it is read
PLACES_MULTIPLE = 64  # and in the cache, where more of them can then take each other's rows
REFILLS = 4  # one row in so many waits for others before it is refilled, as prompts are read faster together
LANE_ROWS = 8  # as many rows at least to a lane, as reading a weight takes as long for fewer
GREEDY = SamplingConfig()

Found = TypeVar("Found")


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


class _Rows(NamedTuple):
    """The rows that are decoded together; S = places of a prompt + max_new_tokens."""

    token: jax.Array  # [B] int32: the last that was written
    written: jax.Array  # [B] int32: how many were
    padding: jax.Array  # [B] int32: how many places before the prompt are empty
    key: jax.Array  # [B, 2] uint32: where its random numbers come from
    cache: list[LayerCache]  # of S places
    output: jax.Array  # [B, max_new_tokens] int32
    logprob: jax.Array  # [B] float32: of what is written
    done: jax.Array  # [B] bool


class _Batch(NamedTuple):
    """Prompts, by their indices, that are read together, padded to one width."""

    width: int
    members: list[int]


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
    keys, mesh = _keys(prompts, sampling), mesh_of(params)
    work = _Work(graph, params, prompts, keys, stop_ids, max_new_tokens, replace(sampling, samples=1, seed=0), mesh)
    devices, lanes = row_devices(mesh), _lanes(mesh, batch_size)
    B = _rounded(-(-batch_size // lanes), devices)  # as many on each device
    R = _rounded(-(-B // REFILLS), devices)
    with on_mesh(mesh):
        for places, waiting in _groups([len(prompt) for prompt in prompts], R).items():
            one_at_a_time = Lock()
            for ended in _side_by_side([_answer(work, places, waiting, B, R, one_at_a_time) for _ in range(lanes)]):
                for index, answer in ended.items():
                    answers[index] = answer
                on_done(len(ended))
    return answers


class _Work(NamedTuple):
    """What is the same for all prompts of a call, and these."""

    graph: nnx.GraphDef
    params: dict
    prompts: list[list[int]]
    keys: np.ndarray  # [P, 2] uint32
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingConfig
    mesh: Mesh | None


def _lanes(mesh: Mesh | None, batch_size: int) -> int:
    """How many programs decode side by side, each its own rows.

    On a CPU as many as cores: the products of a few rows with each weight wait for memory, and what stands between them
    is too little to be shared, so that two cores are hardly faster than one with the same rows. A mesh and a GPU have
    one program.
    """
    if mesh is not None or jax.default_backend() != "cpu":
        return 1
    return max(1, min(int(os.environ["NPROC"]), batch_size // LANE_ROWS))


def _answer(
    work: _Work, places: int, waiting: list[_Batch], B: int, R: int, one_at_a_time: Lock
) -> Iterator[dict[int, Completion]]:
    """Takes from the prompts that wait, R at once, until none is left, and yields answers by their prompts' indices."""
    stops, shared = np.array(work.stop_ids, np.int32), (work.graph, work.params)
    free, asked = list(range(B)), {}
    with one_at_a_time:  # what one lane has compiled the others need not
        rows = _no_rows(*shared, B, places, work.max_new_tokens)
    while waiting or asked:
        with one_at_a_time:
            while waiting and len(free) >= len(waiting[0].members):
                batch = waiting.pop(0)
                at = [free.pop() for _ in batch.members]
                asked |= dict(zip(at, batch.members, strict=True))
                at += [B] * (R - len(at))  # there are always R that are read; the spare ones are put nowhere
                rows = _admit(*shared, rows, *_read(work, batch, R), np.array(at), stops, work.sampling)
            enough = len(waiting[0].members) if waiting else B
            rows = _decode(*shared, rows, stops, np.int32(enough), work.sampling)
        done, output, logprob = whole(rows.done), whole(rows.output), whole(rows.logprob)
        ended = [row for row in asked if done[row]]
        free += ended
        yield {asked.pop(row): _cut(output[row].tolist(), work.stop_ids, float(logprob[row])) for row in ended}


def _read(work: _Work, batch: _Batch, R: int) -> tuple[np.ndarray | jax.Array, ...]:
    """Tokens, valid and keys of R rows; those beyond the batch repeat prompts."""
    tokens, valid = _left_padded([work.prompts[index] for index in batch.members], batch.width, R)
    spare = [0] * (R - len(batch.members))
    fields = tokens, valid, work.keys[batch.members + spare]
    return fields if work.mesh is None else tuple(spread_rows(field, work.mesh) for field in fields)


def _side_by_side(lanes: list[Iterator[Found]]) -> Iterator[Found]:
    """What the lanes yield, as it comes, each from a thread of its own; where one fails, or nobody asks on, all end."""
    if len(lanes) == 1:
        yield from lanes[0]
        return
    found: SimpleQueue[Found | None] = SimpleQueue()
    stopped = Event()

    def follow(lane: Iterator[Found]) -> None:
        try:
            for some in lane:
                found.put(some)
                if stopped.is_set():
                    break
        except BaseException:
            stopped.set()
            raise
        finally:
            found.put(None)

    with ThreadPoolExecutor(len(lanes)) as threads:
        try:
            running = [threads.submit(follow, lane) for lane in lanes]
            for _ in lanes:
                while (some := found.get()) is not None:
                    yield some
            for lane in running:
                lane.result()
        finally:
            stopped.set()


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


def _keys(prompts: list[list[int]], sampling: SamplingConfig) -> np.ndarray:
    """Random keys [P, 2], each of which depends on nothing but the seed, its prompt and its number among equal ones."""
    seen: Counter[bytes] = Counter()
    marks = np.zeros((len(prompts), 2), np.uint32)
    if not (sampling.temperature and prompts):
        return marks  # as nothing is drawn
    for place, prompt in enumerate(prompts):
        words = np.array(prompt, np.int32).tobytes()
        marks[place] = zlib.crc32(words), seen[words]
        seen[words] += 1
    seed = jax.random.key(sampling.seed)
    keys = jax.vmap(lambda mark: jax.random.fold_in(jax.random.fold_in(seed, mark[0]), mark[1]))(marks)
    return np.asarray(jax.random.key_data(keys))


def _batches(lengths: list[int], batch_size: int) -> list[_Batch]:
    """All prompts, each once: up to `batch_size` of one width together, the narrow ones first."""
    widths = [_rounded(length, WIDTH_MULTIPLE) for length in lengths]
    found = []
    for width in sorted(set(widths)):
        members = [index for index, own in enumerate(widths) if own == width]
        found += [_Batch(width, members[start : start + batch_size]) for start in range(0, len(members), batch_size)]
    return found


def _groups(lengths: list[int], batch_size: int) -> dict[int, list[_Batch]]:
    """The same, by the places that a prompt has in the cache."""
    groups: dict[int, list[_Batch]] = {}
    for batch in _batches(lengths, batch_size):
        groups.setdefault(_rounded(batch.width, PLACES_MULTIPLE), []).append(batch)
    return groups


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _left_padded(prompts: list[list[int]], width: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and valid, both [rows, width]; rows without a prompt repeat the first one."""
    tokens, valid = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row in range(rows):
        prompt = prompts[row] if row < len(prompts) else prompts[0]
        tokens[row, width - len(prompt) :] = prompt
        valid[row, width - len(prompt) :] = True
    return tokens, valid


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _no_rows(graph: nnx.GraphDef, params: dict, B: int, places: int, max_new_tokens: int) -> _Rows:
    """B rows without a prompt."""
    none = jnp.zeros(B, jnp.int32)
    rows = _Rows(
        token=none,
        written=none + 1,
        padding=none,
        key=jnp.zeros((B, 2), jnp.uint32),
        cache=nnx.merge(graph, params).empty_cache(B, places + max_new_tokens),
        output=jnp.zeros((B, max_new_tokens), jnp.int32),
        logprob=jnp.zeros(B, jnp.float32),
        done=jnp.ones(B, bool),
    )
    return _apart(rows)


def _apart(rows: _Rows) -> _Rows:
    """The same, each row on its device of a mesh."""
    cache = jax.tree.map(by_heads, rows.cache)
    return jax.tree.map(by_rows, rows)._replace(cache=cache)


@partial(jax.jit, static_argnums=(0, 8), donate_argnums=2)
def _admit(
    graph: nnx.GraphDef,
    params: dict,
    rows: _Rows,
    tokens: jax.Array,  # [R, P]
    valid: jax.Array,  # [R, P]
    key: jax.Array,  # [R, 2]
    at: jax.Array,  # [R]: the row that each prompt gets; B where it gets none
    stop_ids: jax.Array,
    sampling: SamplingConfig,
) -> _Rows:
    """The rows with the prompts in their places, read and with their first token written."""
    model: Gemma = nnx.merge(graph, params)
    (R, P), room = tokens.shape, rows.output.shape[1]
    before = rows.cache[0].keys.shape[2] - room - P  # the places that are left of what is read
    hidden, cache = model(tokens, positions(valid), causal_mask(valid), model.empty_cache(R, P), asked=1)
    written = jnp.zeros(R, jnp.int32)
    token, logprob = _draw(model.logits(hidden[:, 0]), key, written, sampling)
    come = _Rows(
        token=token,
        written=written + 1,
        padding=before + P - jnp.sum(valid, axis=-1, dtype=jnp.int32),
        key=key,
        cache=jax.tree.map(lambda part: jnp.pad(part, ((0, 0), (0, 0), (before, room), (0, 0))), cache),
        output=jnp.full((R, room), stop_ids[0], jnp.int32).at[:, 0].set(token),
        logprob=logprob,
        done=jnp.isin(token, stop_ids) | (room == 1),
    )

    return _apart(jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), rows, come))


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def _decode(
    graph: nnx.GraphDef,
    params: dict,
    rows: _Rows,
    stop_ids: jax.Array,
    enough: jax.Array,
    sampling: SamplingConfig,
) -> _Rows:
    """The rows when so many of them are done. A row that is done stays as it is, whatever is computed beside it."""
    model: Gemma = nnx.merge(graph, params)
    room, S = rows.output.shape[1], rows.cache[0].keys.shape[2]

    def write_one(rows: _Rows) -> _Rows:
        index = S - room + rows.written - 1  # [B]: the place of the token that was written last
        places = jnp.arange(S)
        seen = (places >= rows.padding[:, None]) & (places <= index[:, None])
        hidden, cache = model(rows.token[:, None], (index - rows.padding)[:, None], seen[:, None], rows.cache, index)
        token, logprob = _draw(model.logits(hidden[:, 0]), rows.key, rows.written, sampling)
        here = (jnp.arange(room) == rows.written[:, None]) & ~rows.done[:, None]
        written = rows.written + ~rows.done
        return rows._replace(
            token=token,
            written=written,
            cache=cache,
            output=jnp.where(here, token[:, None], rows.output),
            logprob=rows.logprob + jnp.where(rows.done, 0.0, logprob),
            done=rows.done | jnp.isin(token, stop_ids) | (written == room),
        )

    return _apart(jax.lax.while_loop(lambda rows: jnp.sum(rows.done) < enough, write_one, rows))


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


def _draw(logits: jax.Array, key: jax.Array, place: jax.Array, sampling: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """The next token [B] from logits [B, V], keys [B, 2] and places [B] in the answers; its log-probability [B]."""
    if sampling.temperature:
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key), place)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        tokens = jnp.argmax(_left(logits / sampling.temperature, sampling) + noise, axis=-1)
    else:
        tokens = jnp.argmax(logits, axis=-1)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    return tokens.astype(jnp.int32), logprobs


def _left(logits: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """The logits [B, V] with -inf for what is never drawn.

    Left are the `top_k` highest, and of these the fewest that hold at least `top_p` of their probability; equal ones
    stay together:

        top_k=3, top_p=0.8:   probabilities .50 .25 .15 .10  →  .56 .28 .17 (0)  →  .67 .33 (0) (0)
        top_k=2, top_p=0.7:                 .50 .20 .20 .10  →  .56 .22 .22 (0)  →  .56 .22 .22 (0)
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
