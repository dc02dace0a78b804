"""Training batches as a pure function of (seed, step): no iterator, so nothing to save and nothing to replay.

    batches = Batches(examples, config.training, max_length=512)
    batches.rows(7)     # [[12], [3], [40], [8]]: which examples stand in each row of step 7
    batches[7]          # the same as arrays, Batch of [A, B, T]

The examples are shuffled anew for each epoch by a generator seeded with (seed, epoch), and laid into rows:

    padded      one example a row, and all rows as long as the longest example needs
    bucketed    one example a row; a step has examples of like length, and its rows are no longer than it needs
    packed      rows of `max_length`, each filled with whole examples that do not see one another

Step s takes the next A × B rows, going over into the following epoch where one runs out.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lib.config import TrainingConfig
from lib.data.renderer import EncodedExample

MULTIPLE = 8  # lengths are rounded up to it, so that one compiled step serves many
BUCKETS = 8  # so many steps are compiled, at most, for rows of several lengths
STRETCH = 50  # steps among whose rows those of like length are looked for


class Batch(NamedTuple):
    """Rows of equal length, ready for the step: tokens and segments [..., B, T].

    tokens     2 4 105 108   2 9 105   0      what the model reads, here two examples and padding
    targets    4 105 108 5   9 105 7   0      the token after each
    loss_mask  F F T T       F F T     F      True where the target is trained on
    segments   1 1 1 1       2 2 2     0      which example of the row it is; 0 on padding

    Targets and mask may lack the first places, where no row is trained on: they are of the last of the T.
    """

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32
    loss_mask: np.ndarray  # bool
    segments: np.ndarray  # int32


class Batches:
    """The batches of a training, each of which depends on the examples, the settings and its step alone."""

    def __init__(
        self,
        examples: list[EncodedExample],
        config: TrainingConfig,
        max_length: int,
        shape: tuple[int, int] | None = None,  # A, B, where many devices take the rows of an update in other parts
    ):
        self.examples, self.config = examples, config
        self.shape = shape or (config.grad_accum_steps, config.per_device_batch_size)
        self.lengths = [len(example.tokens) - 1 for example in examples]
        self.length = row_length(1 + max(self.lengths), config.batching, max_length)
        spread = max(1, self.length - min(self.lengths))
        self.apart = _rounded(spread, MULTIPLE * BUCKETS) // BUCKETS  # so far the lengths of buckets lie apart
        self.untrained = untrained(examples)
        self.per_step = config.grad_accum_steps * config.per_device_batch_size
        self.per_epoch = len(pack(self.lengths, self.length)) if config.batching == "packed" else len(examples)
        self._epoch = lru_cache(maxsize=2)(self._epoch)

    def rows(self, step: int) -> list[list[int]]:
        """Which examples stand in each row of a step, the first of which is 0."""
        places = range(step * self.per_step, (step + 1) * self.per_step)
        return [self._epoch(place // self.per_epoch)[place % self.per_epoch] for place in places]

    def tokens(self, step: int) -> int:
        """How many are read in a step, padding not counted."""
        return sum(self.lengths[index] for row in self.rows(step) for index in row)

    def __getitem__(self, step: int) -> Batch:
        return self.part(step, slice(None))

    def part(self, step: int, places: slice) -> Batch:
        """Of each micro-batch of a step the rows at these places, [A, b, T]: what one of several processes makes."""
        rows, length = self.rows(step), self.length
        if self.config.batching == "bucketed":
            longest = max(self.lengths[index] for row in rows for index in row)
            length -= min((length - longest) // self.apart, BUCKETS - 1) * self.apart
        A, B = self.shape
        chosen = [row for start in range(0, A * B, B) for row in rows[start : start + B][places]]
        flat = make_batch([[self.examples[index] for index in row] for row in chosen], length, self.untrained)
        return Batch(*(field.reshape(A, -1, field.shape[-1]) for field in flat))

    def _epoch(self, epoch: int) -> list[list[int]]:
        """All rows of an epoch, in the order in which they are trained on."""
        random = np.random.default_rng([self.config.seed, epoch])
        order = random.permutation(len(self.examples)).tolist()
        if self.config.batching == "packed":
            rows = pack([self.lengths[index] for index in order], self.length)
            return [[order[place] for place in rows[row]] for row in random.permutation(len(rows))]
        if self.config.batching == "bucketed":
            order = self._bucketed(order, -(epoch * len(order)) % self.per_step, random)
        return [[index] for index in order]

    def _bucketed(self, order: list[int], begun: int, random: np.random.Generator) -> list[int]:
        """The order changed so that steps are of like length; the first `begun` fill the step of the last epoch."""
        size, steps = self.per_step, []
        for start in range(begun, len(order), STRETCH * size):
            stretch = sorted(order[start : start + STRETCH * size], key=self.lengths.__getitem__)
            steps += [stretch[at : at + size] for at in range(0, len(stretch), size)]
        left = steps.pop() if steps and len(steps[-1]) < size else []
        mixed = [index for step in random.permutation(len(steps)) for index in steps[step]]
        return order[:begun] + mixed + left


def pack(lengths: list[int], room: int) -> list[list[int]]:
    """Rows of at most `room`, best fit decreasing: the longest first, each where it leaves least.

    pack([5, 3, 6, 2, 4], room=8)     # [[2, 3], [0, 1], [4]]
    """
    rows: list[list[int]] = []
    waiting: dict[int, list[list[int]]] = {}  # rows by the room that is left in them
    left_over = 0  # the same as bits: bit r is set where a row with room for r waits
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if fitting := left_over >> lengths[index]:
            least = lengths[index] + (fitting & -fitting).bit_length() - 1
            row = waiting[least].pop()
            if not waiting[least]:
                left_over ^= 1 << least
        else:
            least, row = room, []
            rows.append(row)
        row.append(index)
        least -= lengths[index]
        waiting.setdefault(least, []).append(row)
        left_over |= 1 << least
    return rows


def untrained(examples: Iterable[EncodedExample]) -> int:
    """How many places every row begins with where nothing is trained on, as all prompts are at least as long."""
    return (min(example.loss_mask.index(True, 1) for example in examples) - 1) // MULTIPLE * MULTIPLE


def make_batch(rows: list[list[EncodedExample]], length: int, untrained: int = 0) -> Batch:
    """The rows, each with its examples one behind the other, padded on the right to `length` inputs.

    Targets and mask are left out of the first `untrained` places. Raises ValueError where an example does not fit:
    what is too long is refused before training, never cut.
    """
    shape = (len(rows), length)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    loss_mask, segments = np.zeros(shape, bool), np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            place = slice(start, start := start + len(example.tokens) - 1)
            if start > length:
                raise ValueError(f"row {number} has {start} tokens to read, the batch has room for {length}")
            tokens[number, place] = example.tokens[:-1]
            targets[number, place] = example.tokens[1:]
            loss_mask[number, place] = example.loss_mask[1:]
            segments[number, place] = segment
    return Batch(tokens, targets[:, untrained:], loss_mask[:, untrained:], segments)


def row_length(tokens: int, batching: str = "padded", max_length: int = 0) -> int:
    """Inputs in the longest row, where so many tokens, the last of them only a target, are the longest example."""
    return _rounded((max_length if batching == "packed" else tokens) - 1, MULTIPLE)


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
