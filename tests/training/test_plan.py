"""The plan of a training: what it says is what there is, and one that cannot fit is refused with what would."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from lib.config import Config, DatasetConfig, LoraConfig, ModelConfig, ParallelismConfig, TrainingConfig
from lib.errors import RequestError
from lib.model.gemma import GemmaConfig
from lib.training import plan
from lib.training.optimizer import make_optimizer
from lib.training.plan import Plan, check_plan, compiled_step, free_in_groups, micro_batches, shapes_of

SHAPE = GemmaConfig(2048, num_layers=2, embed_dim=128, hidden_dim=256, num_heads=4, num_kv_heads=1, head_dim=32)
ONE_LAYER = replace(SHAPE, num_layers=1)
LENGTH = 128
CONFIG = Config("toy", DatasetConfig("toy", "v1"), training=TrainingConfig(num_steps=4, per_device_batch_size=4))
LORA = replace(CONFIG, training=replace(CONFIG.training, lora=LoraConfig(rank=4)))

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def planned(config: Config, shape: GemmaConfig = SHAPE) -> Plan:
    return compiled_step(config, shapes_of(shape, config), LENGTH)[1]


@pytest.fixture(scope="module")
def whole(quickly_compiled: None) -> Plan:
    return planned(CONFIG)


def test_a_plan_counts_the_weights_and_the_bytes_that_there_are(whole: Plan):
    weights = 2048 * 128 + 128 + 2 * (2 * 128 * 128 + 2 * 128 * 32 + 3 * 128 * 256 + 2 * 128)
    assert whole.parameters == whole.trained == weights and whole.weights == 4 * weights
    assert whole.optimizer == 8 * weights + 8  # mean and square of each, and two counts of steps
    assert whole.peak > 2 * whole.weights + whole.optimizer + whole.activations > whole.activations > whole.weights


def test_with_lora_the_adapters_alone_are_trained_and_have_an_optimizer(whole: Plan):
    found = planned(LORA)
    adapters = 2 * 4 * (2 * 128 + 2 * (128 + 32) + 2 * 128)
    assert found.trained == adapters == found.parameters - whole.parameters and found.optimizer == 8 * adapters + 8
    assert found.peak < whole.peak


def test_a_frozen_base_is_kept_in_the_dtype_that_is_computed_in():
    narrow = planned(replace(LORA, model=ModelConfig(dtype="bfloat16")))
    assert narrow.weights == 2 * narrow.parameters + 2 * narrow.trained


@pytest.mark.parametrize("changes", [{"remat": True}, {"optimizer": "adafactor"}, {"per_device_batch_size": 2}])
def test_what_saves_memory_is_seen_to_save_it(changes: dict, whole: Plan):
    assert planned(replace(CONFIG, training=replace(CONFIG.training, **changes))).peak < 0.97 * whole.peak


def test_logits_that_are_not_made_need_no_memory(whole: Plan):
    half = compiled_step(CONFIG, shapes_of(SHAPE, CONFIG), LENGTH, LENGTH // 2)[1]
    logits = 4 * LENGTH * SHAPE.vocab_size * 4
    assert whole.activations - half.activations > logits // 2


def test_a_plan_that_cannot_fit_is_refused_with_settings_that_do(whole: Plan, monkeypatch: pytest.MonkeyPatch):
    check_plan(whole, SHAPE, CONFIG, LENGTH)
    monkeypatch.setattr(plan, "_room", lambda mesh: int(0.8 * whole.peak))
    with pytest.raises(RequestError, match=r"training needs .* and there are .* This would fit") as refused:
        check_plan(planned(CONFIG), SHAPE, CONFIG, LENGTH)
    settings = dict(re.findall(r"--set 'training\.(\w+)=(\w+)'", str(refused.value)))
    kinds = {"true": True, "adafactor": "adafactor"}
    changes = {name: kinds[value] if value in kinds else int(value) for name, value in settings.items()}
    smaller = replace(CONFIG, training=replace(CONFIG.training, **changes))
    assert planned(smaller).peak <= 0.8 * whole.peak
    training = smaller.training
    assert training.per_device_batch_size * training.grad_accum_steps == 4


def test_adapters_that_are_asked_for_are_kept_in_what_would_fit(monkeypatch: pytest.MonkeyPatch):
    mine = replace(LORA, training=replace(LORA.training, remat=True, per_device_batch_size=1))
    asked = dict((" ".join(settings), changed) for changed, settings in plan._smaller(mine))
    narrow = asked["'model.dtype=bfloat16'"]
    assert narrow == replace(mine, model=replace(mine.model, dtype="bfloat16")) == list(asked.values())[-1]
    assert not any("lora" in settings or "optimizer" in settings for settings in asked)
    monkeypatch.setattr(plan, "_room", lambda mesh: 1000)
    with pytest.raises(RequestError, match=r"nor model\.dtype=bfloat16, would fit; take a smaller model"):
        check_plan(planned(mine, ONE_LAYER), ONE_LAYER, mine, LENGTH)


def test_the_limit_of_a_container_or_a_job_is_less_than_the_machine_has(tmp_path: Path):
    """What systemd, Docker and Slurm write, in both versions of control groups."""
    member, job, old = tmp_path / "cgroup", tmp_path / "groups" / "job", tmp_path / "groups" / "memory" / "docker"
    assert free_in_groups(member, tmp_path) == []  # where there are none
    (job / "step").mkdir(parents=True)
    old.mkdir(parents=True)
    for name, said in {"max": "1000\n", "current": "400\n", "stat": "anon 1\ninactive_file 100\n"}.items():
        (job / f"memory.{name}").write_text(said)
        (job / "step" / f"memory.{name}").write_text("max\n" if name == "max" else said)
    for name, said in {"limit_in_bytes": "50\n", "usage_in_bytes": "90\n", "stat": "total_inactive_file 0\n"}.items():
        (old / f"memory.{name}").write_text(said)
    member.write_text("9:name=systemd:/\n0::/job/step\n")
    assert free_in_groups(member, tmp_path / "groups") == [700]
    member.write_text("4:memory:/docker\n0::/\n")
    assert free_in_groups(member, tmp_path / "groups") == [0]


def test_devices_that_stand_for_cores_share_the_memory_of_their_host(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "free_in_groups", lambda *files: [])
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    mesh = SimpleNamespace(size=4, local_devices=["a", "b"])
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node1:1234")
    assert (plan._room(None), plan._room(mesh)) == (1000, 500)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    assert plan._room(mesh) == 250


def test_where_nothing_would_fit_it_says_so(monkeypatch: pytest.MonkeyPatch):
    alone = replace(CONFIG, training=replace(CONFIG.training, per_device_batch_size=1))
    monkeypatch.setattr(plan, "_room", lambda mesh: 1000)
    with pytest.raises(RequestError, match="take a smaller model"):
        check_plan(planned(alone, ONE_LAYER), ONE_LAYER, alone, LENGTH)


def test_adafactor_keeps_hardly_any_state_of_a_matrix():
    matrix = {"w": jnp.zeros((512, 512))}

    def size(optimizer: str) -> int:
        state = make_optimizer(replace(CONFIG.training, optimizer=optimizer))[0].init(matrix)
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    assert size("adamw") > 2 * 512**2 and size("adafactor") < 3 * 512


@pytest.mark.parametrize(
    "parallelism, expected",
    [
        ({}, (4, 8)),
        ({"tensor": 4}, (4, 8)),
        ({"data": 2}, (2, 16)),
        ({"data": 2, "fsdp": 4}, (1, 32)),
        ({"fsdp": 16}, (1, 32)),
    ],
)
def test_an_update_has_the_same_examples_on_any_devices_of_which_none_takes_more_rows(parallelism, expected):
    training = TrainingConfig(per_device_batch_size=8, grad_accum_steps=4)
    config = Config("x", DatasetConfig("x", "v1"), training=training, parallelism=ParallelismConfig(**parallelism))
    assert micro_batches(config) == expected
