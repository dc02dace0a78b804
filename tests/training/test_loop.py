"""The loop: the same bits every time, killed or not, and a folder that never holds two trainings."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import optax
import pytest

from lib.config import Config, DatasetConfig, LoraConfig, ModelConfig, TrainingConfig, to_dict
from lib.data.dataset import Dataset
from lib.data.renderer import Example, render_example, render_prompt
from lib.data.selection import is_held_out
from lib.errors import RequestError, RetraceError
from lib.files import repository_root, sealed, write_json
from lib.model import weights
from lib.model.lora import split
from lib.model.storage import DamagedError, is_saved, tree_digest
from lib.model.weights import Model, base_model, load_model, save_model
from lib.training import checkpoints, loop
from lib.training.checkpoints import LOGS, cut_logs, logs_of, saved_steps
from lib.training.loop import Metrics, TrainingResult, finished, train

# One configuration for nearly all: every other one would be compiled anew. The two examples are one batch.
CONFIG = Config(
    "toy",
    DatasetConfig("toy", "v1"),
    model=ModelConfig(max_length=80),
    training=TrainingConfig(
        num_steps=40, learning_rate=3e-2, warmup_steps=2, per_device_batch_size=2,
        log_every=2, eval_every=20, checkpoint_every=10,
    ),
)  # fmt: skip


class Killed(Exception):
    """Stands for the end of the process."""


class Run(NamedTuple):
    output: Path
    result: TrainingResult


def metrics(output: Path) -> list[Metrics]:
    """The logged lines without speed and time, which no two runs share."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("tokens_per_second", "seconds")} for line in lines
    ]


def killed_at(step: int):
    def on_metrics(line: Metrics) -> None:
        if line["step"] == step:
            raise Killed

    return on_metrics


@pytest.fixture(scope="module")
def whole(small_model: Model, examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    return Run(output, train(small_model, examples, CONFIG, output))


@pytest.fixture(scope="module")
def interrupted(small_model: Model, examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed at step 34: after the checkpoints of 20 and 30, and after lines of steps done again."""
    output = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Killed):
        train(small_model, examples, CONFIG, output, on_metrics=killed_at(34))
    assert saved_steps(output / "checkpoints") == [20, 30] and metrics(output)[-1]["step"] == 34
    return output


@pytest.fixture
def copy(interrupted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(interrupted, tmp_path / "copy")


def damage(checkpoint: Path) -> None:
    path = max((checkpoint / "arrays").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---- one training -------------------------------------------------------------------------------------------


def test_one_batch_overfits(whole: Run):
    losses = [line["loss"] for line in metrics(whole.output)]
    assert losses[0] > 3 and losses[-1] < 0.05 and whole.result.loss == losses[-1]


def test_every_logged_step_is_a_line(whole: Run):
    lines = metrics(whole.output)
    assert [line["step"] for line in lines] == list(range(2, 41, 2))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [20, 40]
    assert lines[-1]["held_out_loss"] == whole.result.held_out_loss > 0.05
    assert lines[0]["learning_rate"] == pytest.approx(1.5e-2) and lines[1]["learning_rate"] < 3e-2
    assert all(line["grad_norm"] > 0 for line in lines)


def test_a_system_instruction_does_not_move_the_held_out_split(small_model: Model, tmp_path: Path):
    """A dataset's manifest counts the split by the question; training must hold out the same ones."""
    questions = [f"{number}?" for number in range(60)]
    instructed = [Example(question, render_prompt(question, "Think."), "Answer: 1") for question in questions]
    config = replace(CONFIG, system_instruction="Think.", training=TrainingConfig(num_steps=1))
    result = train(small_model, instructed, config, tmp_path)
    expected = sum(is_held_out(question) for question in questions)
    assert (result.examples, result.held_out) == (60 - expected, expected) and expected > 0
    assert expected != sum(is_held_out(example.prompt) for example in instructed)


def test_the_tuned_model_is_the_one_that_the_result_names(whole: Run, small_model: Model):
    tuned = load_model(whole.output / "checkpoint-final")
    assert tuned.weights_sha256 == whole.result.weights_sha256 != small_model.weights_sha256
    assert whole.result.steps == 40 and whole.result.resumed_from == 0 and whole.result.tokens_per_second > 0


def test_the_model_that_came_in_is_left_as_it_was(whole: Run, small_model: Model):
    assert tree_digest(small_model.params) != whole.result.weights_sha256  # and none of its buffers was given away


def test_the_two_newest_checkpoints_are_kept(whole: Run):
    assert saved_steps(whole.output / "checkpoints") == [20, 30]


def test_what_is_done_is_not_done_again(whole: Run, small_model: Model, examples: list[Example]):
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.output.rglob("*"))
    assert train(small_model, examples, CONFIG, whole.output, on_metrics=killed_at(2)) == whole.result
    assert finished(whole.output) == whole.result
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.output.rglob("*")) == before


# ---- killed, and gone on with -------------------------------------------------------------------------------


def resumed(model: Model, examples: list[Example], output: Path) -> tuple[TrainingResult, list[str]]:
    warnings: list[str] = []
    return train(model, examples, CONFIG, output, warn=warnings.append), warnings


def test_f25_resume_equals_uninterrupted(whole: Run, copy: Path, small_model: Model, examples: list[Example]):
    result, warnings = resumed(small_model, examples, copy)
    assert (result.resumed_from, warnings) == (30, [])
    assert result.weights_sha256 == whole.result.weights_sha256 and metrics(copy) == metrics(whole.output)


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
def test_f25_rows_of_several_lengths_or_examples_are_gone_on_with_as_well(
    batching: str, small_model: Model, dataset: Dataset, tmp_path: Path, compiled_once: None
):
    ragged = [
        render_example(trace, recipe)
        for trace, recipe in zip(dataset.traces, ["answer_sft_v1", "trace_sft_v1"] * 4, strict=False)
    ]
    config = replace(CONFIG, model=ModelConfig(max_length=256), training=replace(
        CONFIG.training, num_steps=8, log_every=1, checkpoint_every=2, batching=batching
    ))  # fmt: skip
    whole = train(small_model, ragged, config, tmp_path / "whole")
    with pytest.raises(Killed):
        train(small_model, ragged, config, tmp_path / "killed", on_metrics=killed_at(5))
    again = train(small_model, ragged, config, tmp_path / "killed")
    assert (again.resumed_from, again.weights_sha256) == (4, whole.weights_sha256)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    losses = [line["loss"] for line in metrics(tmp_path / "whole")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("damaged, resumed_from", [([30], 20), ([20, 30], 0)])
def test_f36_damaged_checkpoints_are_told_of_and_passed_over(
    damaged: list[int], resumed_from: int, whole: Run, copy: Path, small_model: Model, examples: list[Example]
):
    for step in damaged:
        damage(copy / "checkpoints" / str(step))
    result, warnings = resumed(small_model, examples, copy)
    assert result.resumed_from == resumed_from and len(warnings) == len(damaged)
    assert all("falling back to the checkpoint before" in warning for warning in warnings)
    assert result.weights_sha256 == whole.result.weights_sha256 and metrics(copy) == metrics(whole.output)


@pytest.mark.parametrize(
    "failure",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
        MemoryError(),
        OSError(errno.EMFILE, "Too many open files"),
        ValueError("INTERNAL: reading [source locations='…'; os_error_code='116']"),  # as tensorstore says ESTALE
    ],
    ids=["device memory", "memory", "open files", "network disk"],
)
def test_f29_a_checkpoint_that_the_machine_cannot_read_now_is_left_as_it_is(
    failure: Exception, copy: Path, whole: Run, small_model: Model, examples: list[Example], monkeypatch
):
    def restore(*given):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.StandardCheckpointer.restore", restore)
        with pytest.raises(
            RetraceError, match=r"checkpoints/30: not read \(.+\), and left as it is; .*same command"
        ) as told:
            resumed(small_model, examples, copy)
    assert not isinstance(told.value, DamagedError) and saved_steps(copy / "checkpoints") == [20, 30]
    result, warnings = resumed(small_model, examples, copy)
    assert (result.resumed_from, warnings, result.weights_sha256) == (30, [], whole.result.weights_sha256)


@pytest.mark.parametrize("name", LOGS)
def test_a_log_that_the_machine_cannot_read_now_costs_no_checkpoint(
    name: str, copy: Path, whole: Run, small_model: Model, examples: list[Example], monkeypatch
):
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == name:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(RetraceError, match=rf"{name}: not read \(.+\), and left as it is") as told:
            resumed(small_model, examples, copy)
    assert not isinstance(told.value, DamagedError) and saved_steps(copy / "checkpoints") == [20, 30]
    result, warnings = resumed(small_model, examples, copy)
    assert (result.resumed_from, warnings, result.weights_sha256) == (30, [], whole.result.weights_sha256)


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_a_log_that_no_checkpoint_knows_is_refused_and_once_put_back_all_goes_on(
    name: str, change: str, copy: Path, whole: Run, small_model: Model, examples: list[Example]
):
    before = (copy / name).read_bytes()
    (copy / name).write_bytes(b" " + before)
    if change == "deleted":
        (copy / name).unlink()
    with pytest.raises(RequestError, match=f"{name}: not what was logged up to 30; put it back .*, or delete .*points"):
        resumed(small_model, examples, copy)
    assert saved_steps(copy / "checkpoints") == [20, 30]
    (copy / name).write_bytes(before)
    result, warnings = resumed(small_model, examples, copy)
    assert (result.resumed_from, warnings, result.weights_sha256) == (30, [], whole.result.weights_sha256)


def test_a_log_that_only_an_earlier_checkpoint_knows_is_gone_on_with_from_there(
    copy: Path, whole: Run, small_model: Model, examples: list[Example]
):
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join([*lines[:12], b" ", *lines[12:]]))  # after step 24
    with pytest.raises(Killed):
        train(small_model, examples, CONFIG, copy, on_metrics=killed_at(22), warn=lambda line: None)
    assert saved_steps(copy / "checkpoints") == [20, 30]
    result, warnings = resumed(small_model, examples, copy)
    assert (result.resumed_from, result.weights_sha256) == (20, whole.result.weights_sha256)
    assert len(warnings) == 1 and "up to 30; falling back to the checkpoint of step 20" in warnings[0]
    assert metrics(copy) == metrics(whole.output)


def test_what_a_checkpoint_records_of_its_logs_is_on_the_disk_before(tmp_path: Path, monkeypatch):
    for name in LOGS:
        (tmp_path / name).write_text("{}\n")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    assert logs_of(tmp_path)["metrics.jsonl"]["bytes"] == 3
    assert synced == [(tmp_path / name).stat().st_ino for name in LOGS]


def test_what_one_process_finds_of_a_log_all_act_on(copy: Path, monkeypatch: pytest.MonkeyPatch):
    record, before = copy / "checkpoints" / "30" / "digest.json", (copy / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(checkpoints, "any_process", lambda mine: True)
    with pytest.raises(RetraceError, match=r"metrics.jsonl: not read \(by another process\), and left"):
        cut_logs(copy, record)
    answers = iter([False, True])
    monkeypatch.setattr(checkpoints, "any_process", lambda mine: next(answers))
    with pytest.raises(DamagedError, match="metrics.jsonl: not what was logged up to 30"):
        cut_logs(copy, record)
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_whole_checkpoint_of_another_structure_is_refused_and_left_alone(
    copy: Path, whole: Run, small_model: Model, examples: list[Example], monkeypatch: pytest.MonkeyPatch
):
    make = loop.make_optimizer

    def with_a_count_more(config: TrainingConfig):
        optimizer, schedule = make(config)
        return optax.chain(optimizer, optax.scale_by_schedule(lambda step: 1.0)), schedule

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_optimizer", with_a_count_more)
        with pytest.raises(
            RequestError, match=r"checkpoints/30: leaf .*opt_state.*, the checkpoint has None; it is left"
        ):
            resumed(small_model, examples, copy)
    assert saved_steps(copy / "checkpoints") == [20, 30]
    result, warnings = resumed(small_model, examples, copy)
    assert (result.resumed_from, warnings, result.weights_sha256) == (30, [], whole.result.weights_sha256)


def test_going_on_needs_no_more_memory_than_to_begin(
    copy: Path, small_model: Model, examples: list[Example], monkeypatch
):
    """The state that is read is the only one; before, there was one to be read into beside it."""
    restore, found = loop.restore_latest, []

    def restoring(*given):
        found.append(sum(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(given[1].opt_state)))
        return restore(*given)

    monkeypatch.setattr(loop, "restore_latest", restoring)
    monkeypatch.setattr(loop, "_begun", None)
    assert resumed(small_model, examples, copy)[0].resumed_from == 30 and found == [0]


def test_f24_a_checkpoint_that_was_never_finished_is_no_checkpoint(
    whole: Run, copy: Path, small_model: Model, examples: list[Example]
):
    (copy / "checkpoints" / "30" / "digest.json").unlink()
    assert not is_saved(copy / "checkpoints" / "30")
    result, warnings = resumed(small_model, examples, copy)
    assert (result.resumed_from, warnings, result.weights_sha256) == (20, [], whole.result.weights_sha256)


def test_f25_a_line_of_metrics_that_was_cut_by_a_kill_is_written_again(
    whole: Run, copy: Path, small_model: Model, examples: list[Example]
):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:15]) + lines[15][:9])
    resumed(small_model, examples, copy)
    assert metrics(copy) == metrics(whole.output)


def test_f26_killed_again_and_again_at_one_step_it_still_goes_on(
    whole: Run, copy: Path, small_model: Model, examples: list[Example]
):
    held = None
    for _ in range(2):
        with pytest.raises(Killed):
            train(small_model, examples, CONFIG, copy, on_metrics=killed_at(34))
        files = sorted(str(path.relative_to(copy)) for path in copy.rglob("*"))
        assert held in (None, files)
        held = files
    assert resumed(small_model, examples, copy)[0].weights_sha256 == whole.result.weights_sha256


def test_f25_killed_while_the_tuned_model_is_saved_it_is_saved_again(
    whole: Run, copy: Path, small_model: Model, examples: list[Example]
):
    shutil.copytree(whole.output / "checkpoint-final", copy / "checkpoint-final")
    (copy / "checkpoint-final" / "model.json").unlink()
    assert finished(copy) is None
    assert resumed(small_model, examples, copy)[0].weights_sha256 == whole.result.weights_sha256
    assert load_model(copy / "checkpoint-final").weights_sha256 == whole.result.weights_sha256


AGAIN = """
import json, os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
from lib.config import Config, build
from lib.data.renderer import Example
from lib.model.weights import load_model
from lib.training.loop import train
folder = Path(sys.argv[1])
request = json.loads((folder / "request.json").read_text())
examples, config = [Example(*item) for item in request["examples"]], build(Config, request["config"], "")
result = train(load_model(folder / "base"), examples, config, folder / "run")
print(result.weights_sha256)
"""


def test_f46_f47_f48_another_process_on_one_core_ends_with_the_same_weights(
    whole: Run, small_model: Model, examples: list[Example], tmp_path: Path
):
    save_model(tmp_path / "base", small_model)
    request = {"examples": examples, "config": to_dict(CONFIG)}
    (tmp_path / "request.json").write_text(json.dumps(request))
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    command = [sys.executable, "-c", AGAIN, str(tmp_path)]
    done = subprocess.run(command, cwd=repository_root(), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert done.stdout.split()[-1] == whole.result.weights_sha256
    assert metrics(tmp_path / "run") == metrics(whole.output)


# ---- what is refused ----------------------------------------------------------------------------------------


def changed(**training) -> Config:
    return replace(CONFIG, training=replace(CONFIG.training, **training))


def test_what_an_earlier_attempt_had_otherwise_is_not_forgotten(tmp_path: Path, monkeypatch):
    machines = iter([{"cpu": "one"}, {"cpu": "other"}, {"cpu": "one"}])
    monkeypatch.setattr(loop, "fingerprint", lambda parallelism: next(machines))
    loop._claim(tmp_path, {"data": "x"}, CONFIG)
    write_json(tmp_path / "checkpoints" / "10" / "digest.json", {})
    assert [loop._changed(tmp_path, {"data": "x"}, CONFIG, print) for _ in range(2)] == [["cpu"], ["cpu"]]


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_another_training_in_the_same_folder_is_refused_naming_the_field(
    state: str, whole: Run, interrupted: Path, small_model: Model, examples: list[Example]
):
    output = whole.output if state == "finished" else interrupted
    other = [Example("x", "1+1?", "Answer: 2"), *examples[1:]]
    renamed = small_model._replace(name="other")
    for model, items, config, field in [
        (small_model, examples, changed(learning_rate=1e-3), "training.learning_rate;"),
        (small_model, examples, changed(seed=1, num_steps=41), "training.num_steps, training.seed;"),
        (small_model, other, CONFIG, "examples_sha256;"),
        (small_model, examples[::-1], CONFIG, "examples_sha256;"),
        (renamed, examples, CONFIG, "model;"),
    ]:
        before = (output / "metrics.jsonl").read_bytes()
        with pytest.raises(RequestError, match=f"holds a training run with other {field} give another output folder"):
            train(model, items, config, output)
        assert (output / "metrics.jsonl").read_bytes() == before


def test_f45_what_does_not_fit_is_refused_before_anything_is_written(small_model, examples, tmp_path: Path):
    config = replace(CONFIG, model=replace(CONFIG.model, max_length=20))
    with pytest.raises(
        RequestError, match="3 of 3 examples are longer than model.max_length 20: .* raise model.max_length"
    ):
        train(small_model, examples, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_examples_that_are_all_held_out_are_refused(small_model, examples, tmp_path: Path):
    with pytest.raises(RequestError, match="all 1 examples fell to the held-out side"):
        train(small_model, examples[2:], CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_plan_that_is_refused_leaves_the_folder_to_the_settings_that_fit(
    small_model: Model, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refusing(*given):
        raise RequestError("This would fit: --set 'training.remat=true'")

    monkeypatch.setattr(loop, "check_plan", refusing)
    with pytest.raises(RequestError, match="This would fit"):
        train(small_model, examples, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_training_that_came_to_no_checkpoint_leaves_the_folder_to_other_settings(
    small_model: Model, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def short_of_memory(*given):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", lambda *given: short_of_memory)
        with pytest.raises(RetraceError, match="training ran out of memory .*; halve training.per_device_batch_size"):
            train(small_model, examples, CONFIG, tmp_path)
    halved = changed(per_device_batch_size=1, grad_accum_steps=2, num_steps=2, warmup_steps=0)
    assert train(small_model, examples, halved, tmp_path).steps == 2
    with pytest.raises(RequestError, match="holds a training run with other .*training.grad_accum_steps;"):
        train(small_model, examples, CONFIG, tmp_path)


def test_a_step_is_begun_before_the_loss_of_the_one_before_is_read(
    small_model: Model, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    happened: list[str] = []
    make, look = loop._step, loop._refuse_not_finite

    def watched(*arguments):
        step = make(*arguments)

        def run(state, *rest):
            happened.append(f"begin {int(state.step) + 1}")
            return step(state, *rest)

        return run

    monkeypatch.setattr(loop, "_step", watched)
    monkeypatch.setattr(
        loop, "_refuse_not_finite", lambda step, *rest: (happened.append(f"read {step}"), look(step, *rest))
    )
    config = replace(CONFIG, training=replace(CONFIG.training, num_steps=4, log_every=3))
    train(small_model, examples, config, tmp_path)
    # Before a line is logged, here of steps 3 and 4, nothing is left unread.
    assert happened[:7] == ["begin 1", "begin 2", "read 1", "begin 3", "read 2", "read 3", "begin 4"]


def test_f52_a_loss_that_is_no_number_stops_the_training_and_keeps_a_good_checkpoint(
    small_model, examples, tmp_path: Path
):
    seen: list[Metrics] = []
    config = changed(learning_rate=1e6, warmup_steps=0, checkpoint_every=1, log_every=1)
    with pytest.raises(RetraceError) as caught:
        train(small_model, examples, config, tmp_path / "run", on_metrics=seen.append)
    stopped = seen[-1]["step"] + 1
    error = str(caught.value)
    assert error.startswith(f"training stopped at step {stopped}: loss ") and "at learning rate 99" in error
    assert "Lower training.learning_rate" in error and finished(tmp_path / "run") is None
    # The weights after step `stopped - 1` gave the bad loss; those one step earlier gave the last good one.
    assert f"The checkpoint of step {stopped - 2} is good." in error
    assert saved_steps(tmp_path / "run" / "checkpoints") == [stopped - 2, stopped - 1]


# ---- LoRA ---------------------------------------------------------------------------------------------------

ADAPTED = replace(
    CONFIG, training=replace(CONFIG.training, num_steps=6, checkpoint_every=2, lora=LoraConfig(rank=2, alpha=4.0))
)


@pytest.fixture(scope="module")
def tiny(dataset: Dataset, compiled_once: None) -> Model:
    """A model that a checkpoint of adapters can name, and find again."""
    return base_model("tiny", ADAPTED.training.seed, dataset.tokenizer_file)


@pytest.fixture(scope="module")
def adapted(tiny: Model, examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("adapted")
    return Run(output, train(tiny, examples, ADAPTED, output))


def test_lora_trains_and_saves_the_adapters_alone(tiny: Model, adapted: Run):
    tuned = load_model(adapted.output / "checkpoint-final")
    base, adapters = split(tuned.params)
    assert tree_digest(base) == tiny.weights_sha256 and tuned.weights_sha256 == adapted.result.weights_sha256
    assert all(leaf.any() for leaf in jax.tree.leaves(adapters))  # each b began as zeros
    assert 0 < metrics(adapted.output)[-1]["loss"] < metrics(adapted.output)[0]["loss"]
    for folder in ("checkpoint-final/weights", "checkpoints/4"):
        saved = json.loads((adapted.output / folder / "digest.json").read_text())["leaves"]
        assert "['adapters']" in "".join(saved) and not any("embedding" in path for path in saved)


def test_lora_killed_and_gone_on_with_comes_to_the_same_adapters(tiny, adapted, examples, tmp_path):
    with pytest.raises(Killed):
        train(tiny, examples, ADAPTED, tmp_path, on_metrics=killed_at(4))
    again = train(tiny, examples, ADAPTED, tmp_path)
    assert again.resumed_from in (2, 4) and again.weights_sha256 == adapted.result.weights_sha256


def test_a_finished_training_of_adapters_is_checked_beside_the_base_that_is_there(
    tiny: Model, adapted: Run, examples: list[Example], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(weights, "base_model", None)  # to be read a second time, it would have to fit twice
    assert train(tiny, examples, ADAPTED, adapted.output) == adapted.result


def test_adapters_are_not_put_beside_another_base(adapted: Run, tmp_path: Path):
    shutil.copytree(adapted.output / "checkpoint-final", tmp_path / "copy")
    about = json.loads((tmp_path / "copy" / "model.json").read_text())
    about["adapts"]["seed"] += 1
    del about["sha256"]
    write_json(tmp_path / "copy" / "model.json", sealed(about))
    with pytest.raises(RequestError, match="its adapters were trained beside weights .* read it on the kind of device"):
        load_model(tmp_path / "copy")
