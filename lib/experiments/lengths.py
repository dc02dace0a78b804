"""How long the examples of a dataset or of a training file are, by its own tokenizer or by a released one.

measured = measure("quickstart-v1", tokenizer="google/gemma-3-270m-it")
measured.lengths.over(512), measured.lengths.longest[0]      # 0, ExampleLength("7c2f…", 118)
"""

import os
from pathlib import Path
from typing import NamedTuple

from lib.data.dataset import list_datasets, load_dataset
from lib.data.export import read_examples, recipe_of
from lib.data.renderer import Example, render_example
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.data.validation import Lengths, measure_lengths, recorded_lengths, spread
from lib.errors import RequestError
from lib.experiments.stages import datasets
from lib.model.released import find_released


class Measured(NamedTuple):
    """How many examples there are, the lengths of those that were measured, and by which tokenizer."""

    examples: int
    lengths: Lengths
    by: str


def measure(name: str, tokenizer: str = "", samples: int = 0) -> Measured:
    """Lengths of the examples of a file, or of the dataset of this key with its reasoning; of `samples` of them.

    Read from the manifest where that holds those of all. Raises RequestError, and RetraceError for a damaged dataset.
    """
    there = list_datasets(datasets())
    if name not in there or Path(name).is_file():
        if "\0" not in name and not os.path.lexists(name):
            raise RequestError(
                f"{name}: No such file, nor a dataset of this name; datasets here: {', '.join(there) or 'none'}"
            )
        examples = read_examples(Path(name), recipe_of(Path(name)))
        learned, by = _tokenizer_of_file(Path(name), examples, tokenizer)
        chosen = (examples[place] for place in sorted(spread(len(examples), samples)))
        return Measured(len(examples), measure_lengths(chosen, learned), by)
    dataset = load_dataset(datasets(), name)
    count = dataset.manifest["trace_count"]
    recorded = recorded_lengths(dataset.manifest["lengths"])
    if not tokenizer and not samples and recorded.examples == count:
        return Measured(count, recorded, "by the tokenizer of the dataset")
    learned = tokenizer_of(tokenizer or str(dataset.tokenizer_file))
    by = f"by {tokenizer}" if tokenizer else "by the tokenizer of the dataset"
    traces = dataset.traces.spread(samples) if samples else dataset.traces
    return Measured(count, measure_lengths(map(render_example, traces), learned), by)


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, of the folder of a released model, or of its name on the hub.

    Of a name on the hub nothing but `tokenizer.json` is fetched. Raises RequestError.
    """
    if "\0" not in name and Path(name).is_file():
        return load_tokenizer(Path(name))
    return load_tokenizer(find_released(name, files=["tokenizer.json"]) / "tokenizer.json")


def _tokenizer_of_file(file: Path, examples: list[Example], tokenizer: str) -> tuple[Tokenizer, str]:
    from lib.experiments.training import tokenizer_beside  # here, as it imports jax

    return (tokenizer_of(tokenizer), f"by {tokenizer}") if tokenizer else tokenizer_beside(file, examples)
