"""Tunix as the trainer: the same losses as ours, gone on with where it stopped; where it is missing, a plain word."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import jax
import numpy as np
import pytest
from test_loop import CONFIG, Killed, killed_at, metrics

from lib.config import Config, LoraConfig, ModelConfig
from lib.data.dataset import Dataset
from lib.data.export import export_lines
from lib.data.renderer import Example, render_example
from lib.errors import RequestError
from lib.experiments.pipeline import preflight
from lib.experiments.training import check_training
from lib.model.weights import Model, base_model, load_model
from lib.training import trainers
from lib.training.loop import train

SHORT = replace(
    CONFIG.training, num_steps=8, learning_rate=1e-3, per_device_batch_size=1, grad_accum_steps=2, log_every=1,
    eval_every=4, checkpoint_every=3,
)  # fmt: skip
KINDS = {
    "adamw": SHORT,
    "adafactor": replace(SHORT, optimizer="adafactor"),
    "lora": replace(SHORT, lora=LoraConfig(rank=2)),
    "bfloat16 remat": replace(SHORT, remat=True),
}
LOSS_CLOSE = 1e-5  # of losses of 2 to 8 nats: the order of the sums differs, and eight updates carry it on


def config(kind: str, trainer: str) -> Config:
    dtype = "bfloat16" if "bfloat16" in kind else "float32"
    return replace(
        CONFIG, training=replace(KINDS[kind], trainer=trainer), model=ModelConfig(max_length=256, dtype=dtype)
    )


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trainers, "version", version)


def test_without_tunix_a_training_and_a_run_are_refused_with_what_installs_it(absent, small_model, examples, tmp_path):
    for refused in (
        lambda: train(small_model, examples, config("adamw", "tunix"), tmp_path / "out"),
        lambda: preflight(config("adamw", "tunix")),
    ):
        with pytest.raises(RequestError, match=r"not installed.*pip install --no-deps -r requirements-tunix.txt"):
            refused()
    assert not (tmp_path / "out").exists()


def test_without_tunix_a_dry_run_checks_all_the_rest(absent, dataset: Dataset, tmp_path: Path):
    (tmp_path / "data.jsonl").write_bytes(b"".join(export_lines(dataset.traces, "tunix_sft")))
    asked = replace(config("adamw", "tunix"), model=ModelConfig(max_length=512))
    lines = check_training(asked, tmp_path / "data.jsonl", tmp_path / "out")
    assert any(line.startswith("tokens: ") for line in lines) and lines[-1].startswith("not checked: the trainer; ")


# ---- where it is there: make test-tunix ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(dataset: Dataset) -> Model:
    return base_model("tiny", SHORT.seed, dataset.tokenizer_file)


@pytest.fixture(scope="module")
def ragged(dataset: Dataset, examples: list[Example]) -> list[Example]:
    """An answer with its reasoning and one without: micro-batches that weigh alike would be seen."""
    [trace] = (trace for trace in dataset.traces if trace.id == examples[0].id)
    return [render_example(trace), *examples[1:]]


@pytest.fixture(scope="module")
def trained(tiny: Model, ragged: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    def run(kind: str, trainer: str) -> Path:
        output = tmp_path_factory.mktemp("trained")
        train(tiny, ragged, config(kind, trainer), output)
        return output

    return run


@pytest.mark.tunix
@pytest.mark.parametrize("kind", KINDS)
def test_both_trainers_log_the_same_losses_and_end_with_the_same_model(kind: str, trained: Callable):
    ours, theirs = trained(kind, "builtin"), trained(kind, "tunix")
    close, weights_close = (LOSS_CLOSE, 1e-5) if "bfloat16" not in kind else (5e-3, 5e-3)
    for name in ("loss", "grad_norm"):
        pairs = [(own[name], other[name]) for own, other in zip(metrics(ours), metrics(theirs), strict=True)]
        apart = max(abs(own - other) / own for own, other in pairs)
        print(f"{kind}: {name} {pairs[0][0]:.3g} to {pairs[-1][0]:.3g}, apart by at most {apart:.1e} of it")
        assert apart <= close
    weights = [jax.tree.leaves(load_model(folder / "checkpoint-final").params) for folder in (ours, theirs)]
    apart = max(float(np.abs(own - other).max()) for own, other in zip(*weights, strict=True))
    print(f"{kind}: weights apart by at most {apart:.1e}")
    assert len(metrics(ours)) == 8 and apart < weights_close


@pytest.mark.tunix
@pytest.mark.parametrize("kind", ["adamw", "lora"])
def test_tunix_killed_and_gone_on_with_comes_to_the_same_model(kind: str, tiny, ragged, trained, tmp_path):
    with pytest.raises(Killed):
        train(tiny, ragged, config(kind, "tunix"), tmp_path, on_metrics=killed_at(5))
    again = train(tiny, ragged, config(kind, "tunix"), tmp_path)
    whole = load_model(trained(kind, "tunix") / "checkpoint-final")
    assert again.resumed_from == 3 and again.weights_sha256 == whole.weights_sha256
