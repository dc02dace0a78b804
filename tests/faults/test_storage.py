"""Disks that are full, memory that is short, folders that may not be written, and bits that flip: told, and survived.

RETRACE_FAULTS=full in the environment executes notebooks by kernels, and tries every offset on the way to the end.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import damage
import full_disk
import jax
import numpy as np
import ordinary
import psutil
import pytest
import subject
from damage import OFFSETS, command, copied, flip, names, one_line
from small import CONFIG, RUN, SMALL, as_words
from subject import FULL

from lib.config import Config, DatasetConfig, ModelConfig, TrainingConfig, load_config
from lib.data.dataset import load_dataset
from lib.data.renderer import Example
from lib.data.store import Store
from lib.errors import RequestError, RetraceError
from lib.evaluation.evalsets import load_eval_set
from lib.experiments import pipeline, stages
from lib.experiments.run import Run, read_manifest, run_folders, status_of
from lib.experiments.verify import verify_home, verify_run
from lib.files import repository_root, sealed, write_json
from lib.model.processes import explained
from lib.model.weights import Model

# Orbax leaves a coroutine behind where a damaged file stops it.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

SEED = 35
TRAIN = ["train", "--config", CONFIG, *as_words(SMALL)]


@pytest.fixture(scope="module", autouse=True)
def stages_here(processes_compile_once: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not FULL:
            patch.setattr(pipeline, "execute", damage.execute_here)
        yield


@pytest.fixture(scope="module")
def whole(stages_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is done; tests damage copies of its home."""
    home = tmp_path_factory.mktemp("whole") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRACE_HOME", str(home))
        said = command(*RUN, "--name", "toy")
        assert said.status == 0, said
        [folder] = run_folders()
        assert not verify_run(folder) and not verify_home()
    return folder


@pytest.fixture(scope="module", autouse=True)
def meanwhile(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future]]:
    """What other processes do, one after the other, while the tests of flipped bits are at work in this one."""
    folder, data = tmp_path_factory.mktemp("meanwhile"), ["--data", whole / "train.tunix_sft.jsonl", "--output"]
    short, wide = folder / "short", folder / "wide"
    work: dict[str, tuple] = {
        "disk": (fill_disk, folder / "disk", whole),
        "permissions": (give_as_ordinary_user, folder, whole),
        "memory to begin": (limit_memory, 500, short, *TRAIN, *data, short / "out"),
        "memory of a training": (
            limit_memory, 4_000, wide, *TRAIN, "--set", "training.per_device_batch_size=2048", *data, wide / "out",
        ),
        "memory of a run": (
            limit_memory, 4_000, folder / "run", *RUN, "--set", "evaluation.batch_size=50000", "--name", "toy",
        ),
    }  # fmt: skip
    faults = {"disk": "_f28_", "permissions": "_f30_"}
    chosen = " ".join(item.name for item in request.session.items)
    with ThreadPoolExecutor(1) as thread:
        yield {name: thread.submit(*job) for name, job in work.items() if faults.get(name, "_f29_") in chosen}


@pytest.fixture
def copy(whole: Path, home: Path) -> Path:
    """The same run in a home of the test's own."""
    return copied(whole.parent, home) / whole.name


# ---- flipped bits in what a run made -----------------------------------------------------------------------


def test_f35_f36_f37_one_flipped_bit_in_each_file_of_a_run_and_every_one_is_named(copy):
    source, manifest = random.Random(SEED), read_manifest(copy)
    assert {Path(name).suffix for name in manifest["artifacts"]} >= {".jsonl", ".ipynb", ".html", ".json", ".yaml"}
    contents = {name: (copy / name).read_bytes() for name in manifest["artifacts"]}
    for _ in range(OFFSETS):
        for name in contents:
            flip(copy / name, source)
        assert verify_run(copy) == [f"edited: {name}" for name in manifest["artifacts"]]
        for name, content in contents.items():
            (copy / name).write_bytes(content)
    assert verify_run(copy) == []


def test_f35_verify_names_a_flipped_bit_on_the_command_line(copy, capsys):
    flip(copy / "eval_after.jsonl", random.Random(SEED))
    for words in (["runs", "verify", copy.name], ["runs", "verify", "--all"]):
        said = command(*words)
        assert said.status == 1 and "  edited: eval_after.jsonl\n" in said.out and not said.err


def test_f35_f37_a_flipped_bit_in_a_manifest_is_named_before_it_is_believed(copy):
    source, whole = random.Random(SEED), (copy / "run_manifest.json").read_bytes()
    for _ in range(OFFSETS):
        flip(copy / "run_manifest.json", source)
        assert names(verify_run(copy)) == {"run_manifest.json"} and status_of(copy) == "damaged"
        said = command("runs", "show", copy.name)
        assert said.status == 2 and one_line(said.err) and "run_manifest.json" in said.err
        (copy / "run_manifest.json").write_bytes(whole)
    assert verify_run(copy) == []


def test_f35_a_flipped_bit_in_the_store_or_a_dataset_is_named_before_it_is_used(copy):
    home, source = copy.parent, random.Random(SEED)
    shared = [*home.glob("store/*.parquet"), *home.glob("datasets/*/*")]
    assert sorted(path.suffix for path in shared) == [".json", ".json", ".parquet", ".parquet", ".parquet"]
    for path in shared:
        whole = path.read_bytes()
        for _ in range(OFFSETS):
            flip(path, source)
            assert any(path.name in finding for finding in verify_home()), path
            with pytest.raises(RetraceError, match=re.escape(path.name)):
                if path.parent.name == "store":
                    list(Store(home / "store").scan())
                else:
                    load_dataset(home / "datasets", "smoke-v1")
        path.write_bytes(whole)
    assert verify_home() == []
    flip(home / "datasets" / "smoke-v1" / "traces.parquet", source)
    said = command("runs", "verify", "--all")
    assert said.status == 1 and "traces.parquet" in said.out


def test_f35_a_flipped_bit_in_an_eval_set_is_named_before_it_is_used(tmp_path):
    source = random.Random(SEED)
    for suffix in (".jsonl", ".manifest.json"):
        shutil.copy(repository_root() / "evalsets" / f"high_card_duel_v1{suffix}", tmp_path)
    path = tmp_path / "high_card_duel_v1.jsonl"
    whole = path.read_bytes()
    for _ in range(OFFSETS):
        flip(path, source)
        with pytest.raises(RequestError, match=re.escape(str(path))):
            load_eval_set(path)
        path.write_bytes(whole)
    assert len(load_eval_set(path).items) == 520


def test_f35_f36_a_flipped_bit_in_a_tuned_model_is_never_answered_with(copy):
    from lib.model.weights import load_model

    source, folder = random.Random(SEED), copy / "checkpoint-final"
    digest = load_model(folder).weights_sha256
    for path in damage.files(folder):
        whole = path.read_bytes()
        must = path.parent == folder or path.name == "digest.json"
        for _ in range(OFFSETS if FULL or must else 1):
            flip(path, source)
            try:
                found = load_model(folder)
                assert not must and found.weights_sha256 == digest, path  # of Orbax's files some hold no weight
            except RetraceError as error:
                assert str(folder) in str(error)
            path.write_bytes(whole)
    flip(folder / "tokenizer.json", source)
    words = ["eval", "generate", "--model", folder, "--eval-set", "high_card_duel_v1", "--output", copy / "o.jsonl"]
    said = command(*words)
    assert said.status == 1 and one_line(said.err) and "tokenizer.json: not what was saved" in said.err
    assert not (copy / "o.jsonl").exists()


def test_f36_by_hand_a_tuned_model_is_read_once_and_a_damaged_one_trained_again_before_it_answers(copy, monkeypatch):
    from lib.training import loop

    run, read, load = Run(copy, load_config(copy / "config.yaml")), [], loop.load_model
    before = stages.evaluate_model(run, "after")

    def reading(*given: Any) -> Model:
        read.append(load(*given))
        return read[-1]

    for damaged in (False, True):
        run.path(stages.OUTPUTS["after"]).unlink()
        with monkeypatch.context() as patch:
            if damaged:
                flip(copy / "checkpoint-final" / "tokenizer.json", random.Random(SEED))
            else:
                patch.setattr(loop, "load_model", reading)
                patch.setattr(stages, "model_before", None)  # the base is not made for it
            again = stages.evaluate_model(run, "after")
        assert again.weights_sha256 == before.weights_sha256
        assert [item.completion for item in again.items] == [item.completion for item in before.items]
    assert len(read) == 1


def test_f37_by_hand_answers_to_an_eval_set_that_was_edited_since_are_not_shown(copy, tmp_path):
    config = load_config(copy / "config.yaml")
    edited = (repository_root() / "evalsets" / f"{config.evaluation.eval_set}.jsonl").read_text().splitlines()
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\n".join(edited[:4]) + "\n")
    run = Run(copy, replace(config, evaluation=replace(config.evaluation, eval_set=str(mine))))
    file = copy / stages.OUTPUTS["after"]
    with pytest.raises(RetraceError, match="eval set that was edited since; delete the file and run again"):
        stages.evaluate_model(run, "after")
    file.unlink()
    assert stages.evaluate_model(run, "after").eval_set_sha256 == load_eval_set(mine).sha256
    with pytest.raises(RetraceError, match="edited since"):
        stages.compare_models(run)


# ---- flipped bits in a run that goes on --------------------------------------------------------------------


class Reached(Exception):
    """A stage is about to be executed."""


@pytest.fixture
def unfinished(whole: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run, come to its last stage; what is executed of it is told, and not done."""

    def execute(stage: Any, run: Any, deadline: float) -> str:
        raise Reached(stage.name)

    monkeypatch.setattr(pipeline, "execute", execute)
    monkeypatch.setattr(pipeline, "save_code", lambda folder: {"git_sha": None, "git_dirty": False})
    return subject.rewound(whole, home, "05_compare")


def test_f35_f36_a_flipped_bit_in_what_a_stage_made_has_that_stage_made_again(unfinished, tmp_path, home):
    source, kept = random.Random(SEED), copied(home, tmp_path / "kept")
    stages = {file.stem: json.loads(file.read_bytes()) for file in sorted(unfinished.glob("stages/*.json"))}
    assert len(stages) == 5
    for name, record in stages.items():
        for _ in range(OFFSETS if FULL else 1):
            copied(kept, home)
            for made in record["files"]:
                flip(unfinished / made, source)
            assert names(verify_run(unfinished)) == set(record["files"])
            told: list[str] = []
            with pytest.raises(Reached, match=name):
                pipeline.resume_run(unfinished.name, say=told.append)
            assert f"  {name}: {', '.join(sorted(record['files']))} not as recorded; made again" in told
            assert not [path for path in map(unfinished.joinpath, record["files"]) if path.is_file()]


def test_f35_f37_a_flipped_bit_in_the_record_of_a_stage_has_that_stage_made_again(unfinished, tmp_path, home):
    source, kept = random.Random(SEED), copied(home, tmp_path / "kept")
    for file in sorted(unfinished.glob("stages/*.json")):
        for _ in range(OFFSETS if FULL else 1):
            copied(kept, home)
            flip(file, source)
            assert names(verify_run(unfinished)) == {f"stages/{file.name}"}
            with pytest.raises(Reached, match=file.stem):
                pipeline.resume_run(unfinished.name, say=lambda line: None)


def test_f35_what_a_stage_left_that_never_ended_is_not_believed(unfinished, tmp_path):
    (unfinished / "stages" / "04_evaluate_before.json").unlink()
    flip(unfinished / "eval_before.jsonl", random.Random(SEED))
    with pytest.raises(Reached, match="04_evaluate_before"):
        pipeline.resume_run(unfinished.name, say=lambda line: None)
    assert not (unfinished / "eval_before.jsonl").exists() and (unfinished / "checkpoint-final").exists()


@pytest.mark.parametrize("name", ["config.yaml", "state.json"])
def test_f35_f37_a_run_whose_own_files_are_damaged_is_refused_in_one_line(name, unfinished):
    whole = (unfinished / name).read_bytes()
    for content in (whole[:-9], b"{", b"", whole.replace(b'"config_sha256": "', b'"config_sha256": "0', 1) + b"#"):
        (unfinished / name).write_bytes(content)
        said = command("resume", unfinished.name)
        assert said.status in (1, 2) and one_line(said.err) and name in said.err, said


@pytest.mark.parametrize("name", ["datasets/smoke-v1/traces.parquet", "datasets/smoke-v1/tokenizer.json"])
def test_f35_a_training_on_a_damaged_dataset_does_not_begin(name, whole, home, monkeypatch):
    folder = subject.rewound(whole, home, "03_train")
    monkeypatch.setattr(pipeline, "execute", damage.execute_here)
    flip(home / name, random.Random(SEED))
    said = command("resume", folder.name)
    assert said.status == 1 and one_line(said.err) and Path(name).name in said.err, said
    assert not (folder / "checkpoints").exists() and read_manifest(folder)["status"] == "failed"


def test_f35_f36_a_run_that_was_damaged_everywhere_comes_to_the_same_end(whole, home):
    """One bit in each file that a stage made and that was recorded: all is made again, and is the same."""
    folder = subject.rewound(whole, home, "05_compare")
    source = random.Random(SEED)
    for name in ("train.tunix_sft.jsonl", "eval_before.jsonl", "metrics.jsonl", "checkpoint-final/tokenizer.json"):
        flip(folder / name, source)
    said = command("resume", folder.name)
    assert said.status == 0, said
    assert said.out.count("not as recorded; made again") == 3  # the logs and the model are of one stage
    assert subject.results(folder) == subject.results(whole) and verify_run(folder) == []


# ---- flipped bits in a training that goes on ---------------------------------------------------------------

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


@pytest.fixture(scope="module")
def killed(small_model: Model, examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training killed at step 34: after the checkpoints of 20 and 30, and after lines of steps done again."""
    from lib.training.loop import train

    def kill(line: dict) -> None:
        if line["step"] == 34:
            raise Killed

    output = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        train(small_model, examples, CONFIG, output, on_metrics=kill)
    return output


@pytest.fixture(scope="module")
def undisturbed(small_model: Model, examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> str:
    from lib.training.loop import train

    return train(small_model, examples, CONFIG, tmp_path_factory.mktemp("undisturbed")).weights_sha256


@pytest.fixture(scope="module")
def state(small_model: Model) -> Any:
    """What a checkpoint is restored to."""
    import jax.numpy as jnp

    from lib.training.optimizer import make_optimizer
    from lib.training.step import TrainState

    optimizer, _ = make_optimizer(CONFIG.training)
    return TrainState(jnp.int32(0), small_model.params, optimizer.init(small_model.params))


def restored(folder: Path, state: Any) -> tuple[int, list[str]]:
    """The step that is gone on from, and what is told."""
    from lib.training.checkpoints import restore_latest

    told: list[str] = []
    found = restore_latest(folder / "checkpoints", state, told.append)
    return int(found.step) if found else 0, told


def test_f36_a_flipped_bit_in_a_checkpoint_is_told_and_the_one_before_is_gone_on_from(killed, state, tmp_path):
    source, refused = random.Random(SEED), 0
    files = damage.files(killed / "checkpoints" / "30")
    weights = sorted(files, key=lambda path: path.stat().st_size)[-3:]
    chosen = source.choices([*files, *weights * 5], k=OFFSETS) + (files if FULL else [])
    for file in chosen:
        folder = copied(killed, tmp_path / "copy")
        flip(folder / file.relative_to(killed), source)
        step, told = restored(folder, state)  # of Orbax's files some hold no weight
        assert (step, told) == (30, []) or step == 20 and len(told) == 1, (file, step, told)
        if told:
            assert "checkpoints/30" in told[0] and told[0].endswith("; falling back to the checkpoint before")
            assert not (folder / "checkpoints" / "30").exists()
            refused += 1
    assert refused >= OFFSETS // 5  # about half of them, as it falls out


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints.jsonl"])
def test_f35_a_flipped_bit_in_a_log_is_told_and_not_carried_on(name, killed, tmp_path):
    from lib.model.storage import DamagedError
    from lib.training.checkpoints import LOGS, cut_logs

    source, whole = random.Random(SEED), {file: (killed / file).read_bytes() for file in LOGS}
    lines = whole[name].splitlines(keepends=True)
    ends = {step: len(b"".join(line for line in lines if json.loads(line)["step"] <= step)) for step in (20, 30)}
    folder = copied(killed, tmp_path / "copy")
    for _ in range(OFFSETS):
        offset = flip(folder / name, source)
        damaged = (folder / name).read_bytes()
        for step in (30, 20):
            for file in LOGS:
                (folder / file).write_bytes(damaged if file == name else whole[file])
            record = folder / "checkpoints" / str(step) / "digest.json"
            if offset < ends[step]:
                with pytest.raises(DamagedError, match=f"{name}: not what was logged up to {step}"):
                    cut_logs(folder, record)
            else:
                cut_logs(folder, record)
                assert (folder / name).read_bytes() == whole[name][: ends[step]]
        (folder / name).write_bytes(whole[name])


@pytest.mark.parametrize("number", range(OFFSETS if FULL else 1))
@pytest.mark.parametrize("name", ["checkpoints/30", "metrics.jsonl"])
def test_f35_f36_a_training_that_was_damaged_ends_with_the_same_weights(
    name, number, killed, undisturbed, small_model, examples, tmp_path
):
    from lib.training.loop import train

    folder, told, counts = copied(killed, tmp_path / "copy"), [], True
    if name == "metrics.jsonl":  # what was logged after the checkpoint is logged anew, whatever became of it
        whole = (folder / name).read_bytes()
        lines = whole.splitlines(keepends=True)
        first, last = (len(b"".join(line for line in lines if json.loads(line)["step"] <= n)) for n in (20, 30))
        offset = flip(folder / name, random.Random(number))
        counts = first <= offset < last
        if offset < first:  # no checkpoint knows such a log
            with pytest.raises(RequestError, match=f"{name}: not what was logged up to 30; put it back as it was"):
                train(small_model, examples, CONFIG, folder)
            (folder / name).write_bytes(whole)
    else:  # in the middle of the weights: not every bit that Orbax writes means something
        file = max((folder / name / "arrays").rglob("*"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2 + number] ^= 1
        file.write_bytes(content)
    result = train(small_model, examples, CONFIG, folder, warn=told.append)
    assert result.weights_sha256 == undisturbed
    assert told and result.resumed_from < 30 if counts else not told and result.resumed_from == 30
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(2, 41, 2))


def test_f35_f37_a_flipped_bit_in_what_a_training_is_of_is_refused(killed, small_model, examples, tmp_path):
    from lib.training.loop import train

    source = random.Random(SEED)
    for _ in range(OFFSETS):
        folder = copied(killed, tmp_path / "copy")
        flip(folder / "checkpoints" / "inputs.json", source)
        with pytest.raises(RetraceError, match=r"checkpoints/inputs.json: damaged .* delete .*/checkpoints and train"):
            train(small_model, examples, CONFIG, folder)


def test_f36_a_tuned_model_that_is_damaged_is_made_again_from_its_checkpoint(
    killed, undisturbed, small_model, examples, tmp_path
):
    from lib.training.loop import finished, train

    folder, told = copied(killed, tmp_path / "copy"), []
    train(small_model, examples, CONFIG, folder)
    flip(folder / "checkpoint-final" / "model.json", random.Random(SEED))
    result = train(small_model, examples, CONFIG, folder, warn=told.append)
    assert "model.json: damaged" in told[0] and "going back to the checkpoint before" in told[0]
    assert result.resumed_from == 30 and result.weights_sha256 == undisturbed and finished(folder) == result


# ---- edits, and files that are missing ---------------------------------------------------------------------


def edited(folder: Path) -> None:
    (folder / "delta_report.md").write_text((folder / "delta_report.md").read_text() + "\nImproved.\n")


def missing(folder: Path) -> None:
    (folder / "delta_report.md").unlink()


def linked(folder: Path) -> None:
    shutil.move(folder / "delta_report.md", folder.parent / "elsewhere.md")
    (folder / "delta_report.md").symlink_to(folder.parent / "elsewhere.md")


def replaced_by_folder(folder: Path) -> None:
    missing(folder)
    (folder / "delta_report.md").mkdir()


def added(folder: Path) -> None:
    (folder / "checkpoints" / "notes.txt").write_text("mine")


def link_added(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)


def dataset_missing(folder: Path) -> None:
    (folder.parent / "datasets" / "smoke-v1" / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "change, named",
    [
        (edited, "edited: delta_report.md"),
        (missing, "missing: delta_report.md"),
        (linked, "missing: delta_report.md"),
        (replaced_by_folder, "missing: delta_report.md"),
        (added, "extra: checkpoints/notes.txt"),
        (link_added, "extra: more"),
        (dataset_missing, "edited: dataset smoke-v1"),
    ],
)
def test_f37_verify_names_what_was_changed_by_hand(change, named, copy):
    change(copy)
    for words in (["runs", "verify", copy.name], ["runs", "verify", "--all"]):
        said = command(*words)
        assert said.status == 1 and f"{copy.name}: 1 not as recorded\n  {named}" in said.out and not said.err
    [found] = json.loads(command("runs", "verify", copy.name, "--json").out)["runs"].values()
    assert found[0].startswith(named)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["metrics"]["evaluation"]["after"].update(accuracy=1.0),
        lambda manifest: manifest["artifacts"].pop("delta_report.md"),
        lambda manifest: manifest["artifacts"]["delta_report.md"].update(sha256="0" * 64),
        lambda manifest: manifest.update(status="done", seed=8),
        lambda manifest: manifest.pop("sha256"),
        lambda manifest: manifest.update(manifest_version="9.9"),
    ],
)
def test_f37_a_manifest_edited_by_hand_is_named(change, copy):
    manifest = json.loads((copy / "run_manifest.json").read_bytes())
    change(manifest)
    (copy / "run_manifest.json").write_text(json.dumps(manifest))
    said = command("runs", "verify", copy.name)
    assert said.status == 1 and "  edited: run_manifest.json (" in said.out and not said.err


def test_f37_a_manifest_that_is_missing_is_named(copy):
    (copy / "run_manifest.json").unlink()
    said = command("runs", "verify", "--all")
    assert said.status == 1 and f"missing: {copy.name}/run_manifest.json\n" in said.out
    said = command("runs", "verify", copy.name)
    assert said.status == 2 and one_line(said.err) and f"{copy.name}: no run_manifest.json" in said.err


# ---- other shapes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda leaf: leaf[:, :8], "expected float32[768,16], the checkpoint has float32[768,8]"),
        (lambda leaf: leaf.astype("float16"), "expected float32[768,16], the checkpoint has float16[768,16]"),
    ],
    ids=["shape", "dtype"],
)
def test_f38_a_checkpoint_of_another_shape_or_type_is_refused_naming_the_leaf(change, fault, killed, state, tmp_path):
    from lib.model.storage import save_tree
    from lib.training.checkpoints import logs_of

    folder = copied(killed, tmp_path / "copy")
    fault = fault.replace("768", str(state.params["embedding"].shape[0]))
    other = state._replace(params=state.params | {"embedding": change(state.params["embedding"])})
    save_tree(folder / "checkpoints" / "30", other, logs=logs_of(folder))
    with pytest.raises(RequestError, match=re.escape(f"checkpoints/30: leaf .params['embedding']: {fault}")):
        restored(folder, state)
    assert (folder / "checkpoints" / "30" / "digest.json").is_file()


@pytest.mark.parametrize("field, leaf", [("embed_dim", "['embedding']"), ("hidden_dim", "['down']")])
def test_f38_a_tuned_model_of_another_shape_is_refused_naming_the_leaf(field, leaf, copy):
    from lib.model.weights import load_model, read_about

    about = read_about(copy / "checkpoint-final")
    about["config"][field] *= 2
    write_json(copy / "checkpoint-final" / "model.json", sealed(about))
    with pytest.raises(RequestError, match=rf"leaf .*{re.escape(leaf)}: expected float32\[.*, the checkpoint has "):
        load_model(copy / "checkpoint-final")


# ---- a full disk -------------------------------------------------------------------------------------------

FULL_DISK = r"(No space left on device|File too large)"


def fill_disk(folder: Path, whole: Path) -> dict[str, Any]:
    """What came of each fault of full_disk.py, and by what the disk was full."""
    folder.mkdir()
    mount = ["sh", "-c", 'mount -t tmpfs -o size=32m none "$0" && exec "$@"', str(folder)]
    ways = {"tmpfs": ["unshare", "-m", *mount], "tmpfs of a user's own": ["unshare", "-rm", *mount]}
    by = next((by for by, way in ways.items() if shutil.which("unshare") and works([*way, "true"])), "limit")
    words = [*ways.get(by, []), sys.executable, full_disk.__file__, str(folder), by.split()[0]]
    words.append(str(whole / "train.tunix_sft.jsonl"))
    done = subprocess.run(words, cwd=repository_root(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3_000:]
    assert "Traceback" not in done.stderr, done.stderr[:3_000]
    return {"by": by} | json.loads(done.stdout)


def works(words: list[str]) -> bool:
    return subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture
def on_full_disk(meanwhile: dict[str, Future]) -> dict[str, Any]:
    return meanwhile["disk"].result()


def test_f27_f28_the_disk_was_full_and_in_what_way(on_full_disk, capsys):
    with capsys.disabled():
        print(f"\nfull disk, by: {on_full_disk['by']}")
    assert on_full_disk["by"] in ("tmpfs", "tmpfs of a user's own", "limit")


@pytest.mark.parametrize("what", ["store", "dataset", "export", "report", "notebook", "manifest"])
def test_f28_on_a_full_disk_the_files_of_before_stay_and_one_line_says_so(what, on_full_disk):
    found = on_full_disk[what]
    for tried in found["tries"]:
        assert tried["status"] == 1 and tried["intact"], tried
        assert one_line(tried["said"]) and re.search(FULL_DISK, tried["said"]), tried
        assert re.match(r"error: \S+.*/", tried["said"]), tried
    assert found["after"] == 0  # as soon as there is room


def test_f28_a_run_on_a_full_disk_is_failed_or_where_no_manifest_has_room_stale(on_full_disk):
    assert [tried["run"] for tried in on_full_disk["manifest"]["tries"]] == ["stale", "failed"]
    assert on_full_disk["store"]["grew"]


def test_f27_a_checkpoint_that_has_no_room_fails_the_training_and_the_one_before_is_gone_on_from(on_full_disk, whole):
    found = on_full_disk["checkpoint"]
    [failed] = found["tries"]
    assert failed["status"] == 1 and one_line(failed["said"]) and failed["run"] == "failed"
    assert re.search(rf"checkpoints/2: cannot be written \({FULL_DISK}\)", failed["said"])
    assert failed["intact"] and found["whole"] == ["1"]  # and nothing of the second is left
    weights = read_manifest(whole)["metrics"]["weights_sha256"]  # of the same file and settings, undisturbed
    assert found["after"] == 0 and "resumed from step 1" in found["resumed"] and weights in found["resumed"]


def test_f27_what_is_written_after_a_save_has_failed_is_removed_too(tmp_path, monkeypatch):
    """As by TensorStore, whose other writes go on after the first that fails, and make the folder anew."""
    from lib.model.storage import ocp, save_tree

    class Late:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def save(self, folder, _):
            self.folder = folder
            threading.Timer(0.2, self.write).start()
            raise ValueError("[os_error_code='28']")

        def write(self):
            self.folder.mkdir(parents=True)
            (self.folder / "late").write_text("x")
            written.set()

    written = threading.Event()
    monkeypatch.setattr(ocp, "StandardCheckpointer", Late)
    with pytest.raises(RetraceError, match=r"2: cannot be written \(No space left on device\)"):
        save_tree(tmp_path / "2", {"leaf": np.ones(3, np.float32)})
    assert written.is_set() and not any(tmp_path.iterdir())


# ---- short memory ------------------------------------------------------------------------------------------

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]) << 20,) * 2)
os.execv(sys.executable, [sys.executable, "-m", "lib", *sys.argv[2:]])
"""


class Limited(NamedTuple):
    """What a command came to that was given so little memory, in a home of its own, and which processes it left."""

    status: int
    err: str
    home: Path
    left: list[psutil.Process]


def limit_memory(megabytes: int, home: Path, *words: str | Path) -> Limited:
    """The command as after `ulimit -v`."""
    begun = [sys.executable, "-c", LIMITED, str(megabytes), *map(str, words)]
    environment = os.environ | {"RETRACE_HOME": str(home)}
    done = subprocess.run(begun, cwd=repository_root(), env=environment, capture_output=True, text=True)
    left = [process for process in psutil.process_iter() if home_of(process) == str(home)]
    return Limited(done.returncode, done.stderr, home, left)


def home_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("RETRACE_HOME", "")
    except psutil.Error:
        return ""


def test_f29_a_training_out_of_memory_says_what_to_halve(meanwhile):
    done: Limited = meanwhile["memory of a training"].result()
    assert done.status == 1 and one_line(done.err), done.err[-2_000:]
    assert "ran out of memory" in done.err and "halve training.per_device_batch_size" in done.err
    manifest = read_manifest(done.home / "out")
    assert manifest["status"] == "failed" and done.err == f"error: {manifest['error']}\n"


def test_f29_where_memory_is_not_enough_to_begin_no_traceback_is_shown(meanwhile):
    done: Limited = meanwhile["memory to begin"].result()
    assert done.status not in (0, 2) and "Traceback" not in done.err, done.err
    out = done.home / "out"
    assert not (out / "run_manifest.json").exists() and not (out / "checkpoint-final").exists()


def test_f29_a_run_out_of_memory_is_failed_and_no_kernel_is_left(meanwhile):
    done: Limited = meanwhile["memory of a run"].result()
    assert done.status == 1 and one_line(done.err), done.err[-2_000:]
    [folder] = done.home.glob("*_toy")
    manifest = read_manifest(folder)
    assert manifest["status"] == "failed" and done.err == f"error: {manifest['error']}\n"
    assert "04_evaluate_before: " in manifest["error"] and "halve evaluation.batch_size" in manifest["error"]
    assert not done.left


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 64 bytes."),
        jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 64 bytes."),
        ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 64 bytes."),
        MemoryError("Unable to allocate 64 bytes"),
        MemoryError(),
    ],
)
def test_f29_memory_that_is_short_is_said_in_one_line_whichever_way_jax_or_numpy_says_it(error: Exception):
    with pytest.raises(RetraceError) as caught, explained("answering", "halve evaluation.batch_size"):
        raise error
    said = str(error) or "MemoryError"
    assert str(caught.value) == f"answering ran out of memory ({said}); halve evaluation.batch_size"


def test_f29_what_is_not_a_want_of_memory_keeps_its_own_error():
    for error in (ValueError("shapes do not match"), jax.errors.JaxRuntimeError("INTERNAL: a bug")):
        with pytest.raises(type(error)) as caught, explained("answering", "halve evaluation.batch_size"):
            raise error
        assert caught.value is error


# ---- folders that may not be read or written ---------------------------------------------------------------

WRITING = {
    "traces import": ["traces", "import", "{run}/train.tunix_sft.jsonl"],
    "traces generate": ["traces", "generate", "--game", "high_card_duel", "--count", "2"],
    "dataset build": ["dataset", "build", "--name", "other", "--version", "v1"],
    "run": ["run", "configs/smoke.yaml"],
    "train": [*TRAIN, "--data", "{run}/train.tunix_sft.jsonl", "--output", "{home}/out"],
    "eval generate": ["eval", "generate", "--model", "{run}/checkpoint-final", "--eval-set", "high_card_duel_v1",
                      "--output", "{home}/out.jsonl"],
    "eval report": ["eval", "report", "--before", "{run}/eval_before.jsonl", "--after", "{run}/eval_after.jsonl",
                    "--output", "{home}/out.md"],
    "runs list --html": ["runs", "list", "--html"],
}  # fmt: skip
READING = {
    "runs list": ["runs", "list"],
    "runs show": ["runs", "show", "{name}"],
    "runs verify": ["runs", "verify", "{name}"],
    "runs verify --all": ["runs", "verify", "--all"],
    "traces list": ["traces", "list"],
    "dataset list": ["dataset", "list"],
}


def give_as_ordinary_user(base: Path, whole: Path) -> dict[tuple[str, str], damage.Said]:
    """(home, command) → what it came to: a home that may be read alone, one that may not even be, one that is missing
    below a folder that may not be written, and one that is a file."""
    homes = {"read-only": base / "read-only", "unreadable": base / "unreadable",
             "missing": base / "read-only" / "missing", "file": base / "file"}  # fmt: skip
    copied(whole.parent, homes["read-only"])
    homes["unreadable"].mkdir()
    homes["file"].write_text("")
    for path in [homes["read-only"], *homes["read-only"].rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    homes["unreadable"].chmod(0)
    wanted = {
        (kind, label): [word.format(run=whole, home=home, name=whole.name) for word in words]
        for kind, home in homes.items()
        for label, words in (WRITING | READING).items()
    }
    commands = [[str(homes[kind]), *words] for (kind, _), words in wanted.items()]
    words = [sys.executable, ordinary.__file__, json.dumps(commands)]
    done = subprocess.run(words, cwd=repository_root(), capture_output=True, text=True)
    for path in [homes["unreadable"], homes["read-only"], *homes["read-only"].rglob("*/")]:
        path.chmod(0o755)  # or pytest could not remove it
    assert done.returncode == 0, done.stderr[-3_000:]
    return {key: damage.Said(*found) for key, found in zip(wanted, json.loads(done.stdout), strict=True)}


@pytest.fixture
def as_ordinary_user(meanwhile: dict[str, Future]) -> dict[tuple[str, str], damage.Said]:
    return meanwhile["permissions"].result()


@pytest.mark.parametrize("what", WRITING)
@pytest.mark.parametrize("kind", ["read-only", "unreadable", "missing", "file"])
def test_f30_what_cannot_be_written_is_refused_in_one_line(kind, what, as_ordinary_user):
    said = as_ordinary_user[kind, what]
    if what == "runs list --html" and kind == "missing":  # there is no run to make a page of
        assert said.status == 0 and said.out.startswith("no run yet"), said
        return
    assert said.status == 2 and one_line(said.err), said
    nothing_there = what == "dataset build" and kind == "missing"
    reasons = "is empty" if nothing_there else "Permission denied|Not a directory|File exists"
    assert re.search(reasons, said.err) and re.search(r"/(read-only|unreadable|missing|file)", said.err), said


@pytest.mark.parametrize("what", READING)
def test_f30_a_home_that_may_only_be_read_is_read(what, as_ordinary_user):
    assert as_ordinary_user["read-only", what].status == 0, as_ordinary_user["read-only", what]


@pytest.mark.parametrize("what", READING)
def test_f30_a_home_that_may_not_be_read_is_not_taken_for_an_empty_one(what, as_ordinary_user):
    said = as_ordinary_user["unreadable", what]
    assert said.status == 2 and one_line(said.err) and "Permission denied" in said.err, said


@pytest.mark.parametrize("what", READING)
def test_f30_a_home_that_is_not_there_yet_is_an_empty_one(what, as_ordinary_user):
    said = as_ordinary_user["missing", what]
    assert (said.status, said.err) == (0, "") or what in ("runs show", "runs verify") and said.status == 2, said
