"""Lengths before training: of a dataset and of its file alike, by its own tokenizer and by any other."""

import shutil
from pathlib import Path

import pytest

from lib.__main__ import main
from lib.config import DatasetConfig
from lib.data.dataset import Dataset, build_dataset
from lib.data.store import Store
from lib.data.tokenizer import train_tokenizer
from lib.data.validation import recorded_lengths
from lib.errors import RequestError, RetraceError
from lib.experiments.lengths import measure
from lib.tasks import high_card_duel


@pytest.fixture
def duel(home: Path) -> Dataset:
    store = Store(home / "store")
    store.add(high_card_duel.generate(40, seed=0, created_at="2025-01-01T00:00:00Z"))
    return build_dataset(store, DatasetConfig("duel", "v1"), {}, home / "datasets")


@pytest.fixture
def file(duel: Dataset, tmp_path: Path) -> Path:
    assert main(["dataset", "export", "duel-v1", "--format", "messages", "--output", str(tmp_path / "f.jsonl")]) == 0
    return tmp_path / "f.jsonl"


def test_a_dataset_and_the_file_of_it_have_the_same_lengths(duel: Dataset, file: Path):
    recorded = recorded_lengths(duel.manifest["lengths"])
    assert measure("duel-v1") == (40, recorded, "by the tokenizer of the dataset")
    assert measure(str(file)) == (40, recorded, "by a tokenizer learned from the file")
    assert measure("duel-v1", str(duel.tokenizer_file)) == (40, recorded, f"by {duel.tokenizer_file}")


def test_another_tokenizer_is_a_file_or_the_folder_of_a_release(duel: Dataset, file: Path, tmp_path: Path):
    folder = tmp_path / "release"
    folder.mkdir()
    train_tokenizer(["none of it"]).save(folder / "tokenizer.json")
    found = [measure(name, str(by)) for name in ("duel-v1", str(file)) for by in (folder, folder / "tokenizer.json")]
    assert all(one[:2] == found[0][:2] for one in found) and found[0].by == f"by {folder}"
    assert found[0].lengths.mean > 2 * measure("duel-v1").lengths.mean
    with pytest.raises(RequestError, match="model nobody/nothing: not on this machine"):
        measure("duel-v1", "nobody/nothing")


def test_a_tokenizer_in_the_cache_of_the_hub_serves_without_the_weights(
    duel: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = tmp_path / "hub" / "models--nobody--gemma" / "snapshots" / ("a" * 40)
    (commit.parents[1] / "refs").mkdir(parents=True)
    (commit.parents[1] / "refs" / "main").write_text("a" * 40)
    train_tokenizer(["none of it"]).save(commit / "tokenizer.json")
    assert measure("duel-v1", "nobody/gemma").lengths == measure("duel-v1", str(commit / "tokenizer.json")).lengths


def test_samples_are_of_all_the_dataset(duel: Dataset):
    traces = list(duel.traces)
    found = measure("duel-v1", samples=4)
    assert (found.examples, found.lengths.examples) == (40, 4)
    assert {one.id for one in found.lengths.longest} == {traces[place].id for place in (0, 10, 20, 30)}


def test_all_are_measured_where_the_manifest_tells_of_some(duel: Dataset, monkeypatch: pytest.MonkeyPatch):
    whole = measure("duel-v1")
    monkeypatch.setattr("lib.data.dataset.MEASURED", 4)
    shutil.rmtree(duel.folder)
    some = build_dataset(Store(duel.folder.parents[1] / "store"), DatasetConfig("duel", "v1"), {}, duel.folder.parent)
    assert some.manifest["lengths"]["examples"] == 4
    assert measure("duel-v1") == whole and whole.lengths.examples == 40


@pytest.mark.parametrize("format", ["trace", "messages"])
@pytest.mark.parametrize("recipe", ["trace_sft_v1", "answer_sft_v1", "shuffled_answers"])
def test_an_export_of_any_recipe_is_measured(recipe: str, format: str, duel: Dataset, tmp_path: Path):
    file = str(tmp_path / "f.jsonl")
    assert main(["dataset", "export", "duel-v1", "--format", format, "--recipe", recipe, "--output", file]) == 0
    assert measure(file).examples == 40


def test_a_damaged_dataset_is_not_measured(duel: Dataset):
    (duel.folder / "traces.parquet").write_bytes(b"")
    with pytest.raises(RetraceError, match="traces.parquet: not what the manifest recorded"):
        measure("duel-v1")


def test_validate_tells_what_would_not_fit_and_the_longest(duel: Dataset, capsys: pytest.CaptureFixture):
    longest, *_ = recorded_lengths(duel.manifest["lengths"]).longest
    assert main(["dataset", "validate", "duel-v1", "--max-length", str(longest.tokens)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("duel-v1: 40 examples, ") and f"; max_length {longest.tokens}\n" in told
    assert told.endswith(f"all fit; the longest is {longest.id} ({longest.tokens} tokens)\n")
    assert main(["dataset", "validate", "duel-v1", "--samples", "3"]) == 0
    assert "\n3 of 40 measured: all fit; the longest is " in capsys.readouterr().out
    assert main(["dataset", "validate", "duel-v1", "--max-length", str(longest.tokens - 1)]) == 1
    error = capsys.readouterr().err
    assert f" of 40 examples are longer than model.max_length {longest.tokens - 1}: {longest.id} (" in error
