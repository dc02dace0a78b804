"""What a training file would do, told before it is trained on: lengths in tokens, and what would not fit.

    lengths = measure_lengths(map(render_example, traces), tokenizer)
    lengths.longest[0], lengths.percentile(95), lengths.over(128)     # ExampleLength("7c2f…", 118), 112, 0

No example is ever cut, as it would lose its answer: one that is longer than `max_length` is refused by training.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from heapq import nlargest
from typing import Any, NamedTuple

from lib.data.renderer import EncodedExample, Encoder, Example, encode_example, render_turns
from lib.data.store import SHORT
from lib.data.tokenizer import Tokenizer
from lib.errors import RequestError

MAX_SHOWN = 5
MAX_LONGEST = 10
BATCH_CHARACTERS = 1 << 20
MAX_KNOWN = 20_000  # texts whose length is remembered


class ExampleLength(NamedTuple):
    """An example by its id, and how many tokens it has."""

    id: str
    tokens: int


class Lengths(NamedTuple):
    """Tokens of whole conversations, `<bos>` and `<end_of_turn>` counted: how many examples have each length.

    `longest` are the longest MAX_LONGEST of them, the longest first.
    """

    counts: dict[int, int]
    trained_tokens: int
    longest: list[ExampleLength]

    @property
    def examples(self) -> int:
        return sum(self.counts.values())

    @property
    def tokens(self) -> int:
        return sum(length * count for length, count in self.counts.items())

    @property
    def mean(self) -> float:
        return self.tokens / self.examples

    def percentile(self, percent: int) -> int:
        """The least length that so many percent of the examples do not exceed (nearest rank); 0 is the shortest."""
        rank, seen = max(1, -(-percent * self.examples // 100)), 0
        for length, count in sorted(self.counts.items()):
            seen += count
            if seen >= rank:
                return length
        raise ValueError(f"percent: expected at most 100, got {percent}")

    def over(self, max_length: int) -> int:
        """How many examples would not fit."""
        return sum(count for length, count in self.counts.items() if length > max_length)

    def bands(self, most: int = 12) -> dict[tuple[int, int], int]:
        """At most so many bands of equal width, first and last length, and how many examples each holds.

        {3: 1, 4: 2, 9: 1} in at most 3 bands: {(3, 5): 3, (6, 8): 0, (9, 11): 1}
        """
        lowest, highest = self.percentile(0), self.percentile(100)
        width = -(-(highest - lowest + 1) // most)
        found = dict.fromkeys(range(lowest, highest + 1, width), 0)
        for length, count in self.counts.items():
            found[lowest + (length - lowest) // width * width] += count
        return {(low, low + width - 1): count for low, count in found.items()}


def measure_lengths(examples: Iterable[Example], tokenizer: Tokenizer) -> Lengths:
    """Lengths and trained tokens of the examples, read once and never held at once; on all cores."""
    counts: Counter[int] = Counter()
    trained, longest = 0, []
    known: dict[str, int] = {}
    for batch in _batches(examples):
        prompts = _count_tokens([render_turns(example.prompt) for example in batch], tokenizer, known)
        responses = _count_tokens([example.response for example in batch], tokenizer, known)
        found = [
            ExampleLength(example.id, 1 + prompt + response + 1)  # <bos>, <end_of_turn>
            for example, prompt, response in zip(batch, prompts, responses, strict=True)
        ]
        counts.update(one.tokens for one in found)
        trained += sum(responses) + len(batch)
        longest = nlargest(MAX_LONGEST, [*longest, *found], key=lambda one: one.tokens)
    return Lengths(dict(sorted(counts.items())), trained, longest)


def lengths_record(lengths: Lengths, recipe: str) -> dict[str, Any]:
    """The same as a manifest keeps it: `counts` has a bin for each length that occurs."""
    return {
        "recipe": recipe,
        "examples": lengths.examples,
        "tokens": lengths.tokens,
        "trained_tokens": lengths.trained_tokens,
        "min": lengths.percentile(0),
        "mean": lengths.mean,
        "p50": lengths.percentile(50),
        "p95": lengths.percentile(95),
        "p99": lengths.percentile(99),
        "max": lengths.percentile(100),
        "longest": [one._asdict() for one in lengths.longest],
        "counts": {str(length): count for length, count in lengths.counts.items()},
    }


def recorded_lengths(record: dict[str, Any]) -> Lengths:
    """The lengths that a manifest keeps."""
    counts = {int(length): count for length, count in record["counts"].items()}
    return Lengths(counts, record["trained_tokens"], [ExampleLength(**one) for one in record["longest"]])


def encode_all(examples: list[Example], tokenizer: Encoder, max_length: int) -> list[EncodedExample]:
    """Every example as tokens and mask. Raises RequestError, naming them, where any is longer than `max_length`:
    cutting one would drop its answer, or leave nothing of it to train on."""
    encoded = [encode_example(example, tokenizer) for example in examples]
    lengths = [ExampleLength(example.id, len(item.tokens)) for example, item in zip(examples, encoded, strict=True)]
    if found := [one for one in lengths if one.tokens > max_length]:
        raise RequestError(describe_too_long(found, len(found), len(examples), max_length))
    return encoded


def too_long(lengths: Lengths, max_length: int) -> str:
    """What training would say of the examples that would not fit; empty where all do."""
    found = [one for one in lengths.longest if one.tokens > max_length]
    return describe_too_long(found, lengths.over(max_length), lengths.examples, max_length) if found else ""


def check_lengths(lengths: Lengths, max_length: int) -> None:
    """Raises RequestError where an example is longer than `max_length`, as training would, before it is reached."""
    if problem := too_long(lengths, max_length):
        raise RequestError(problem)


def describe_too_long(found: list[ExampleLength], count: int, total: int, max_length: int) -> str:
    """One sentence on the `count` examples that would not fit, of which `found`, with the longest, are known by id."""
    named = ", ".join(f"{one.id} ({one.tokens} tokens)" for one in found[:MAX_SHOWN])
    more = f" and {count - MAX_SHOWN} more" if count > MAX_SHOWN else ""
    return (
        f"{count} of {total} examples are longer than model.max_length {max_length}: {named}{more}; "
        f"raise model.max_length to {max(one.tokens for one in found)} or leave them out of the dataset"
    )


def spread(total: int, samples: int) -> set[int] | range:
    """Places of `samples` of so many examples at even distances, the first among them; of all of them for 0."""
    if samples <= 0 or samples >= total:
        return range(total)
    return {index * total // samples for index in range(samples)}


def _count_tokens(texts: list[str], tokenizer: Tokenizer, known: dict[str, int]) -> list[int]:
    """Tokens of each text; what is `known`, as generated traces ask and say the same again, is not counted anew.

    A long text is not remembered, as it seldom recurs.
    """
    if len(known) > MAX_KNOWN:
        known.clear()
    new = list(dict.fromkeys(text for text in texts if text not in known))
    counts = known | dict(zip(new, tokenizer.count_tokens(new), strict=True))
    known.update((text, counts[text]) for text in new if len(text) <= SHORT)
    return [counts[text] for text in texts]


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """As many examples at a time as keep all cores busy, and memory within bounds."""
    batch, characters = [], 0
    for example in examples:
        batch.append(example)
        characters += len(example.prompt) + len(example.response)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
