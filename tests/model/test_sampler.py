"""Greedy decoding: the cache changes no token, and neither do the neighbours of a prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lib.model.gemma import causal_mask, positions
from lib.model.sampler import Completion, generate
from lib.model.weights import Model

NEVER = -1  # an id that no model writes
NEW = 12
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


def answered(model: Model, prompts: list[list[int]], *ends: int, batch_size: int = 4, **options) -> list[Completion]:
    return generate(model.graph, model.params, prompts, ends or (NEVER,), NEW, batch_size, **options)


def test_cached_decoding_is_the_uncached_loop(talker: Model, prompts, uncached):
    assert len(set(map(tuple, uncached))) == len(prompts) and all(len(set(answer)) > 2 for answer in uncached)
    assert answered(talker, prompts) == [Completion(answer, truncated=True) for answer in uncached]


def test_f49_an_answer_does_not_depend_on_its_neighbours(talker: Model, prompts):
    together = answered(talker, prompts)
    assert answered(talker, prompts, batch_size=1) == together
    assert answered(talker, prompts[::-1]) == together[::-1]
    assert answered(talker, [prompts[2]] * 5 + prompts[:1]) == [together[2]] * 5 + together[:1]
    assert [answered(talker, [prompt])[0] for prompt in prompts] == together


@pytest.mark.parametrize("place", [0, 5, NEW - 1])
def test_a_completion_ends_before_its_first_end_of_turn(talker: Model, prompts, uncached, place: int):
    # At NEW - 1 one answer ends with the last token that it may write: that is no truncation.
    end = next(answer[place] for answer in uncached if answer.index(answer[place]) == place)
    for answer, found in zip(uncached, answered(talker, prompts, end), strict=True):
        expected = Completion(answer[: answer.index(end)], False) if end in answer else Completion(answer, True)
        assert found == expected


def test_every_answer_is_told_once(talker: Model, prompts):
    told: list[int] = []
    answered(talker, prompts, on_done=told.append)
    assert told == [4, 2] and answered(talker, []) == []


def test_any_of_the_stop_tokens_ends_a_completion(talker: Model, prompts, uncached):
    """A released model may write <eos> where Gemma's template has <end_of_turn>."""
    first, second = uncached[0][4], uncached[0][2]
    end = min(uncached[0].index(first), uncached[0].index(second))
    found = answered(talker, prompts[:1], first, second)[0]
    assert found == Completion(uncached[0][:end], truncated=False)
