"""What a training file would do: lengths and trained tokens counted, what does not fit named before training."""

import pytest

from lib.data.renderer import Example, encode_example, render_example
from lib.data.tokenizer import Tokenizer, train_tokenizer
from lib.data.validation import TooLong, encode_all, spread, validate_examples
from lib.errors import RequestError
from lib.tasks import high_card_duel


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["sum of 2 and 2\nAnswer: 4"])


def toys(*words: int) -> list[Example]:
    """Examples whose conversations grow with the number of words."""
    return [Example(f"t{n}", "2 " * n, "Answer: 4") for n in words]


def test_lengths_and_trained_tokens_are_those_of_the_encoded_examples(tokenizer: Tokenizer):
    examples = toys(1, 5, 3)
    encoded = [encode_example(example, tokenizer) for example in examples]
    report = validate_examples(examples, tokenizer, max_length=1_000)
    assert (report.examples, report.checked, report.max_length, report.too_long) == (3, 3, 1_000, [])
    assert (report.shortest, report.longest) == (len(encoded[0].tokens), len(encoded[1].tokens))
    assert report.tokens == sum(len(item.tokens) for item in encoded) == report.mean * 3
    assert report.trained_tokens == 3 * (len(tokenizer.encode("Answer: 4")) + 1)


def test_what_does_not_fit_is_named_with_its_length(tokenizer: Tokenizer):
    lengths = [len(encode_example(example, tokenizer).tokens) for example in toys(1, 9, 2)]
    report = validate_examples(toys(1, 9, 2), tokenizer, max_length=lengths[1] - 1)
    assert report.too_long == [TooLong("t9", lengths[1])]
    assert validate_examples(toys(1, 9, 2), tokenizer, max_length=lengths[1]).too_long == []


def test_f45_examples_that_would_lose_their_answer_are_refused_before_training(tokenizer: Tokenizer):
    examples = toys(*range(20, 27))
    longest = len(encode_example(examples[-1], tokenizer).tokens)
    with pytest.raises(RequestError) as caught:
        encode_all(examples, tokenizer, max_length=8)
    error = str(caught.value)
    assert error.startswith("7 of 7 examples are longer than model.max_length 8: t20 (")
    assert all(f"t{n} (" in error for n in range(20, 25)) and "and 2 more" in error and "t25" not in error
    assert f"raise model.max_length to {longest} or leave them out" in error
    assert len(encode_all(examples, tokenizer, max_length=longest)) == 7


def test_f45_every_encoded_example_has_tokens_to_train_on(tokenizer: Tokenizer):
    examples = [render_example(trace) for trace in high_card_duel.generate(20, 0)]
    for encoded in encode_all(examples, tokenizer, max_length=1_000):
        assert sum(encoded.loss_mask) > 1 and encoded.loss_mask[-1]


@pytest.mark.parametrize(
    "total, samples, found",
    [
        (10, 0, range(10)),
        (10, 5, [0, 2, 4, 6, 8]),
        (10, 3, [0, 3, 6]),
        (3, 5, range(3)),
        (4, 1, [0]),
        (3, -1, range(3)),
    ],
)
def test_samples_are_spread_evenly_over_the_file(total: int, samples: int, found, tokenizer: Tokenizer):
    examples = toys(*range(total))
    assert spread(examples, samples) == [examples[index] for index in found]
    assert validate_examples(examples, tokenizer, 1_000, samples).checked == len(found)
