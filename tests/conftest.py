"""What the tests share: a home of their own, and a toy dataset with a model small enough to train in a second."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings
from small import RUN, SmallRun

# Importing lib first fixes NPROC before any test imports jax.
from lib.config import DatasetConfig
from lib.data.dataset import Dataset, build_dataset
from lib.data.renderer import Example, render_example
from lib.data.selection import is_held_out
from lib.data.store import Store
from lib.files import repository_root
from lib.tasks import high_card_duel

settings.register_profile("unhurried", deadline=None)  # a busy machine is no fault of what is tested
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left with the longest of them at the end.

    pytest-xdist keeps to it with --no-loadscope-reorder; else files of many tests come first, however short.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything a test produces is kept; no test ever touches runs/."""
    monkeypatch.setenv("RETRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RETRACE_PROGRESS", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is fetched because of a test
    return tmp_path / "home"


@pytest.fixture
def gym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An interpreter with the stand-in of reasoning-gym."""
    from standin_gym import interpreter

    from lib.tasks import reasoning_gym

    found = interpreter(tmp_path)
    monkeypatch.setenv(reasoning_gym.VARIABLE, found)
    yield found
    reasoning_gym.worker(found).stop()


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


def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session that the workers of pytest-xdist share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same program is compiled by XLA once for all tests: compiling is nearly all of the time that they take."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(of_all_workers(tmp_path_factory) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module")
def quickly_compiled(compiled_once: None) -> Iterator[None]:
    """Without XLA's slower optimizations, of the machine code alone: what is computed is looked at, not its bits."""
    import jax

    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="module")
def processes_compile_once(compiled_once: None) -> Iterator[None]:
    """The same, for the processes that the tests of a module start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compile_once().items():
            patch.setenv(name, value)
        yield


def compile_once() -> dict[str, str]:
    """The environment of a process that finds what was compiled, and leaves what it compiles."""
    import jax

    return {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, compiled_once: None) -> SmallRun:
    """Done once, by the worker that asks first. No test changes it; one that must takes a copy of its home."""
    folder = of_all_workers(tmp_path_factory) / "small"
    home, printed = folder / "home", folder / "printed"
    with FileLock(f"{folder}.lock"):
        if not printed.exists():
            command = [sys.executable, "-m", "lib", *RUN, "--name", "toy"]
            environment = os.environ | compile_once() | {"RETRACE_HOME": str(home)}
            done = subprocess.run(command, cwd=repository_root(), env=environment, capture_output=True, text=True)
            assert done.returncode == 0 and not done.stderr, done.stderr
            printed.write_text(done.stdout)
    [made] = home.glob("*_toy")
    return SmallRun(printed.read_text(), made)


@pytest.fixture(scope="session")
def small_model(dataset: Dataset, compiled_once: None):
    """A Gemma with every part of the real one, one layer and 16 numbers a token; drawn by numpy, in no time."""
    return _toy_model(dataset, num_layers=1)


@pytest.fixture(scope="session")
def two_layer_model(dataset: Dataset):
    return _toy_model(dataset, num_layers=2)


def _toy_model(dataset: Dataset, num_layers: int):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lib.data.tokenizer import load_tokenizer
    from lib.model.gemma import Gemma, GemmaConfig
    from lib.model.weights import Model

    tokenizer, source = load_tokenizer(dataset.tokenizer_file), np.random.default_rng(0)
    config = GemmaConfig(tokenizer.vocab_size, num_layers, 16, hidden_dim=24, num_heads=4, num_kv_heads=2, head_dim=8)
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: jnp.asarray(source.normal(0, 0.2, leaf.shape), leaf.dtype), state)
    return Model("toy", config, graph, nnx.to_pure_dict(params), tokenizer)
