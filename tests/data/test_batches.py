"""Batches: a pure function of (seed, step) that takes each example once an epoch and never cuts one."""

import numpy as np
import pytest

from lib.data.batches import batch_indices, batch_length, make_batch
from lib.data.renderer import EncodedExample


def toy(*tokens: int, prompt: int = 1) -> EncodedExample:
    return EncodedExample(list(tokens), [index >= prompt for index in range(len(tokens))])


@pytest.mark.parametrize("n, batch_size", [(5, 2), (7, 3), (4, 4), (3, 8), (1, 1), (10, 7)])
def test_each_epoch_takes_each_example_once(n: int, batch_size: int):
    stream = np.concatenate([batch_indices(n, batch_size, seed=3, step=step) for step in range(20)])
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_batch_is_a_pure_function_of_seed_and_step():
    forwards = [batch_indices(9, 4, 1, step).tolist() for step in range(6)]
    backwards = [batch_indices(9, 4, 1, step).tolist() for step in reversed(range(6))]
    assert forwards == backwards[::-1]
    assert forwards != [batch_indices(9, 4, 2, step).tolist() for step in range(6)]


def test_epochs_are_shuffled_apart():
    epochs = [tuple(batch_indices(20, 20, 0, step)) for step in range(4)]
    assert len(set(epochs)) == 4 and tuple(range(20)) not in epochs


def test_the_order_for_a_seed_never_changes():
    # A run of one release must be reproducible by the next. The last batch goes over into the second epoch.
    assert [batch_indices(5, 2, 0, step).tolist() for step in range(3)] == [[2, 4], [3, 0], [1, 1]]


def test_rows_are_shifted_by_one_and_padded_on_the_right():
    batch = make_batch([toy(2, 4, 105, 108, 5, prompt=3), toy(2, 7)], length=6)
    assert batch.tokens.tolist() == [[2, 4, 105, 108, 0, 0], [2, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[4, 105, 108, 5, 0, 0], [7, 0, 0, 0, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.valid.astype(int).tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert [field.dtype.name for field in batch] == ["int32", "int32", "bool", "bool"]


def test_every_trained_token_of_an_example_is_a_target_once():
    examples = [toy(*range(2, 12), prompt=4), toy(2, 3, 4, prompt=2)]
    batch = make_batch(examples, length=16)
    for row, example in enumerate(examples):
        trained = [token for token, mask in zip(*example, strict=True) if mask]
        assert batch.targets[row][batch.loss_mask[row]].tolist() == trained


def test_an_example_that_is_too_long_is_refused_never_cut():
    make_batch([toy(*range(9))], length=8)
    with pytest.raises(ValueError, match="example 1 has 9 tokens to read, the batch has room for 8"):
        make_batch([toy(1, 2), toy(*range(10))], length=8)


def test_the_length_is_what_the_longest_needs_rounded_up():
    assert [batch_length([toy(1, 2), toy(*range(n))]) for n in (2, 9, 10, 17)] == [8, 8, 16, 16]
