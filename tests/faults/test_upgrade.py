"""Files that an earlier release wrote (tests/fixtures/v1) are read; a version unknown here is refused by name."""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from lib.config import TrainingConfig, load_config
from lib.data.dataset import load_dataset
from lib.data.export import FORMATS, read_examples
from lib.data.importing import Accepted, read_traces
from lib.data.store import Store
from lib.errors import RequestError, RetraceError
from lib.evaluation.evalsets import load_eval_set
from lib.evaluation.results import read_results
from lib.experiments.evidence import read_record
from lib.experiments.run import read_manifest
from lib.experiments.verify import verify_run
from lib.files import repository_root, sealed, sha256_file, write_json
from lib.model.storage import restore_tree, tree_digest
from lib.model.weights import load_model, read_about
from lib.tasks import high_card_duel
from lib.trace import content_sha256
from lib.training.checkpoints import restore_latest
from lib.training.optimizer import make_optimizer
from lib.training.step import TrainState

WRITTEN = repository_root() / "tests" / "fixtures" / "v1"
TRACES = list(high_card_duel.generate(3, seed=0, created_at="2026-01-01T00:00:00.000000Z"))
CONTENT = [content_sha256(trace) for trace in TRACES]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy, as reading is not to be trusted with the only one."""
    return shutil.copytree(WRITTEN, tmp_path / "v1")


@pytest.mark.parametrize(
    "names, refused", [([], "expected the name of the new folder, such as v2"), (["v1"], "v1: written already")]
)
def test_what_was_written_is_never_written_again_and_a_new_folder_is_named(
    names: list[str], refused: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["make.py", *names])
    with pytest.raises(SystemExit, match=refused):
        runpy.run_path(str(WRITTEN.parent / "make.py"), run_name="__main__")


@pytest.mark.parametrize("name", ["trace", *FORMATS])
def test_f50_traces_and_exports_import_to_the_same_content(name, files):
    records = list(read_traces(files / f"{name}.jsonl"))
    assert all(isinstance(record, Accepted) for record in records), records
    assert [content_sha256(record.trace) for record in records] == CONTENT
    if name != "trace":
        assert [example.prompt for example in read_examples(files / f"{name}.jsonl")] == [t.prompt for t in TRACES]


def test_f50_store_and_dataset_hold_the_same_traces(files):
    assert sorted(map(content_sha256, Store(files / "store").scan())) == sorted(CONTENT)
    dataset = load_dataset(files / "datasets", "toy-v1")
    assert sorted(map(content_sha256, dataset.traces)) == sorted(CONTENT)
    assert dataset.manifest["trace_count"] == 3


def test_f50_eval_set_and_evaluation_are_read(files):
    eval_set, results = load_eval_set(files / "toy.jsonl"), read_results(files / "run" / "eval_before.jsonl")
    assert [item.id for item in eval_set.items] == [item.id for item in results.items]
    assert results.eval_set_sha256 == eval_set.sha256 and all(item.checks for item in results.items)
    assert all(isinstance(record, Accepted) for record in read_traces(files / "run" / "eval_before.jsonl"))


def test_f50_a_run_is_read_and_verified(files):
    manifest = read_manifest(files / "run")
    assert (manifest["status"], manifest["dataset_key"]) == ("done", "toy-v1") and verify_run(files / "run") == []
    assert load_config(files / "run" / "config.yaml").training.learning_rate == 1e-5
    assert read_record(files / "run" / "evidence.json")["results"]["losses"] == [[1, 0.5, 1.0, 1e-5, None]]


def test_f50_checkpoints_restore_to_the_digest_they_were_saved_with(files):
    model = load_model(files / "run" / "checkpoint-final")
    assert model.weights_sha256 == read_about(files / "run" / "checkpoint-final")["weights_sha256"]
    tree = restore_tree(files / "checkpoint", {"a": jnp.zeros((2, 3)), "b": jnp.int32(0)})
    assert np.array_equal(tree["a"], [[0, 1, 2], [3, 4, 5]]) and int(tree["b"]) == 7


def test_f50_a_training_goes_on_from_the_checkpoint_and_the_logs_of_an_earlier_release(files):
    model, training = load_model(files / "run" / "checkpoint-final"), TrainingConfig(num_steps=4, checkpoint_every=2)
    optimizer, _ = make_optimizer(training)
    like, told = TrainState(jnp.int32(0), model.params, optimizer.init(model.params)), []
    assert len((files / "training" / "metrics.jsonl").read_text().splitlines()) == 3
    state = restore_latest(files / "training" / "checkpoints", like, told.append)
    [line] = (files / "training" / "checkpoints.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 2, "sha256": tree_digest(state)} and int(state.step) == 2 and not told
    steps = [json.loads(line)["step"] for line in (files / "training" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


FINAL = "run/checkpoint-final"
UNKNOWN: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "dataset": ("datasets/toy-v1/manifest.json", "dataset_schema_version", lambda v: load_dataset(v, "toy-v1")),
    "manifest": ("run/run_manifest.json", "manifest_version", lambda v: read_manifest(v)),
    "evidence": ("run/evidence.json", "evidence_version", lambda v: read_record(v / "evidence.json")),
    "model": (f"{FINAL}/model.json", "format_version", lambda v: load_model(v)),
    "checkpoint": ("checkpoint/digest.json", "format_version", lambda v: restore_tree(v, {"a": jnp.zeros((2, 3))})),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_f50_a_version_unknown_here_is_refused_by_its_name(name, files):
    file, field, read = UNKNOWN[name]
    record = json.loads((files / file).read_bytes()) | {field: "9.9"}
    write_json(files / file, sealed(record))
    with pytest.raises(RetraceError, match=f"{field} '9.9' is not known"):
        read((files / file).parent.parent if name == "dataset" else (files / file).parent)


def test_f50_a_trace_of_a_version_unknown_here_is_refused_by_its_name(files):
    lines = [json.loads(line) | {"trace_version": "9.9"} for line in (files / "trace.jsonl").read_text().splitlines()]
    (files / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = list(read_traces(files / "trace.jsonl"))
    assert {record.field for record in records} == {"trace_version"} and {record.got for record in records} == {"'9.9'"}


@pytest.mark.parametrize("name", FORMATS)
def test_f50_an_export_of_a_version_unknown_here_is_refused_by_its_name(name, files):
    file = files / f"{name}.jsonl"
    file.write_text(file.read_text().replace('"trace_version": "1.0"', '"trace_version": "9.9"'))
    records = list(read_traces(file))
    assert {record.field for record in records} == {"metadata.trace_version"}
    assert {record.got for record in records} == {"'9.9'"}
    with pytest.raises(RequestError, match=f"{name}.jsonl:1: metadata.trace_version: '9.9' is not known, only '1.0'"):
        read_examples(file)


def test_f50_an_evaluation_of_a_version_unknown_here_is_refused_by_its_name(files):
    file = files / "run" / "eval_before.jsonl"
    file.write_text(file.read_text().replace('"trace_version": "1.0"', '"trace_version": "9.9"'))
    with pytest.raises(RequestError, match=r"eval_before.jsonl:1: .*trace_version '9.9' is not known, only '1.0'"):
        read_results(file)
    assert {record.got for record in read_traces(file)} == {"'9.9'"}


def test_f50_a_store_with_traces_of_a_version_unknown_here_is_refused_by_its_name(files):
    [segment] = (files / "store").glob("*.parquet")
    later = pl.col("record").str.replace('"trace_version":"1.0"', '"trace_version":"9.9"', literal=True)
    pl.read_parquet(segment).with_columns(later).write_parquet(segment)
    segment.rename(segment.with_stem(sha256_file(segment)))
    with pytest.raises(RequestError, match=r"store segment .*: trace_version '9.9' is not known, only '1.0'"):
        list(Store(files / "store").scan())
