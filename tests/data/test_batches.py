"""Batches: a pure function of (seed, step) that takes each example once an epoch and never cuts one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.config import TrainingConfig
from lib.data.batches import Batches, make_batch, pack, row_length, untrained
from lib.data.renderer import EncodedExample


def toy(*tokens: int, prompt: int = 1) -> EncodedExample:
    return EncodedExample(list(tokens), [index >= prompt for index in range(len(tokens))])


def ragged(n: int, shortest: int = 3, longest: int = 40) -> list[EncodedExample]:
    lengths = np.random.default_rng(7).integers(shortest, longest + 1, n).tolist()
    return [toy(*range(100 * index, 100 * index + length)) for index, length in enumerate(lengths)]


def order(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    config = TrainingConfig(per_device_batch_size=batch_size, seed=seed)
    return [index for [index] in Batches([toy(1, 2)] * n, config, 8).rows(step)]


@pytest.mark.parametrize("n, batch_size", [(5, 2), (7, 3), (4, 4), (3, 8), (1, 1), (10, 7)])
def test_each_epoch_takes_each_example_once(n: int, batch_size: int):
    stream = np.concatenate([order(n, batch_size, seed=3, step=step) for step in range(20)])
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_batch_is_a_pure_function_of_seed_and_step():
    forwards = [order(9, 4, 1, step) for step in range(6)]
    backwards = [order(9, 4, 1, step) for step in reversed(range(6))]
    assert forwards == backwards[::-1]
    assert forwards != [order(9, 4, 2, step) for step in range(6)]


def test_epochs_are_shuffled_apart():
    epochs = [tuple(order(20, 20, 0, step)) for step in range(4)]
    assert len(set(epochs)) == 4 and tuple(range(20)) not in epochs


def test_the_order_for_a_seed_never_changes():
    # A run of one release must be reproducible by the next. The last batch goes over into the second epoch.
    assert [order(5, 2, 0, step) for step in range(3)] == [[2, 4], [3, 0], [1, 1]]


def test_rows_are_shifted_by_one_and_padded_on_the_right():
    batch = make_batch([[toy(2, 4, 105, 108, 5, prompt=3)], [toy(2, 7)]], length=6)
    assert batch.tokens.tolist() == [[2, 4, 105, 108, 0, 0], [2, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[4, 105, 108, 5, 0, 0], [7, 0, 0, 0, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert [field.dtype.name for field in batch] == ["int32", "int32", "bool", "int32"]


def test_every_trained_token_of_an_example_is_a_target_once():
    examples = [toy(*range(2, 12), prompt=4), toy(2, 3, 4, prompt=2)]
    batch = make_batch([examples], length=16)
    assert batch.segments.tolist() == [[1] * 9 + [2] * 2 + [0] * 5]
    for segment, example in enumerate(examples, 1):
        here = batch.segments[0] == segment
        assert batch.tokens[0][here].tolist() == example.tokens[:-1]
        trained = [token for token, mask in zip(*example, strict=True) if mask]
        assert batch.targets[0][here & batch.loss_mask[0]].tolist() == trained


@pytest.mark.parametrize("way", ["padded", "bucketed", "packed"])
def test_where_no_row_is_trained_on_there_are_no_targets(way: str):
    shapes = [(30, 20), (24, 18), (38, 33), (29, 17)]  # tokens, and how many of them are the prompt
    examples = [toy(*range(2, 2 + length), prompt=prompt) for length, prompt in shapes]
    batches = Batches(examples, TrainingConfig(batching=way, num_steps=1, per_device_batch_size=4), max_length=160)
    batch = batches[0]
    assert untrained(examples) == batches.untrained == 16  # seventeen tokens are no answer: sixteen are no target
    assert batch.targets.shape[-1] == batch.loss_mask.shape[-1] == batch.tokens.shape[-1] - 16
    trained = [token for example in examples for token, mask in zip(*example, strict=True) if mask]
    assert sorted(batch.targets[batch.loss_mask].tolist()) == sorted(trained * (4 if way == "packed" else 1))


def test_rows_that_are_trained_on_from_the_start_keep_all_targets():
    assert untrained([toy(2, 4, 105, prompt=0), toy(*range(40), prompt=30)]) == 0


def test_an_example_that_is_too_long_is_refused_never_cut():
    make_batch([[toy(*range(9))]], length=8)
    make_batch([[toy(*range(5)), toy(*range(5))]], length=8)
    for row in ([toy(*range(10))], [toy(*range(5)), toy(*range(6))]):
        with pytest.raises(ValueError, match="row 1 has 9 tokens to read, the batch has room for 8"):
            make_batch([[toy(1, 2)], row], length=8)


def test_the_length_is_what_the_longest_needs_rounded_up():
    assert [row_length(tokens) for tokens in (2, 9, 10, 17)] == [8, 8, 16, 16]
    assert row_length(9, "packed", 512) == 512 and row_length(9, "bucketed", 512) == 8


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_packed_rows_hold_each_example_once_and_no_more_than_their_room(lengths: list[int]):
    rows = pack(lengths, 30)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert filled[-1] <= 30
    assert len(filled) == 1 or filled[0] + filled[1] > 30  # no two rows could have been one


def test_the_longest_are_packed_first_each_where_it_leaves_least():
    assert pack([5, 3, 6, 2, 4], 8) == [[2, 3], [0, 1], [4]]


@pytest.mark.parametrize("batching", ["padded", "bucketed", "packed"])
@pytest.mark.parametrize("n, rows, accumulated", [(37, 4, 1), (50, 3, 2), (5, 4, 2), (400, 1, 1)])
def test_every_way_takes_each_example_once_an_epoch(batching: str, n: int, rows: int, accumulated: int):
    config = TrainingConfig(
        per_device_batch_size=rows, grad_accum_steps=accumulated, batching=batching, seed=3, num_steps=1
    )
    examples = ragged(n)
    batches = Batches(examples, config, max_length=100)
    stream = [index for step in range(-(-3 * n // (rows * accumulated))) for row in batches.rows(step) for index in row]
    epochs = [stream[epoch * n : (epoch + 1) * n] for epoch in range(len(stream) // n)]
    assert epochs and all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(epochs) < 2 or epochs[0] != epochs[1]
    assert [batches.rows(step) for step in (2, 0)] == [Batches(examples, config, 100).rows(step) for step in (2, 0)]
    batch = batches[1]
    assert batch.tokens.shape[:2] == (accumulated, rows) and batch.tokens.shape[2] <= batches.length
    read = [examples[index].tokens[:-1] for row in batches.rows(1) for index in row]
    assert batch.tokens[batch.segments > 0].tolist() == [token for tokens in read for token in tokens]


def test_buckets_and_packing_leave_less_padding_and_buckets_few_lengths():
    examples, useful = ragged(1000, 10, 200), {}
    for batching in ("padded", "bucketed", "packed"):
        config = TrainingConfig(per_device_batch_size=8, batching=batching)
        batches = Batches(examples, config, max_length=256)
        made = [batches[step] for step in range(30)]
        useful[batching] = sum(np.count_nonzero(batch.segments) for batch in made) / sum(
            batch.tokens.size for batch in made
        )
        assert len({batch.tokens.shape[-1] for batch in made}) <= (8 if batching == "bucketed" else 1)
    assert useful["padded"] < 0.6 and useful["bucketed"] > 0.85 and useful["packed"] > 0.97


@pytest.mark.parametrize("shortest, longest", [(97, 158), (97, 161), (10, 500), (50, 50), (2, 9)])
def test_lengths_of_buckets_are_spread_over_those_that_there_are(shortest: int, longest: int):
    examples = [toy(*range(length)) for length in range(shortest, longest + 1)] * 8
    batches = Batches(examples, TrainingConfig(per_device_batch_size=2, batching="bucketed"), max_length=512)
    made = [batches[step] for step in range(len(examples) // 2)]
    lengths = sorted({batch.tokens.shape[-1] for batch in made})
    assert len(lengths) == min(8, -(-(longest - 1) // 8) - (shortest - 1) // 8) and lengths[-1] == batches.length
    assert len(set(np.diff(lengths))) <= 1  # as far apart


@pytest.mark.parametrize("batching", ["padded", "bucketed", "packed"])
def test_the_parts_that_several_processes_make_are_the_batch(batching: str):
    config = TrainingConfig(per_device_batch_size=4, grad_accum_steps=2, batching=batching, seed=3)
    batches = Batches(ragged(30), config, 48, shape=(2, 4))
    for step in range(4):
        parts = [batches.part(step, slice(start, start + 2)) for start in (0, 2)]
        for whole, first, second in zip(batches[step], *parts, strict=True):
            np.testing.assert_array_equal(np.concatenate([first, second], axis=1), whole)
        assert batches.tokens(step) == np.count_nonzero(batches[step].segments)


def test_the_rows_of_an_update_are_the_same_however_they_are_dealt_out():
    config = TrainingConfig(per_device_batch_size=4, grad_accum_steps=2)
    dealt = [Batches(ragged(30), config, 48, shape)[1].tokens for shape in (None, (1, 8), (4, 2))]
    assert [tokens.shape[:2] for tokens in dealt] == [(2, 4), (1, 8), (4, 2)]
    for tokens in dealt:
        np.testing.assert_array_equal(tokens.reshape(8, -1), dealt[0].reshape(8, -1))
