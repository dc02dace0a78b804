"""What a training file would do, told before it is trained on: shape, template, lengths, trained tokens.

report = validate_examples(examples, tokenizer, max_length=128)
report.trained_tokens, report.too_long      # 123123, []
"""

from statistics import mean
from typing import NamedTuple

from lib.data.renderer import EncodedExample, Encoder, Example, encode_example
from lib.errors import RequestError

MAX_SHOWN = 5


class TooLong(NamedTuple):
    """An example that does not fit, by id, with its length in tokens."""

    id: str
    tokens: int


class Validation(NamedTuple):
    """Lengths are tokens of the whole conversation, `<bos>` and `<end_of_turn>` counted."""

    examples: int
    checked: int
    max_length: int
    shortest: int
    mean: float
    longest: int
    tokens: int
    trained_tokens: int
    too_long: list[TooLong]


def validate_examples(examples: list[Example], tokenizer: Encoder, max_length: int, samples: int = 0) -> Validation:
    """Lengths and trained tokens of `samples` examples, spread evenly over the file; 0 means all."""
    chosen = spread(examples, samples)
    encoded = [encode_example(example, tokenizer) for example in chosen]
    lengths = [len(example.tokens) for example in encoded]
    return Validation(
        examples=len(examples),
        checked=len(chosen),
        max_length=max_length,
        shortest=min(lengths),
        mean=mean(lengths),
        longest=max(lengths),
        tokens=sum(lengths),
        trained_tokens=sum(sum(example.loss_mask) for example in encoded),
        too_long=_too_long(chosen, encoded, max_length),
    )


def encode_all(examples: list[Example], tokenizer: Encoder, max_length: int) -> list[EncodedExample]:
    """Every example as tokens and mask. Raises RequestError, naming them, where any is longer than `max_length`:
    cutting one would drop its answer, or leave nothing of it to train on."""
    encoded = [encode_example(example, tokenizer) for example in examples]
    if found := _too_long(examples, encoded, max_length):
        raise RequestError(describe_too_long(found, len(examples), max_length))
    return encoded


def describe_too_long(found: list[TooLong], total: int, max_length: int) -> str:
    named = ", ".join(f"{one.id} ({one.tokens} tokens)" for one in found[:MAX_SHOWN])
    more = f" and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
    return (
        f"{len(found)} of {total} examples are longer than model.max_length {max_length}: {named}{more}; "
        f"raise model.max_length to {max(one.tokens for one in found)} or leave them out of the dataset"
    )


def spread(examples: list[Example], samples: int) -> list[Example]:
    """`samples` of the examples at even distances, the first among them; all of them for 0."""
    if samples <= 0 or samples >= len(examples):
        return examples
    return [examples[index * len(examples) // samples] for index in range(samples)]


def _too_long(examples: list[Example], encoded: list[EncodedExample], max_length: int) -> list[TooLong]:
    return [
        TooLong(example.id, len(item.tokens))
        for example, item in zip(examples, encoded, strict=True)
        if len(item.tokens) > max_length
    ]
