"""Decoding: the cache changes no token, neither do the neighbours of a prompt, and drawing is by the probabilities."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from threading import Barrier

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lib.config import SamplingConfig
from lib.errors import RetraceError
from lib.model.gemma import causal_mask, positions
from lib.model.sampler import (
    GREEDY,
    LANE_ROWS,
    Completion,
    _draw,
    _left,
    _side_by_side,
    chances,
    generate,
    likelihoods,
)
from lib.model.weights import Model

NEVER = -1  # an id that no model writes
NEW = 12
DRAWN = SamplingConfig(temperature=1.5, top_k=40, top_p=0.95, seed=3)
LENGTHS = [3, 31, 40, 32, 17, 33]  # on both sides of a padded width, and at it


@pytest.fixture(scope="module")
def talker(small_model: Model) -> Model:
    """The small model with louder layers: else its last token would always be its likeliest next one."""
    layers = jax.tree.map(lambda leaf: leaf * 5, small_model.params["layers"])
    return small_model._replace(params=small_model.params | {"layers": layers})


@pytest.fixture(scope="module")
def prompts(talker: Model) -> list[list[int]]:
    source = np.random.default_rng(1)
    return [source.integers(6, talker.config.vocab_size, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def uncached(talker: Model, prompts: list[list[int]]) -> list[list[int]]:
    """The naive loop: read everything again for each token and take the likeliest next one."""
    room = max(LENGTHS) + NEW

    @jax.jit
    def likeliest(tokens: jax.Array, length: jax.Array) -> jax.Array:
        model, valid = nnx.merge(talker.graph, talker.params), (jnp.arange(room) < length)[None]
        hidden, _ = model(tokens[None], positions(valid), causal_mask(valid))
        return jnp.argmax(model.logits(hidden[0, length - 1]))

    answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(NEW):
            padded = np.array(tokens + [0] * (room - len(tokens)), np.int32)
            tokens.append(int(likeliest(padded, jnp.int32(len(tokens)))))
        answers.append(tokens[len(prompt) :])
    return answers


def uncached_logits(model: Model, tokens: list[int]) -> jax.Array:
    """[T, V]"""
    valid = jnp.ones((1, len(tokens)), bool)
    merged = nnx.merge(model.graph, model.params)
    hidden, _ = merged(jnp.array([tokens]), positions(valid), causal_mask(valid))
    return merged.logits(hidden[0])


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def answered(model: Model, prompts: list[list[int]], *ends: int, batch_size: int = 4, **options) -> list[Completion]:
    return generate(model.graph, model.params, prompts, ends or (NEVER,), NEW, batch_size, **options)


def test_cached_decoding_is_the_uncached_loop(talker: Model, prompts, uncached):
    assert len(set(map(tuple, uncached))) == len(prompts) and all(len(set(answer)) > 2 for answer in uncached)
    found = answered(talker, prompts)
    assert tokens_of(found) == uncached and all(answer.truncated for answer in found)


def test_f49_an_answer_does_not_depend_on_its_neighbours(talker: Model, prompts):
    together = answered(talker, prompts)
    assert answered(talker, prompts[::-1]) == together[::-1]
    assert answered(talker, [prompts[2]] * 5 + prompts[:1]) == [together[2]] * 5 + together[:1]
    assert [answered(talker, [prompt])[0] for prompt in prompts] == together


def test_f49_an_answer_does_not_depend_on_when_a_row_was_free_for_it(talker: Model):
    source = np.random.default_rng(4)
    prompts = [source.integers(6, talker.config.vocab_size, 3 + number).tolist() for number in range(60)]
    ends = [answer.tokens[-1] for answer in answered(talker, prompts)[::10]]
    told: list[int] = []
    together = answered(talker, prompts, *ends, batch_size=8, on_done=told.append)
    assert len({len(answer.tokens) for answer in together}) > NEW / 2  # rows are free at different times
    assert sum(told) == len(prompts) and len(told) > len(prompts) / 8  # and others come while their neighbours write
    assert answered(talker, prompts[::-1], *ends, batch_size=8) == together[::-1]
    for place in (0, 20, 59):
        assert answered(talker, prompts[place : place + 1], *ends, batch_size=8) == together[place : place + 1]


@pytest.mark.parametrize("place", [0, 5, NEW - 1])
def test_a_completion_ends_before_its_first_end_of_turn(talker: Model, prompts, uncached, place: int):
    # At NEW - 1 one answer ends with the last token that it may write: that is no truncation.
    end = next(answer[place] for answer in uncached if answer.index(answer[place]) == place)
    for answer, found in zip(uncached, answered(talker, prompts, end), strict=True):
        expected = (answer[: answer.index(end)], False) if end in answer else (answer, True)
        assert (found.tokens, found.truncated) == expected


def test_every_answer_is_told_once(talker: Model, prompts):
    told: list[int] = []
    answered(talker, prompts, on_done=told.append)
    assert told == [4, 2] and answered(talker, []) == []


def test_any_of_the_stop_tokens_ends_a_completion(talker: Model, prompts, uncached):
    """A released model may write <eos> where Gemma's template has <end_of_turn>."""
    first, second = uncached[0][4], uncached[0][2]
    end = min(uncached[0].index(first), uncached[0].index(second))
    found = answered(talker, prompts[:1], first, second)[0]
    assert (found.tokens, found.truncated) == (uncached[0][:end], False)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_f49_no_batch_size_changes_an_answer(talker: Model, sampling: SamplingConfig):
    source = np.random.default_rng(2)
    prompts = [source.integers(6, talker.config.vocab_size, 3 + number % 30).tolist() for number in range(70)]
    one, eight, many = (answered(talker, prompts, batch_size=size, sampling=sampling) for size in (1, 8, 64))
    assert tokens_of(one) == tokens_of(eight) == tokens_of(many)
    for found in (eight, many):  # the last bits of a sum differ with the shape of the batch
        np.testing.assert_allclose([a.logprob for a in found], [a.logprob for a in one], rtol=1e-5)


def test_a_prompt_asked_again_is_another_sample_and_always_the_same_one(talker: Model, prompts):
    three = answered(talker, [prompts[0]] * 3, sampling=DRAWN)
    assert len(set(map(tuple, tokens_of(three)))) == 3
    assert answered(talker, [prompts[1], prompts[0], prompts[2], prompts[0]], sampling=DRAWN)[1::2] == three[:2]
    assert tokens_of(answered(talker, prompts[:1], sampling=replace(DRAWN, seed=7))) != tokens_of(three[:1])


def test_logprob_is_that_of_the_tokens_with_their_end(talker: Model, prompts):
    [first] = answered(talker, prompts[:1], sampling=DRAWN)
    end = first.tokens[6]
    [found] = answered(talker, prompts[:1], end, sampling=DRAWN)
    written = [*found.tokens, end]
    logits = uncached_logits(talker, prompts[0] + written)[len(prompts[0]) - 1 : -1]
    expected = jax.nn.log_softmax(logits)[jnp.arange(len(written)), jnp.array(written)].sum()
    assert not found.truncated and found.tokens == first.tokens[: first.tokens.index(end)]
    np.testing.assert_allclose(found.logprob, expected, rtol=1e-5)


def test_top_k_and_top_p_leave_what_they_say():
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.1, 0.2], [0.01, 0.01, 0.97, 0.01]]))

    def left(**options) -> list[list[int]]:
        kept = _left(logits, SamplingConfig(temperature=1.0, **options))
        return [np.flatnonzero(row > -np.inf).tolist() for row in kept]

    assert left(top_k=1) == left(top_p=0.01) == [[1], [2]]
    assert left(top_k=0) == left(top_k=9) == left(top_p=1.0) == [[0, 1, 2, 3]] * 2
    assert left(top_p=0.6) == [[0, 1, 3], [2]]  # equal ones stay or go together
    assert left(top_p=0.95) == [[0, 1, 2, 3], [2]]


def test_top_p_is_of_what_top_k_left():
    shares = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1], [0.5, 0.2, 0.2, 0.1]]))
    few = SamplingConfig(temperature=1.0, top_k=3, top_p=0.8)
    found = jax.nn.softmax(_left(shares, few)), jax.nn.softmax(_left(shares, replace(few, top_k=2, top_p=0.7)))
    np.testing.assert_allclose(found[0][0], [0.67, 0.33, 0, 0], atol=0.005)
    np.testing.assert_allclose(found[1][1], [0.56, 0.22, 0.22, 0], atol=0.005)


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    count, temperature = 20_000, 0.7
    keys, places = jax.random.key_data(jax.random.split(jax.random.key(3), count)), jnp.full(count, 5)
    drawn, logprobs = _draw(jnp.tile(logits, (count, 1)), keys, places, SamplingConfig(temperature))
    found = np.bincount(drawn, minlength=4) / count
    expected = np.asarray(jax.nn.softmax(logits / temperature))
    assert (abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / count)).all()  # four standard errors
    np.testing.assert_allclose(logprobs, logits[drawn], atol=1e-6)


def test_a_chance_is_what_the_whole_vocabulary_gives_to_a_token(talker: Model, prompts):
    prompt, written = prompts[4], [9, 7, 8]
    found = chances(talker.graph, talker.params, prompt, written, count=3)
    shares = np.asarray(jax.nn.softmax(uncached_logits(talker, prompt + written)[len(prompt) - 1 : -1]))
    assert [one.token for one in found] == written
    for one, row in zip(found, shares, strict=True):
        np.testing.assert_allclose(one.probability, row[one.token], rtol=1e-4)
        assert [token for token, _ in one.likeliest] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([share for _, share in one.likeliest], np.sort(row)[::-1][:3], rtol=1e-4)


def test_a_likelihood_is_that_of_decoding_and_no_neighbour_changes_it(talker: Model, prompts):
    prompts = [prompts[0], prompts[4], prompts[0][:2]]  # of one padded width, the answers among them
    written = [answer.tokens[: 3 + place] for place, answer in enumerate(answered(talker, prompts))]
    found = likelihoods(talker.graph, talker.params, prompts, written, batch_size=4)
    for prompt, tokens, told in list(zip(prompts, written, found, strict=True))[:2]:
        logits = uncached_logits(talker, prompt + tokens)[len(prompt) - 1 : -1]
        expected = jax.nn.log_softmax(logits)[jnp.arange(len(tokens)), jnp.array(tokens)].sum()
        np.testing.assert_allclose(told.logprob, expected, rtol=1e-4)
        assert told.greedy
    other = [[*tokens[:-1], (tokens[-1] + 1) % talker.config.vocab_size] for tokens in written]
    assert not any(told.greedy for told in likelihoods(talker.graph, talker.params, prompts, other, batch_size=4))


LANES = 2 * LANE_ROWS  # the least rows that are divided among two lanes


def test_f49_an_answer_does_not_depend_on_the_lane_that_writes_it(talker: Model):
    source = np.random.default_rng(5)
    prompts = [source.integers(6, talker.config.vocab_size, 3 + number % 40).tolist() for number in range(50)]
    ends = [answer.tokens[-1] for answer in answered(talker, prompts)[::10]]
    told: list[int] = []
    together = answered(talker, prompts, *ends, batch_size=LANES, on_done=told.append)
    assert sum(told) == len(prompts)
    assert answered(talker, prompts[::-1], *ends, batch_size=LANES) == together[::-1]
    assert [answered(talker, [prompt], *ends, batch_size=LANES)[0] for prompt in prompts[:3]] == together[:3]
    assert tokens_of(answered(talker, prompts, *ends)) == tokens_of(together)


def test_lanes_work_side_by_side_in_threads_of_their_own():
    both = Barrier(2, timeout=30)  # each waits for the other

    def lane(name: str) -> Iterator[str]:
        both.wait()
        yield f"{name} {threading.current_thread() is threading.main_thread()}"

    assert sorted(_side_by_side([lane("a"), lane("b")])) == ["a False", "b False"]
    assert list(_side_by_side([iter("one")])) == ["o", "n", "e"]


def test_where_one_lane_fails_the_others_end_and_its_error_is_told():
    def failing() -> Iterator[int]:
        yield 1
        raise RetraceError("out of memory")

    with pytest.raises(RetraceError, match="out of memory"):
        list(_side_by_side([failing(), count()]))  # the second would go on for ever


def test_whoever_stops_listening_ends_the_lanes():
    found = _side_by_side([count(), count()])
    next(found)
    found.close()  # returns, as their threads have ended
