"""Exported: the model that was tuned, verified and whole; its card says what the manifest says, and nothing else."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from hostile import PAYLOADS
from markdown_it import MarkdownIt
from safetensors.numpy import load_file

from lib.__main__ import main
from lib.config import Config, DatasetConfig, LoraConfig, ModelConfig, TracesConfig, build, parse_yaml
from lib.data.dataset import Dataset
from lib.errors import RequestError
from lib.evaluation.compare import Comparison, figures
from lib.experiments.export import export_model
from lib.experiments.manifest import hash_files, write_manifest
from lib.experiments.model_card import hub_name
from lib.experiments.stages import command
from lib.files import sealed, sha256_file, write_json
from lib.model import releasing
from lib.model.gemma import GENERATIONS
from lib.model.lora import join, merged, split
from lib.model.released_weights import read_weights
from lib.model.storage import tree_digest
from lib.model.weights import Model, abstract, base_model, load_model, save_model, with_lora, without_lora

CONFIG = Config(
    "duel", DatasetConfig("duel", "v1"), traces=TracesConfig("high_card_duel", 10), model=ModelConfig("toy")
)


def tuned(folder: Path, model: Model, instruction: str = "") -> Path:
    """A checkpoint as training leaves it."""
    training = asdict(CONFIG.training)
    save_model(
        folder, model, system_instruction=instruction, fingerprint={"python": "3.11.7", "jax": "0.10.2", "nproc": "2"},
        inputs={"base_weights_sha256": "b" * 64, "examples_sha256": "e" * 64, "training": training},
        training={"steps": 100, "examples": 154, "held_out": 7, "loss": 0.5, "held_out_loss": 0.75},
    )  # fmt: skip
    return folder


def recorded(folder: Path, config: Config, **changed) -> Path:
    """A run that came to its end with this checkpoint."""
    facts = {
        "status": "done",
        "identity": {"run_id": "63f6a99a-5f3e", "created_at": "2026-11-22T10:15:00Z"},
        "attempts": [{"git_sha": "c" * 40, "git_dirty": False}],
        "inputs": {
            "dataset": {"key": "duel-v1", "content_sha256": "d" * 64},
            "eval_set": {"name": "high_card_duel_v1", "sha256": "f" * 64},
        },
        "metrics": {},
    }
    write_manifest(
        folder, config, artifacts=hash_files(folder), wall_s={}, fingerprint={"python": "3.11.7"}, **(facts | changed)
    )
    return folder


@pytest.fixture
def run(home: Path, small_model: Model, comparison_of: Callable[[list[str]], Comparison]) -> Path:
    folder = home / "20261122_101500_duel"
    tuned(folder / "checkpoint-final", small_model)
    return recorded(folder, CONFIG, metrics={"evaluation": figures(comparison_of(["plain text"]))})


def card(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """The first cell of each row of a table → the others, without the escapes of Markdown."""
    lines = [re.sub(r"\\(.)", r"\1", line) for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {first: rest for first, *rest in cells}


def refused(capsys: pytest.CaptureFixture, *words: object, status: int = 2) -> str:
    assert main(["export", *map(str, words)]) == status
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    return told


# ---- the folder -----------------------------------------------------------------------------------------------


def test_a_run_by_its_name_its_folder_or_its_checkpoint_exports_the_same_model(
    run: Path, small_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture
):
    for number, name in enumerate([run.name, run, run / "checkpoint-final"]):
        folder = tmp_path / f"out{number}"
        assert main(["export", str(name), "--to", str(folder)]) == 0
        told = capsys.readouterr().out
        assert str(folder) in told and f"weights sha256 {small_model.weights_sha256[:16]}" in told
        found = base_model(str(folder), seed=0, tokenizer_file=Path("none"))
        assert (found.config, found.weights_sha256) == (small_model.config, small_model.weights_sha256)
        assert (folder / "tokenizer.json").read_bytes() == (run / "checkpoint-final" / "tokenizer.json").read_bytes()


def test_the_instruction_of_training_is_in_the_template_and_on_the_card(small_model: Model, tmp_path: Path):
    checkpoint = tuned(tmp_path / "tuned", small_model, 'Be "brief".')
    export_model(str(checkpoint), tmp_path / "out")
    about = json.loads((tmp_path / "out" / "tokenizer_config.json").read_bytes())
    assert r'"Be \"brief\"."' in about["chat_template"] and '```text\nBe "brief".\n```' in card(tmp_path / "out")


# ---- the card -------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_manifest_says(run: Path, small_model: Model, tmp_path: Path):
    export_model(run.name, tmp_path / "out", "bfloat16")
    text, manifest = card(tmp_path / "out"), json.loads((run / "run_manifest.json").read_bytes())
    evaluation, found = manifest["metrics"]["evaluation"], rows(text)
    said = {
        "run": run.name, "run id": "63f6a99a-5f3e", "dataset": "duel-v1", "dataset sha256": "d" * 64,
        "eval set": "high_card_duel_v1", "eval set sha256": "f" * 64, "commit": "c" * 40, "base": "toy",
        "weights sha256": small_model.weights_sha256, "base weights sha256": "b" * 64, "status": "done",
        "examples trained on": "154", "examples held out": "7", "steps": "100", "peak learning rate": "1e-05",
        "fingerprint": "python 3.11.7, jax 0.10.2, nproc 2",
        "numbers in these files": "bfloat16, rounded from the float32 that everything here was found with",
        "tokenizer sha256": sha256_file(tmp_path / "out" / "tokenizer.json"),
    }  # fmt: skip
    assert {name: found[name] for name in said} == {name: [value] for name, value in said.items()}
    assert found["items"] == [str(evaluation["n"])] * 2
    sides = [evaluation[name] for name in ("before", "after")]
    low, high = sides[1]["interval"]
    assert found["accuracy (95 % interval)"][1] == (
        f"{100 * sides[1]['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    )
    assert [found[name] for name in ("correct", "wrong")] == [
        [str(side[name]) for side in sides] for name in ("correct", "wrong")
    ]
    assert evaluation["sentence"] in re.sub(r"\\(.)", r"\1", text)


def test_the_card_makes_up_no_figure_of_reasoning_and_states_the_whole_rule(run: Path, tmp_path: Path):
    evaluation = json.loads((run / "run_manifest.json").read_bytes())["metrics"]["evaluation"]
    export_model(run.name, tmp_path / "checked")
    assert rows(card(tmp_path / "checked"))["all steps true"] == ["0 of 2"] * 2
    for side in ("before", "after"):
        evaluation[side] |= {"steps_checked": 0, "all_steps_correct": 0, "right_answer_wrong_reasoning": 0}
    recorded(run, CONFIG, metrics={"evaluation": evaluation})
    export_model(run.name, tmp_path / "out")
    text, found = card(tmp_path / "out"), rows(card(tmp_path / "out"))
    assert found["all steps true"] == found["right answer, wrong reasoning"] == ["not checkable"] * 2
    assert "improved only where a constant answer is beaten, too" in text


def test_the_configuration_on_the_card_is_the_one_of_the_run(run: Path, tmp_path: Path):
    export_model(run.name, tmp_path / "out")
    text = card(tmp_path / "out")
    [given] = [block for block in re.findall(r"```text\n(.*?)\n```", text, re.DOTALL) if block.startswith("name: ")]
    assert build(Config, parse_yaml(given, "card"), "card") == CONFIG
    assert f"python -m lib runs reproduce {run.name}\n" in text


def test_a_checkpoint_by_itself_has_no_accuracy_and_no_run(run: Path, tmp_path: Path):
    export_model(str(run / "checkpoint-final"), tmp_path / "out")
    text, found = card(tmp_path / "out"), rows(card(tmp_path / "out"))
    assert "No evaluation is recorded of this model." in text and "## Reproduce" not in text
    assert found.keys().isdisjoint({"run", "run id", "status", "dataset", "commit", "items"})
    assert found["examples trained on"] == ["154"] and "weights sha256" in found


def test_a_run_without_an_evaluation_or_with_changes_says_so(run: Path, tmp_path: Path):
    attempts = [{"git_sha": "c" * 40, "git_dirty": True, "git_patch_sha256": "9" * 64}]
    inputs = {"data": {"file": "my data.jsonl", "sha256": "a" * 64}}
    recorded(run, CONFIG, inputs=inputs, attempts=attempts, status="failed", error="it failed")
    export_model(run.name, tmp_path / "out")
    text, found = card(tmp_path / "out"), rows(card(tmp_path / "out"))
    assert "No evaluation is recorded of this model." in text and found["error"] == ["it failed"]
    assert found["commit"] == [f"{'c' * 40}, with uncommitted changes of sha256 {'9' * 64}"]
    assert found["training file sha256"] == ["a" * 64]
    assert "train --config config.yaml --data 'my data.jsonl' --output again" in text


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    "base, named",
    [
        ("google/gemma-2b-it", "google/gemma-2b-it"), ("tiny", None), ("/models/gemma", None), ("./gemma", None),
        ("models/of/gemma", None), ("a/b\nlicense: mit", None), ("x/../y", None),
    ],
)  # fmt: skip
def test_the_header_names_the_base_where_it_has_a_name_on_the_hub(
    base: str, named: str | None, small_model: Model, tmp_path: Path
):
    checkpoint = tuned(tmp_path / "tuned", small_model._replace(name=base))
    export_model(str(checkpoint), tmp_path / "out")
    found = header(card(tmp_path / "out"))
    assert found.get("base_model") == named and "license" not in found and "language" not in found
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
    assert "/home/me" not in card(tmp_path / "out")


def test_a_folder_of_this_machine_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("my/gemma") == "my/gemma"
    (tmp_path / "my" / "gemma").mkdir(parents=True)
    assert hub_name("my/gemma") == ""


def test_what_others_wrote_is_no_markup_on_the_card(
    home: Path, small_model: Model, comparison_of: Callable, tmp_path: Path
):
    hostile = "\n".join(PAYLOADS.values())
    found = figures(comparison_of([hostile])) | {"sentence": hostile}
    checkpoint = tuned(home / "duel" / "checkpoint-final", small_model._replace(name=hostile), hostile)
    inputs = {name: dict.fromkeys(("key", "content_sha256", "name", "sha256", "file"), hostile)
              for name in ("dataset", "eval_set", "data")}  # fmt: skip
    config = replace(CONFIG, system_instruction=hostile, model=ModelConfig(hostile))
    recorded(checkpoint.parent, config, metrics={"evaluation": found}, inputs=inputs, error=hostile)
    export_model("duel", tmp_path / "out")
    text = card(tmp_path / "out")
    body = text.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    within = {child.type for token in tokens for child in token.children or []}
    assert within <= {"text", "softbreak", "strong_open", "strong_close", "code_inline"}
    headings = [after.content for mark, after in zip(tokens, tokens[1:], strict=False) if mark.type == "heading_open"]
    assert headings == ["duel", "Evaluation", "Use", "Training", "Record", "Reproduce", "Licence"]
    assert not {token.type for token in tokens} & {"html_block", "code_block", "blockquote_open", "bullet_list_open"}
    assert set(header(text)) == {"library_name", "pipeline_tag", "tags"}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


# ---- what is refused ------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused_and_stays_as_it_is(run: Path, tmp_path: Path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    assert "there is something already; give a folder that is new or empty" in refused(capsys, run, "--to", taken)
    assert "there is something already" in refused(capsys, run, "--to", taken / "mine")
    assert f"{taken / 'mine'}: File exists" in refused(capsys, run, "--to", taken / "mine" / "out")
    assert [path.name for path in tmp_path.rglob("*") if "home" not in path.parts] == ["taken", "mine"]


def test_a_folder_within_the_run_is_refused(run: Path, capsys):
    for inside in (run / "exported", run / "checkpoint-final" / "exported"):
        assert "lies in what is exported" in refused(capsys, run.name, "--to", inside)
        assert not inside.exists()


def test_what_fails_on_the_way_leaves_nothing(run: Path, tmp_path: Path, capsys, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(releasing, "write_weights", full)
    told = refused(capsys, run, "--to", tmp_path / "out", status=1)
    assert told == f"error: {tmp_path / 'out'}: No space left on device\n"
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys):
    largest = max((run / "checkpoint-final" / "weights").rglob("*"), key=lambda path: path.stat().st_size)
    flip(largest)
    assert "checkpoint-final" in refused(capsys, run, "--to", tmp_path / "out", status=1)
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


def test_another_checkpoint_than_the_recorded_one_is_not_exported(run: Path, two_layer_model: Model, tmp_path, capsys):
    tuned(run / "checkpoint-final", two_layer_model)
    assert load_model(run / "checkpoint-final")
    assert "not the model that run_manifest.json records" in refused(capsys, run, "--to", tmp_path / "out", status=1)


def test_a_run_that_is_not_there_not_trained_or_not_concluded_is_refused(
    run: Path, small_model: Model, home: Path, tmp_path: Path, capsys
):
    to = ("--to", tmp_path / "out")
    assert "run absent: no such run in " in refused(capsys, "absent", *to)
    (home / "dry").mkdir()
    recorded(home / "dry", CONFIG, status="dry_run")
    assert "not trained to its end (no checkpoint-final); give its train command again" in refused(capsys, "dry", *to)
    (home / "dry" / "config.yaml").touch()  # as a run has it
    assert command("resume", "dry") in refused(capsys, "dry", *to)
    (run / "run_manifest.json").rename(run / "state.json")
    assert "no run_manifest.json; its status is " in refused(capsys, run.name, *to)
    write_json(run / "run_manifest.json", sealed({"manifest_version": "9"}))
    assert "damaged" in refused(capsys, run.name, *to)
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


def test_a_shape_that_transformers_does_not_have_is_refused(small_model: Model, tmp_path: Path):
    odd = small_model._replace(config=replace(small_model.config, logit_cap=20.0))
    with pytest.raises(RequestError, match="no gemma of transformers has its shape"):
        export_model(str(tuned(tmp_path / "tuned", odd)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- LoRA ---------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(home: Path, dataset: Dataset, tmp_path: Path) -> Path:
    """A checkpoint of adapters that have moved."""
    return adapted_to("float32", dataset, tmp_path)


def adapted_to(dtype: str, dataset: Dataset, tmp_path: Path) -> Path:
    base = base_model("tiny", 42, dataset.tokenizer_file, dtype)
    model = with_lora(base, LoraConfig(rank=2), seed=1)
    frozen, adapters = split(model.params)
    model = model._replace(params=join(frozen, jax.tree.map(lambda leaf: leaf + 0.1, adapters)))
    adapts = {"seed": 42, "dtype": dtype, "weights_sha256": base.weights_sha256}
    save_model(tmp_path / "checkpoint", model, adapts=adapts, system_instruction="")
    return tmp_path / "checkpoint"


def test_adapters_are_merged_into_a_model_that_needs_no_peft(adapted: Path, tmp_path: Path, capsys):
    assert main(["export", str(adapted), "--to", str(tmp_path / "out")]) == 0
    model = load_model(adapted)
    found = read_weights(tmp_path / "out", model.config, without_lora(model).params)
    assert tree_digest(found) == without_lora(model).weights_sha256 != tree_digest(split(model.params).base)
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


def test_adapters_of_a_bfloat16_base_are_merged_in_the_dtype_that_is_written(home, dataset: Dataset, tmp_path: Path):
    checkpoint = adapted_to("bfloat16", dataset, tmp_path)
    model = load_model(checkpoint)
    base, adapters = split(model.params)
    exact = merged(join(jax.tree.map(lambda leaf: leaf.astype("float32"), base), adapters), model.lora)
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), exact)
    said = ", rounded as the adapters were merged; everything here was found with them beside it"
    for dtype, expected, words in [("float32", exact, "float32"), ("", rounded, f"bfloat16{said}")]:
        folder = tmp_path / f"out{dtype}"
        export_model(str(checkpoint), folder, dtype)
        assert tree_digest(read_weights(folder, model.config, base)) == tree_digest(expected)
        assert f"| numbers in these files | {words} |" in (folder / "README.md").read_text()


def test_adapters_alone_are_what_peft_reads(adapted: Path, tmp_path: Path, capsys):
    assert main(["export", str(adapted), "--to", str(tmp_path / "out"), "--adapters"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    assert main(["export", str(adapted), "--to", str(tmp_path / "b"), "--adapters", "--dtype", "bfloat16"]) == 2
    assert "error: --dtype: adapters are written as they were trained" in capsys.readouterr().err


def test_adapters_of_a_base_that_reads_pictures_are_named_as_in_it(small_model: Model, tmp_path: Path):
    config = replace(small_model.config, sliding_window=8, **GENERATIONS[3])
    graph, shapes = abstract(config)
    params, folder = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes), tmp_path / "nested"
    base = Model(str(folder), config, graph, params, small_model.tokenizer)
    folder.mkdir()
    releasing.write_released(folder, base)
    text = json.loads((folder / "config.json").read_bytes())
    write_json(folder / "config.json", {"model_type": "gemma3", "text_config": text})
    adapts = {"seed": 0, "dtype": "float32", "weights_sha256": base.weights_sha256}
    save_model(tmp_path / "checkpoint", with_lora(base, LoraConfig(rank=2), seed=1), adapts=adapts)
    export_model(str(tmp_path / "checkpoint"), tmp_path / "out", adapters=True)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)


def test_a_model_without_adapters_has_none_to_export(small_model: Model, tmp_path: Path, capsys):
    checkpoint = tuned(tmp_path / "checkpoint", small_model)
    assert main(["export", str(checkpoint), "--to", str(tmp_path / "out"), "--adapters"]) == 2
    assert "has none, all its weights were trained" in capsys.readouterr().err and not (tmp_path / "out").exists()
