"""What the tests share: a home of their own, and a toy dataset with a model small enough to train in a second."""

from pathlib import Path

import pytest

# Importing lib first fixes NPROC before any test imports jax.
from lib.config import Config, DatasetConfig, ModelConfig, TrainingConfig
from lib.data.dataset import Dataset, build_dataset, is_held_out
from lib.data.renderer import Example, render_example
from lib.data.store import Store
from lib.tasks import high_card_duel


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything a test produces is kept; no test ever touches runs/."""
    monkeypatch.setenv("RETRACE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Sixty episodes of High Card Duel, some of them held out."""
    folder = tmp_path_factory.mktemp("dataset")
    store = Store(folder / "store")
    store.add(high_card_duel.generate(60, seed=0, created_at="2025-01-01T00:00:00Z"))
    built = build_dataset(store, DatasetConfig("toy", "v1"), reserved={}, folder=folder / "datasets")
    assert 0 < built.manifest["split"]["held_out"] < 10
    return built


@pytest.fixture(scope="session")
def examples(dataset: Dataset) -> list[Example]:
    """Two that are trained on and one that is held out, answers alone, so that they are short."""
    rendered = [render_example(trace, "answer_sft_v1") for trace in dataset.traces]
    held = [example for example in rendered if is_held_out(example.prompt)]
    return [example for example in rendered if not is_held_out(example.prompt)][:2] + held[:1]


@pytest.fixture(scope="session")
def small_model(dataset: Dataset):
    """A Gemma with every part of the real one and 16 numbers a token, fresh weights of seed 0."""
    from flax import nnx

    from lib.data.tokenizer import load_tokenizer
    from lib.model.gemma import Gemma, GemmaConfig
    from lib.model.weights import Model

    tokenizer = load_tokenizer(dataset.tokenizer_file)
    config = GemmaConfig(tokenizer.vocab_size, 2, embed_dim=16, hidden_dim=24, num_heads=4, num_kv_heads=2, head_dim=8)
    graph, state = nnx.split(Gemma(config, nnx.Rngs(0)))
    return Model("toy", config, graph, nnx.to_pure_dict(state), tokenizer)


def toy_config(**training: float) -> Config:
    """A configuration whose training section is the given one."""
    return Config(
        "toy", DatasetConfig("toy", "v1"), model=ModelConfig(max_length=80), training=TrainingConfig(**training)
    )
