"""What a training file would do: lengths and trained tokens counted, what does not fit named before training."""

import json
from collections import Counter
from collections.abc import Iterator

import pytest

from lib.data import validation as module
from lib.data.renderer import Example, encode_example, render_example
from lib.data.tokenizer import Tokenizer, train_tokenizer
from lib.data.validation import (
    Lengths,
    encode_all,
    lengths_record,
    measure_lengths,
    recorded_lengths,
    spread,
    too_long,
)
from lib.errors import RequestError
from lib.tasks import high_card_duel


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["sum of 2 and 2\nAnswer: 4"])


def toys(*words: int) -> list[Example]:
    """Examples whose conversations grow with the number of words."""
    return [Example(f"t{n}", "2 " * n, "Answer: 4") for n in words]


def test_lengths_and_trained_tokens_are_those_of_the_encoded_examples(tokenizer: Tokenizer):
    examples = toys(1, 5, 3, 5)
    encoded = [encode_example(example, tokenizer) for example in examples]
    found = measure_lengths(iter(examples), tokenizer)
    assert found.counts == Counter(len(item.tokens) for item in encoded) and list(found.counts) == sorted(found.counts)
    assert found.examples == 4 and found.tokens == sum(len(item.tokens) for item in encoded) == found.mean * 4
    assert found.trained_tokens == sum(sum(item.loss_mask) for item in encoded)


def test_batches_of_examples_change_no_length(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    examples = toys(*range(1, 30)) + toys(29, 29)
    whole = measure_lengths(examples, tokenizer)
    for characters in (1, 40, 500):
        monkeypatch.setattr(module, "BATCH_CHARACTERS", characters)
        assert measure_lengths(examples, tokenizer) == whole
    assert [one.id for one in whole.longest[:4]] == ["t29", "t29", "t29", "t28"]
    assert len(whole.longest) == module.MAX_LONGEST


def test_no_more_examples_are_held_at_once_than_a_batch(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 100)
    read, held = [0], []
    monkeypatch.setattr(Tokenizer, "count_tokens", lambda self, texts: held.append(read[0]) or [0] * len(texts))

    def reading() -> Iterator[Example]:
        for example in toys(*[10] * 12):  # of 29 characters each
            read[0] += 1
            yield example

    measure_lengths(reading(), tokenizer)
    assert held == [4, 4, 8, 8, 12, 12]


def test_lengths_of_short_texts_are_remembered_and_no_long_text_is_kept(tokenizer: Tokenizer):
    known: dict[str, int] = {}
    texts = ["2 and 2", "2 " * 10_000, "2 and 2"]
    assert [module._count_tokens(texts, tokenizer, known) for _ in range(2)] == [tokenizer.count_tokens(texts)] * 2
    assert list(known) == ["2 and 2"]


def test_percentiles_are_by_nearest_rank_and_what_would_not_fit_is_counted():
    found = Lengths({10: 90, 20: 6, 30: 3, 500: 1}, 0, [])
    assert [found.percentile(percent) for percent in (0, 50, 90, 91, 96, 97, 99, 100)] == [
        10, 10, 10, 20, 20, 30, 30, 500,
    ]  # fmt: skip
    assert [found.over(length) for length in (500, 499, 30, 29, 9)] == [0, 1, 1, 4, 100]


@pytest.mark.parametrize("most", [1, 2, 3, 7, 40])
def test_bands_hold_every_example_once_and_have_equal_widths(most: int):
    counts = {3: 1, 4: 2, 9: 1, 30: 5}
    found = Lengths(counts, 0, []).bands(most)
    assert len(found) <= most and len({high - low for low, high in found}) == 1
    assert [low for low, _ in found][1:] == [high + 1 for _, high in found][:-1]
    for (low, high), count in found.items():
        assert count == sum(one for length, one in counts.items() if low <= length <= high)
    assert sum(found.values()) == 9


def test_what_a_manifest_keeps_is_read_back_as_it_was(tokenizer: Tokenizer):
    found = measure_lengths(toys(1, 5, 3, 5), tokenizer)
    record = lengths_record(found, "trace_sft_v1")
    assert recorded_lengths(json.loads(json.dumps(record))) == found
    assert (record["recipe"], record["min"], record["max"]) == ("trace_sft_v1", min(found.counts), max(found.counts))
    assert record["longest"][0] == {"id": "t5", "tokens": record["max"]} and record["p95"] == record["max"]


def test_what_would_not_fit_is_counted_and_the_longest_are_named(tokenizer: Tokenizer):
    found = measure_lengths(toys(1, 9, 2, *range(20, 40)), tokenizer)
    longest = found.longest[0]
    assert too_long(found, longest.tokens) == ""
    assert too_long(found, longest.tokens - 1) == (
        f"1 of 23 examples are longer than model.max_length {longest.tokens - 1}: t39 ({longest.tokens} tokens); "
        f"raise model.max_length to {longest.tokens} or leave them out of the dataset"
    )
    every = too_long(found, 1)
    assert every.startswith(f"23 of 23 examples are longer than model.max_length 1: t39 ({longest.tokens} tokens), t38")
    assert "t35" in every and "t34" not in every and "and 18 more" in every


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
def test_samples_are_spread_evenly_over_the_file(total: int, samples: int, found):
    assert list(spread(total, samples)) == list(found)
