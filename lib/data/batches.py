"""Training batches as a pure function of (seed, step): no iterator, so nothing to save and nothing to replay.

The examples are shuffled anew for each epoch by a generator seeded with (seed, epoch); step s takes the next
`batch_size` of them, going over into the following epoch where one runs out:

    batch_indices(n=5, batch_size=2, seed=0, step=2)   # the last of epoch 0 and the first of epoch 1
"""

from typing import NamedTuple

import numpy as np

from lib.data.renderer import EncodedExample


class Batch(NamedTuple):
    """Rows of equal length, ready for the step; everything [B, T].

    tokens     2 4 105 108 5 0        what the model reads
    targets    4 105 108 5 0 0        the token after each
    loss_mask  F F T T F F            True where the target is trained on
    valid      T T T T T F            False on padding
    """

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32
    loss_mask: np.ndarray  # bool
    valid: np.ndarray  # bool


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which of n examples make up the batch of this step: [batch_size] int64."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in set((places // n).tolist())}
    return np.array([epochs[int(place // n)][place % n] for place in places])


def make_batch(examples: list[EncodedExample], length: int, pad_id: int = 0) -> Batch:
    """The examples side by side, padded on the right to `length` inputs each.

    Raises ValueError where one does not fit: what is too long is refused before training, never cut.
    """
    shape = (len(examples), length)
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    loss_mask, valid = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, example in enumerate(examples):
        width = len(example.tokens) - 1
        if width > length:
            raise ValueError(f"example {row} has {width} tokens to read, the batch has room for {length}")
        tokens[row, :width] = example.tokens[:-1]
        targets[row, :width] = example.tokens[1:]
        loss_mask[row, :width] = example.loss_mask[1:]
        valid[row, :width] = True
    return Batch(tokens, targets, loss_mask, valid)


def batch_length(examples: list[EncodedExample], multiple: int = 8) -> int:
    """Room that the longest example needs, rounded up, so that one compiled step serves all."""
    return padded_length(max(len(example.tokens) for example in examples), multiple)


def padded_length(tokens: int, multiple: int = 8) -> int:
    """Room for an example of so many tokens, the last of which is only a target."""
    return -(-(tokens - 1) // multiple) * multiple
