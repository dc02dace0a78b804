"""Two processes of two devices each compute what one device computes, and what they save is read by one device."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lib.config import Config, DatasetConfig, ModelConfig, ParallelismConfig, TrainingConfig, to_dict
from lib.data.renderer import Example
from lib.files import repository_root
from lib.model.storage import restore_tree, tree_digest
from lib.model.weights import Model, load_model, save_model
from lib.training.loop import train
from lib.training.optimizer import make_optimizer
from lib.training.step import TrainState

pytestmark = pytest.mark.distributed

CONFIG = Config(
    "toy",
    DatasetConfig("toy", "v1"),
    model=ModelConfig(max_length=80),
    training=TrainingConfig(
        num_steps=6, learning_rate=3e-2, warmup_steps=2, per_device_batch_size=2, grad_accum_steps=2,
        log_every=1, checkpoint_every=4,
    ),
)  # fmt: skip
# Over four devices: rows and weights in two parts, heads, feed-forward and vocabulary in two.
SHARED = replace(CONFIG, parallelism=ParallelismConfig(fsdp=2, tensor=2))
APART = ParallelismConfig(data=2, fsdp=2)

PROGRAM = """
import json, sys
from pathlib import Path
from lib.config import Config, ParallelismConfig, build
from lib.data.renderer import Example
from lib.model.processes import join_job
join_job()
import jax
from lib.model.mesh import make_mesh, own_rows
from lib.model.storage import _leaves
from lib.model.weights import load_model
from lib.training import loop
folder = Path(sys.argv[1])
request = json.loads((folder / "request.json").read_text())
examples, config = [Example(*item) for item in request["examples"]], build(Config, request["config"], "")
shards, save = {}, loop.save_checkpoint
def watched(into, state, digest):
    for path, leaf in _leaves(state).items():
        [shape] = {shard.data.shape for shard in leaf.addressable_shards}
        shards[path] = [leaf.shape, shape]
    save(into, state, digest)
loop.save_checkpoint = watched
model = load_model(folder / "base", config.parallelism)
result = loop.train(model, examples, config, folder / "run")
apart = make_mesh(ParallelismConfig(**request["apart"]))
found = {"shards": shards, "rows": list(own_rows(apart, 8)), "weights_sha256": result.weights_sha256,
         "devices": [jax.local_device_count(), jax.device_count()]}
(folder / f"{jax.process_index()}.json").write_text(json.dumps(found))
"""


class Job(NamedTuple):
    """The folder that two processes trained in, and what each of them saw."""

    folder: Path
    saw: list[dict[str, Any]]


@pytest.fixture(scope="module")
def job(
    small_model: Model, examples: list[Example], processes_compile_once: None, tmp_path_factory: pytest.TempPathFactory
) -> Job:
    folder = tmp_path_factory.mktemp("job")
    save_model(folder / "base", small_model)
    request = {"examples": examples[:2], "config": to_dict(SHARED), "apart": to_dict(APART)}
    (folder / "request.json").write_text(json.dumps(request))
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{asked.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "RETRACE_PROGRESS": ""}
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)], cwd=repository_root(), text=True,
            env=environment | {"JAX_PROCESS_ID": str(number)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[1][0] == "" and "Gloo" not in said[0][0], "the first process alone prints, and gloo not even there"
    return Job(folder, [json.loads((folder / f"{number}.json").read_text()) for number in range(2)])


@pytest.fixture(scope="module")
def alone(small_model: Model, examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRACE_PROGRESS", "")
        train(small_model, examples[:2], CONFIG, output)
    return output


def losses(output: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_the_losses_are_those_of_one_device(job: Job, alone: Path):
    assert [seen["devices"] for seen in job.saw] == [[2, 4], [2, 4]]
    for name in ("loss", "grad_norm"):
        expected = losses(alone, name)
        assert len(expected) == 6 and losses(job.folder / "run", name) == pytest.approx(expected, rel=1e-5)


def test_every_device_keeps_its_part_of_the_weights_and_of_the_optimizer(job: Job, small_model: Model):
    V = small_model.config.vocab_size
    split = [V // 2, 8] if V % 2 == 0 else [V, 4]
    attention, feed_forward = ".params['layers'][0]['attention']", ".params['layers'][0]['feed_forward']"
    for seen in job.saw:
        shards = seen["shards"]
        assert shards[".params['embedding']"] == [[V, 16], split]
        assert shards[f"{attention}['query']"] == [[4, 8, 16], [2, 8, 8]]
        assert shards[f"{attention}['key']"] == [[2, 8, 16], [1, 8, 8]]
        assert shards[f"{attention}['output']"] == [[16, 4, 8], [8, 2, 8]]
        assert shards[f"{feed_forward}['gate']"] == [[24, 16], [12, 8]]
        assert shards[f"{feed_forward}['down']"] == [[16, 24], [8, 12]]
        assert shards[".params['final_norm']['scale']"] == [[16], [16]]
        means = [shapes for path, shapes in shards.items() if path.startswith(".opt_state") and "['gate']" in path]
        assert means == [[[24, 16], [12, 8]]] * 2


def test_each_process_makes_its_own_rows_disjoint_and_complete(job: Job):
    rows = [range(*part) for seen in job.saw for part in seen["rows"]]
    assert sorted(row for part in rows for row in part) == list(range(8))
    assert all(job.saw[number]["rows"] for number in range(2))


def test_one_device_reads_what_they_saved_and_finds_the_same_digest(job: Job, small_model: Model):
    tuned = load_model(job.folder / "run" / "checkpoint-final")
    assert {seen["weights_sha256"] for seen in job.saw} == {tuned.weights_sha256}
    optimizer, _ = make_optimizer(CONFIG.training)
    like = TrainState(0, small_model.params, optimizer.init(small_model.params))
    like = like._replace(step=optimizer.init(small_model.params)[1][0].count)
    state = restore_tree(job.folder / "run" / "checkpoints" / "4", like)
    recorded = [json.loads(line) for line in (job.folder / "run" / "checkpoints.jsonl").read_text().splitlines()]
    assert int(state.step) == 4 and tree_digest(state) == recorded[0]["sha256"]


def test_one_device_goes_on_from_their_checkpoint_and_says_that_bits_may_differ(
    job: Job, alone: Path, small_model: Model, examples: list[Example], tmp_path: Path
):
    shutil.copytree(job.folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-final"))
    told: list[str] = []
    result = train(small_model, examples[:2], CONFIG, tmp_path / "run", warn=told.append)
    assert result.resumed_from == 4
    assert losses(tmp_path / "run", "loss") == pytest.approx(losses(alone, "loss"), rel=1e-5)
    assert any("mesh" in line and "equal bits are not promised" in line for line in told)
