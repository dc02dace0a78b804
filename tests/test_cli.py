"""The command line: every verb done once on a small scale, and every wrong request refused in one line."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from lib.__main__ import main, parser
from lib.commands.manners import red, tell
from lib.commands.parser import Parser, config_files, config_keys, dataset_keys, eval_sets, run_names
from lib.data.export import FORMATS
from lib.data.importing import Accepted, read_traces
from lib.errors import RequestError, RetraceError
from lib.experiments.run import find_run
from lib.files import repository_root, sealed, sha256_file, write_json
from lib.tasks import high_card_duel
from lib.trace import parse_trace

# The shapes are those of tests/experiments/test_pipeline.py, so that what is compiled there serves here, too.
CONFIG = """
name: duel
dataset: {dataset_name: duel, dataset_version: v1}
model: {name: tiny, max_length: 128}
training:
  {num_steps: 3, warmup_steps: 1, learning_rate: 3e-3, per_device_batch_size: 8, seed: 7, log_every: 2, eval_every: 3,
   checkpoint_every: 2}
evaluation: {eval_set: high_card_duel_v1, limit: 3, batch_size: 32, max_new_tokens: 80}
"""
TRACE = {"trace_version": "1.0", "prompt": "1 + 1?", "final_answer": "2", "meta": {"source": "mine"}}
TRACE |= {"steps": [{"i": 0, "type": "step", "content": "1 + 1 = 2"}]}
GENERATE = ["traces", "generate", "--game", "high_card_duel"]
EVALUATE = ["eval", "generate", "--eval-set", "eval_v1", "--output", "o"]
REQUEST = ["dataset", "build", "--request"]
BUILD = ["dataset", "build", "--name", "duel", "--version", "v1"]


class Ended(NamedTuple):
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


@pytest.fixture
def call(capfd: pytest.CaptureFixture) -> Callable[..., Ended]:
    def run(*words: object) -> Ended:
        capfd.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as ended:
            status = ended.code
        sys.stdout.flush()
        return Ended(status, *capfd.readouterr())

    return run


def process(*words: object, **environment: str) -> Ended:
    """The same as a process of its own."""
    command = [sys.executable, "-m", "lib", *map(str, words)]
    done = subprocess.run(command, cwd=repository_root(), env=os.environ | environment, capture_output=True, text=True)
    return Ended(done.returncode, done.stdout, done.stderr)


def files(folder: Path) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in records))
    return path


def weights_of(path: Path) -> set[str]:
    """Whose answers an evaluation output holds."""
    return {json.loads(line)["meta"]["weights_sha256"] for line in path.read_text().splitlines()}


class Job(NamedTuple):
    """The whole job done verb by verb: where it was, and what each verb printed."""

    home: Path
    config: Path
    data: Path
    output: Path
    before: Path
    after: Path
    printed: dict[str, str]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, compiled_once: None) -> Job:
    folder, printed = tmp_path_factory.mktemp("job"), {}
    config = folder / "duel.yaml"
    config.write_text(CONFIG)
    made = Job(
        folder / "home", config, folder / "duel.jsonl", folder / "home" / "duel", folder / "before.jsonl",
        folder / "after.jsonl", printed,
    )  # fmt: skip
    generate = ["eval", "generate", "--eval-set", "high_card_duel_v1", "--config", config]
    verbs = {
        "generate": [*GENERATE, "--count", 200, "--seed", 7],
        "build": [*BUILD, "--filter", "game=high_card_duel", "--strategy", "random", "--seed", 7],
        "export": ["dataset", "export", "duel-v1", "--format", "tunix_sft", "--output", made.data],
        "train": ["train", "--config", config, "--data", made.data, "--output", made.output],
        "before": [*generate, "--model", "base", "--output", made.before],
        "after": [*generate, "--model", made.output / "checkpoint-final", "--output", made.after],
        "report": ["eval", "report", "--before", made.before, "--after", made.after, "--output", folder / "delta.md"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRACE_HOME", str(made.home))
        for name, words in verbs.items():
            with redirect_stdout(io.StringIO()) as out:
                assert main([str(word) for word in words]) == 0, name
            printed[name] = out.getvalue()
    return made


@pytest.fixture
def in_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The job, its home the one of this test."""
    monkeypatch.setenv("RETRACE_HOME", str(job.home))
    return job


# ---- the job, verb by verb --------------------------------------------------------------------------------


def test_each_verb_says_what_it_did_and_where(job):
    assert "200 traces added, 0 were there already; the store holds 200" in job.printed["generate"]
    assert job.printed["build"].startswith("duel-v1: ") and "asked in eval set" in job.printed["build"]
    count = len(job.data.read_text().splitlines())
    assert job.printed["build"].startswith(f"duel-v1: {count} traces")
    assert job.printed["export"] == f"{count} examples in {job.data}\n"
    assert "3 steps, loss " in job.printed["train"] and "step      2  loss" in job.printed["train"]
    assert f"Checkpoint: {job.output / 'checkpoint-final'}" in job.printed["train"]
    assert "3 items of high_card_duel_v1 answered" in job.printed["before"]
    verdict, report = job.printed["report"].splitlines()
    assert "Warning: " not in verdict
    assert f"**{verdict}**" in Path(report.removeprefix("Report: ")).read_text()


def test_training_leaves_a_manifest_of_what_it_read_and_wrote(job):
    manifest = json.loads((job.output / "run_manifest.json").read_bytes())
    model = json.loads((job.output / "checkpoint-final" / "model.json").read_bytes())
    assert manifest["status"] == "done" and manifest["artifacts_path"] == "duel"
    assert manifest["inputs"]["data"] == {"file": "duel.jsonl", "sha256": sha256_file(job.data)}
    assert manifest["metrics"]["weights_sha256"] == model["weights_sha256"]
    assert f"weights sha256 {model['weights_sha256']}" in job.printed["train"]
    for name, recorded in manifest["artifacts"].items():
        assert sha256_file(job.output / name) == recorded["sha256"]
    assert {"metrics.jsonl", "tokenizer.json", "checkpoint-final/model.json"} <= set(manifest["artifacts"])


def test_training_on_an_exported_dataset_learns_the_tokenizer_that_the_dataset_keeps(job):
    kept = (job.home / "datasets" / "duel-v1" / "tokenizer.json").read_bytes()
    assert (job.output / "tokenizer.json").read_bytes() == kept
    assert (job.output / "checkpoint-final" / "tokenizer.json").read_bytes() == kept


def test_the_base_that_is_evaluated_is_the_one_that_was_tuned(job):
    model = json.loads((job.output / "checkpoint-final" / "model.json").read_bytes())
    assert weights_of(job.before) == {model["inputs"]["base_weights_sha256"]}
    assert weights_of(job.after) == {model["weights_sha256"]}
    for path in (job.before, job.after):
        records = list(read_traces(path))
        assert len(records) == 3 and all(isinstance(record, Accepted) for record in records)


def test_another_seed_is_another_base(in_job, call, tmp_path):
    words = ["--model", "base", "--eval-set", "high_card_duel_v1", "--config", in_job.config, "--set"]
    ended = call("eval", "generate", *words, "evaluation.limit=1", "--seed", 8, "--output", tmp_path / "o.jsonl")
    assert ended.status == 0 and len((tmp_path / "o.jsonl").read_text().splitlines()) == 1
    assert weights_of(tmp_path / "o.jsonl").isdisjoint(weights_of(in_job.before))
    asked = [
        "--before",
        tmp_path / "o.jsonl",
        "--after",
        lines(tmp_path / "a.jsonl", in_job.after.read_text().split("\n")[0]),
    ]
    held = call("eval", "report", *asked, "--output", tmp_path / "delta.md")
    assert held.status == 0 and "tuned from other weights" in held.out
    assert "tuned from other weights" in (tmp_path / "delta.md").read_text()


def test_training_again_finds_it_done(in_job, call):
    before = files(in_job.output / "checkpoint-final")
    ended = call("train", "--config", in_job.config, "--data", in_job.data, "--output", in_job.output)
    assert ended.status == 0 and "3 steps" in ended.out and "step      2" not in ended.out
    assert files(in_job.output / "checkpoint-final") == before


def test_training_on_other_data_into_the_same_folder_is_refused_and_changes_nothing(in_job, call, tmp_path):
    other = lines(tmp_path / "other.jsonl", {"id": "a", "prompt": "a?", "response": "Answer: b"})
    before = files(in_job.output)
    ended = call("train", "--config", in_job.config, "--data", other, "--output", in_job.output)
    assert ended.status == 2 and "give another output folder" in ended.err and files(in_job.output) == before


def test_a_training_that_is_refused_leaves_the_recorded_code_of_the_one_before(in_job, call, tmp_path):
    output = shutil.copytree(in_job.output, tmp_path / "output")
    (output / "git.patch").write_text("what was not committed then")
    words = ["train", "--config", in_job.config, "--data", in_job.data, "--output", output]
    said = json.loads((output / "run_manifest.json").read_bytes()) | {"status": "interrupted"}
    write_json(output / "run_manifest.json", sealed(said))
    before = files(output)
    ended = call(*words, "--set", "training.seed=1")
    assert ended.status == 2 and "give another output folder" in ended.err and files(output) == before


def test_a_training_that_was_killed_stays_the_run_that_it_is_where_another_is_refused(in_job, call, tmp_path):
    output = shutil.copytree(in_job.output, tmp_path / "output")
    manifest = json.loads((output / "run_manifest.json").read_bytes())
    (output / "run_manifest.json").unlink()
    state = {name: manifest[name] for name in ("run_id", "created_at", "attempts", "config", "inputs")}
    write_json(output / "state.json", state)
    before = files(output)
    ended = call(
        "train", "--config", in_job.config, "--data", in_job.data, "--output", output, "--set", "training.seed=1"
    )
    assert ended.status == 2 and "give another output folder" in ended.err and files(output) == before


def test_a_checkpoint_is_evaluated_without_a_configuration_by_the_defaults(in_job, call, tmp_path, monkeypatch):
    from lib.evaluation import evaluate

    told = {}
    monkeypatch.setattr(
        evaluate, "answer_eval_set", lambda model, items, settings, *rest: told.update(s=settings) or []
    )
    words = ["--model", in_job.output / "checkpoint-final", "--eval-set", "eval_v1"]
    assert call("eval", "generate", *words, "--output", tmp_path / "o.jsonl").status == 0
    assert (told["s"].limit, told["s"].max_new_tokens) == (None, 256)
    refused = call("eval", "generate", *words, "--set", "evaluation.limit=1", "--output", tmp_path / "o.jsonl")
    assert refused.status == 2 and "--set" in refused.err and "--config" in refused.err


def test_runs_list_and_show_tell_of_the_training(in_job, call):
    assert call("runs", "list").out.split() == ["duel", "done"]
    shown = call("runs", "show", "duel")
    assert shown.status == 0 and "dataset         duel.jsonl" in shown.out and "status          done" in shown.out
    assert json.loads(call("runs", "show", "duel", "--json").out)["status"] == "done"
    [listed] = json.loads(call("runs", "list", "--json").out)
    assert listed["dataset"] == "duel.jsonl"  # what was trained on, not what the configuration names
    assert call("runs", "list", "--html").status == 0  # no run of ours, and yet in the table
    assert '<tr data-run="duel"' in (in_job.home / "index.html").read_text()


def test_a_training_that_was_stopped_before_its_manifest_is_recorded_as_the_same_run(in_job, call, tmp_path):
    output = tmp_path / "duel"
    shutil.copytree(in_job.output, output)
    manifest = json.loads((output / "run_manifest.json").read_bytes())
    (output / "run_manifest.json").unlink()
    began = {"started_at": "2025-01-01T00:00:00Z"}
    state = {"run_id": manifest["run_id"], "created_at": began["started_at"], "attempts": [began], "stage": "train"}
    (output / "state.json").write_text(json.dumps(state))
    assert call("train", "--config", in_job.config, "--data", in_job.data, "--output", output).status == 0
    again = json.loads((output / "run_manifest.json").read_bytes())
    assert again["status"] == "done" and again["run_id"] == manifest["run_id"] and len(again["attempts"]) == 2
    assert again["metrics"]["weights_sha256"] == manifest["metrics"]["weights_sha256"]
    assert again["artifacts"].keys() == manifest["artifacts"].keys() and not (output / "state.json").exists()


def test_a_relative_folder_of_a_run_is_the_same_for_kernels_that_work_in_another(in_job, monkeypatch):
    monkeypatch.chdir(in_job.output.parent)
    assert find_run("duel") == find_run("./duel") == in_job.output.resolve()
    monkeypatch.chdir(in_job.output)
    assert find_run(".").name == "duel"


def test_traces_list_and_verify(in_job, call):
    listed = call("traces", "list", "--limit", 2)
    assert listed.out.startswith("200 traces in ") and listed.out.count("High Card Duel: ") == 2
    assert "  game: high_card_duel (200)" in listed.out
    told = json.loads(call("traces", "list", "--limit", 3, "--json").out)
    assert told["count"] == 200 and len(told["traces"]) == 3 and told["meta"]["seed"] == {"7": 200}
    verified = call("traces", "verify")
    assert (
        verified.status == 0
        and "200 traces checked against their engine: 200 true in every step, 0 not" in verified.out
    )


def test_dataset_list_and_validate(in_job, call):
    listed = call("dataset", "list")
    assert listed.out.startswith("duel-v1") and len(listed.out.splitlines()) == 1
    [manifest] = json.loads(call("dataset", "list", "--json").out)
    assert manifest["dataset_key"] == "duel-v1" and "trace_ids" not in manifest
    told = call("dataset", "validate", in_job.data, "--samples", 0)
    count = manifest["trace_count"]
    assert told.status == 0 and f"{count} examples, each with a user's and a model's turn; {count} measured" in told.out
    assert "by a tokenizer learned from the file" in told.out
    for name in (in_job.data, "duel-v1"):
        short = call("dataset", "validate", name, "--max-length", 50)
        assert short.status == 1 and f"{count} of {count} examples are longer than model.max_length 50" in short.err
        assert len(short.err.splitlines()) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_to_standard_output_is_pure_jsonl_that_imports_back(format, in_job, call, tmp_path):
    ended = call("dataset", "export", "duel-v1", "--format", format)
    assert ended.status == 0 and ended.err == ""
    records = [json.loads(line) for line in ended.out.splitlines()]
    assert len(records) == len(in_job.data.read_text().splitlines())
    again = tmp_path / "home of the import"
    assert call("--home", again, "traces", "import", lines(tmp_path / "f.jsonl", *records)).status == 0
    assert f"{len(records)} accepted, 0 rejected" in call("--home", again, "traces", "import", tmp_path / "f.jsonl").out


def test_the_same_request_from_a_file_is_the_same_dataset(in_job, call, tmp_path):
    request = tmp_path / "request.yaml"
    request.write_text(
        "{dataset_name: duel, dataset_version: v1, filters: {game: high_card_duel},"
        " selection_strategy: random, seed: 7}"
    )
    before = files(in_job.home)
    assert call("dataset", "build", "--request", request).out == in_job.printed["build"]
    assert files(in_job.home) == before


def test_a_dataset_key_never_means_other_content(in_job, call):
    before = files(in_job.home)
    ended = call(*BUILD, "--filter", "game=high_card_duel", "--limit", 3)
    assert ended.status == 2 and "already built" in ended.err and len(ended.err.splitlines()) == 1
    assert files(in_job.home) == before


def test_no_match_lists_what_the_store_holds(in_job, call):
    before = files(in_job.home)
    ended = call("dataset", "build", "--name", "x", "--version", "v1", "--filter", "game=poker")
    assert ended.status == 2 and len(ended.err.splitlines()) == 1
    assert "game='poker'" in ended.err and "'high_card_duel'" in ended.err and files(in_job.home) == before


def test_f35_a_damaged_dataset_manifest_is_named(in_job, call, tmp_path, monkeypatch):
    folder = tmp_path / "home" / "datasets" / "duel-v1"
    folder.mkdir(parents=True)
    monkeypatch.setenv("RETRACE_HOME", str(tmp_path / "home"))
    whole = (in_job.home / "datasets" / "duel-v1" / "manifest.json").read_text()
    for damaged in (whole[:-9], "[]", "{}", whole.replace('"trace_count"', '"count"')):
        (folder / "manifest.json").write_text(damaged)
        ended = call("dataset", "list")
        assert ended.status == 1 and f"{folder}/manifest.json: damaged" in ended.err
        assert len(ended.err.splitlines()) == 1


# ---- dry runs ---------------------------------------------------------------------------------------------


def keys(value: object) -> set[str]:
    if isinstance(value, list):
        return {key for item in value for key in keys(item)}
    return set(value) | keys(list(value.values())) if isinstance(value, dict) else set()


def test_a_dry_run_says_what_training_would_do_and_has_no_figure(in_job, call, tmp_path):
    words = ["train", "--config", in_job.config, "--data", in_job.data, "--output", tmp_path / "dry"]
    ended = call(*words, "--dry-run")
    assert ended.status == 0 and "3 steps of 8 are" in ended.out and "model: tiny, " in ended.out
    plans = [re.search(r"[\d,]+ parameters, .*: peak \S+ \S+", said) for said in (ended.out, in_job.printed["train"])]
    assert plans[0] and plans[1] and plans[0][0] == plans[1][0]  # what training then says
    manifest = json.loads((tmp_path / "dry" / "run_manifest.json").read_bytes())
    assert manifest["status"] == "dry_run" and manifest["metrics"] == {}
    assert manifest["artifacts"].keys() <= {"git.patch"}
    assert not [key for key in keys(manifest) if "loss" in key] and manifest["wall_s"] == {}
    assert {path.name for path in (tmp_path / "dry").iterdir()} - {"git.patch"} == {"run_manifest.json"}


def test_rows_that_hold_several_examples_are_not_counted_as_examples(in_job, call, tmp_path):
    words = ["train", "--config", in_job.config, "--data", in_job.data, "--output", tmp_path / "dry", "--dry-run"]
    ended = call(*words, "--set", "training.batching=packed")
    assert ended.status == 0 and "3 steps of 8 packed rows" in ended.out and "epochs" not in ended.out


@pytest.mark.parametrize(
    "changes, said",
    [
        (["--set", "model.max_length=50"], "longer than model.max_length 50"),
        (["--set", "recipe=answer_sft_v1"], "the recipe is answer_sft_v1"),
        (["--set", "system_instruction=Be brief."], "without the config's system_instruction"),
    ],
)
def test_a_dry_run_refuses_what_training_would_refuse(changes, said, in_job, call, tmp_path):
    words = ["train", "--config", in_job.config, "--data", in_job.data, "--output", tmp_path / "dry", *changes]
    for more in ([], ["--dry-run"]):
        ended = call(*words, *more)
        assert ended.status == 2 and said in ended.err and len(ended.err.splitlines()) == 1
    assert not (tmp_path / "dry" / "run_manifest.json").exists()


def test_data_that_was_refused_does_not_keep_the_folder_from_the_data_that_is_right(
    in_job, call, tmp_path, monkeypatch
):
    from lib.training import loop

    def reached(model, *given, **options):
        raise RequestError(f"reached with {model.tokenizer.vocab_size} tokens")

    long = {"id": "b", "prompt": "b?", "response": "once more " * 300 + "Answer: b"}
    short = {"id": "a", "prompt": "a?", "response": "Answer: a"}
    data = lines(tmp_path / "data.jsonl", short, long)
    words = ["train", "--config", in_job.config, "--data", data, "--output", tmp_path / "out"]
    assert "longer than model.max_length 128" in call(*words).err
    lines(data, short)
    monkeypatch.setattr(loop, "train", reached)
    assert "reached with " in call(*words).err


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training comes to no checkpoint."""
    from lib.training import loop

    def fail(model, examples, config, output, *rest):
        write_json(output / "checkpoints" / "inputs.json", {})
        raise RetraceError("training ran out of memory")

    monkeypatch.setattr(loop, "train", fail)


def test_a_training_that_came_to_no_checkpoint_stays_its_run_only_where_the_same_is_asked_for(
    in_job, out_of_memory, call, tmp_path
):
    other = lines(tmp_path / "other.jsonl", *in_job.data.read_text().splitlines()[:100])
    words = ["train", "--config", in_job.config, "--output", tmp_path / "out", "--data"]
    recorded = []
    for more in ([in_job.data], [in_job.data], [in_job.data, "--set", "training.seed=8"], [other]):
        assert call(*words, *more).status == 1
        recorded.append(json.loads((tmp_path / "out" / "run_manifest.json").read_bytes()))
    assert [len(manifest["attempts"]) for manifest in recorded] == [1, 2, 1, 1]
    first, alike, of_other_config, of_other_data = (manifest["run_id"] for manifest in recorded)
    assert first == alike and len({first, of_other_config, of_other_data}) == 3


def test_a_dry_run_accepts_the_folder_of_a_training_that_came_to_no_checkpoint_and_leaves_its_record(
    in_job, out_of_memory, call, tmp_path
):
    words = ["train", "--config", in_job.config, "--data", in_job.data, "--output", tmp_path / "out"]
    assert call(*words).status == 1
    before = files(tmp_path / "out")
    ended = call(*words, "--dry-run", "--set", "training.grad_accum_steps=2")
    assert ended.status == 0 and "dry run: nothing is trained\n" in ended.out and "model: tiny, " in ended.out
    assert files(tmp_path / "out") == before
    refused = call(*words[:-1], in_job.output, "--dry-run")
    assert refused.status == 2 and "holds a run already" in refused.err


def test_a_dry_run_refuses_examples_that_are_all_held_out(in_job, call, tmp_path):
    from lib.data.selection import is_held_out

    prompt = next(f"{number}?" for number in range(1000) if is_held_out(f"{number}?"))
    data = lines(tmp_path / "held.jsonl", {"id": "a", "prompt": prompt, "response": "Answer: b"})
    words = ["train", "--config", in_job.config, "--data", data, "--output", tmp_path / "out"]
    for more in ([], ["--dry-run"]):
        ended = call(*words, *more)
        assert ended.status == 2 and "held-out side" in ended.err
    assert not (tmp_path / "out" / "run_manifest.json").exists()


def test_without_the_released_weights_a_dry_run_tells_what_it_cannot_check_and_training_is_refused(in_job, tmp_path):
    data = tmp_path / "traces.jsonl"
    assert main(["dataset", "export", "duel-v1", "--format", "trace", "--output", str(data)]) == 0
    words = ["train", "--config", "configs/sft_tiny.yaml", "--data", data, "--output", tmp_path / "out"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    refused = process(*words, **offline)
    assert refused.status == 2 and refused.out == "" and len(refused.err.splitlines()) == 1
    for part in ("google/gemma-2b-it", str(tmp_path / "hf"), "hf download google/gemma-2b-it"):
        assert part in refused.err
    assert not (tmp_path / "out").exists()
    dry = process(*words, "--dry-run", **offline)
    assert dry.status == 0 and dry.err == ""
    assert "not checked: weights, and lengths in tokens" in dry.out and "hf download google/gemma-2b-it" in dry.out
    manifest = json.loads((tmp_path / "out" / "run_manifest.json").read_bytes())
    assert manifest["status"] == "dry_run" and not [key for key in keys(manifest) if "loss" in key]


# ---- traces -----------------------------------------------------------------------------------------------


def test_no_persist_prints_the_traces_and_leaves_the_store_alone(call, home, tmp_path):
    ended = call(*GENERATE, "--count", 3, "--seed", 5, "--no-persist")
    traces = [parse_trace(line.encode()) for line in ended.out.splitlines()]
    assert [trace.prompt for trace in traces] == [trace.prompt for trace in high_card_duel.generate(3, 5)]
    written = call(*GENERATE, "--count", 3, "--seed", 5, "--no-persist", "--output", tmp_path / "t.jsonl")
    assert written.out == "" and (tmp_path / "t.jsonl").read_text().count("\n") == 3
    assert ended.status == written.status == 0 and not home.exists()


def test_what_is_left_out_is_no_line_among_the_traces_that_are_printed(gym, call, tmp_path):
    play = ["traces", "generate", "--game", "gsm_symbolic", "--engine", "reasoning-gym", "--count", 3, "--seed", 40]
    ended = call(*play, "--no-persist")
    assert ended.status == 0 and ended.err == "left out: 1 of 4 worked answers: a false equation\n"
    assert len([parse_trace(line.encode()) for line in ended.out.splitlines()]) == 3
    written = call(*play, "--no-persist", "--output", tmp_path / "t.jsonl")
    assert written.out == ended.err and written.err == ""


def test_output_goes_where_a_link_leads_and_takes_the_place_of_no_pipe(call, tmp_path):
    link, pipe, there = tmp_path / "link.jsonl", tmp_path / "pipe", tmp_path / "disk" / "t.jsonl"
    link.symlink_to(there)
    os.mkfifo(pipe)
    for _ in range(2):
        assert call(*GENERATE, "--count", 3, "--no-persist", "--output", link).status == 0
        assert link.is_symlink() and there.read_text().count("\n") == 3
    refused = call(*GENERATE, "--count", 3, "--output", pipe)
    said = f"error: {pipe}: is no regular file; leave out --output for standard output\n"
    assert (refused.status, refused.out, refused.err) == (2, "", said) and pipe.is_fifo()


def test_output_beside_the_store_holds_the_same_traces(call, tmp_path):
    ended = call(*GENERATE, "--count", 3, "--output", tmp_path / "t.jsonl")
    assert ended.status == 0 and "3 traces added" in ended.out
    again = call("traces", "import", tmp_path / "t.jsonl")
    assert "3 lines: 3 accepted, 0 rejected, 0 blank; 0 traces added, 3 were there already" in again.out


def test_quarantine_keeps_the_good_and_names_the_file_of_the_bad(call, tmp_path):
    mixed = lines(tmp_path / "mixed.jsonl", TRACE, '{"cut', TRACE | {"prompt": "1 + 2?"}, "")
    ended = call("traces", "import", mixed, "--on-bad-record", "quarantine")
    assert ended.status == 0 and "4 lines: 2 accepted, 1 rejected, 1 blank; 2 traces added" in ended.out
    [rejected] = [json.loads(line) for line in Path(ended.out.split()[-1]).read_text().splitlines()]
    assert rejected["line"] == 2 and rejected["raw"] == '{"cut'


def test_verify_names_a_false_trace_and_fails(call, tmp_path):
    [true] = high_card_duel.generate(1, 0)
    false = json.loads(json.dumps(TRACE | {"prompt": true.prompt, "meta": true.meta}))
    assert call("traces", "import", lines(tmp_path / "false.jsonl", false)).status == 0
    ended = call("traces", "verify")
    assert ended.status == 1 and "step 1 (legal_move)" in ended.out and "0 true in every step, 1 not" in ended.out


def test_what_a_terminal_would_obey_is_not_printed(call, tmp_path):
    bold = TRACE | {"prompt": "\x1b[2J\x1b]0;title\x07", "final_answer": "a\x9b1m", "meta": {"game": "\x1b[31m"}}
    assert call("traces", "import", lines(tmp_path / "bold.jsonl", bold)).status == 0
    ended = call("traces", "list")
    assert ended.status == 0 and all(letter.isprintable() for line in ended.out.splitlines() for letter in line)


def test_an_empty_home_lists_nothing_and_stays_empty(call, home):
    assert call("runs", "list").out.startswith("no run yet")
    assert call("dataset", "list").out.startswith("no dataset in ")
    assert call("traces", "list").out.startswith("0 traces in ")
    assert call("runs", "list", "--json").out == call("dataset", "list", "--json").out == "[]\n"
    assert call("traces", "verify").status == 0 and not home.exists()


# ---- wrong requests ---------------------------------------------------------------------------------------

WRONG = {
    "misspelt verb": (["trian"], "did you mean train?"),
    "misspelt verb of a group": (["traces", "improt", "x"], "did you mean import?"),
    "no verb": ([], "expected a verb: run, resume, sweep, runs, traces,"),
    "no verb of a group": (["traces"], "expected a verb: generate, engines, import,"),
    "verb without its noun": (["list"], "did you mean runs list or traces list or dataset list?"),
    "no such verb": (["frobnicate"], "no verb 'frobnicate', only run, resume,"),
    "name of a configuration": (["run", "smoke"], "did you mean configs/smoke.yaml?"),
    "configuration of a run as a sweep": (["sweep", "configs/smoke.yaml"], "python -m lib run configs/smoke.yaml"),
    "seconds in words": (["run", "configs/smoke.yaml", "--time-limit", "5m"], "expected a number of seconds, got '5m'"),
    "override in two words": (["run", "configs/smoke.yaml", "--set", "recipe", "x"], "KEY=VALUE in one word"),
    "traces twice in one output": ([*GENERATE, "--count", "1", "--no-persist", "--json"], "which are JSON already"),
    "misspelt flag": ([*GENERATE, "--count", "3", "--sede", "1"], "did you mean --seed?"),
    "flag with a value in it": (["traces", "list", "--limti=3"], "did you mean --limit?"),
    "unlike any flag": (["traces", "list", "--zzzz"], "see python -m lib traces list --help"),
    "shortened flag": (["traces", "list", "--lim", "3"], "did you mean --limit?"),
    "word for a number": ([*GENERATE, "--count", "many"], "expected a whole number, got 'many'"),
    "no count": ([*GENERATE, "--count", "0"], "expected at least 1, got 0"),
    "unknown game": (["traces", "generate", "--game", "poker", "--count", "1"], "builtin plays high_card_duel and"),
    "misspelt choice": (["traces", "import", "x", "--on-bad-record", "quarantin"], "did you mean quarantine?"),
    "missing traces": (["traces", "import", "absent.jsonl"], "absent.jsonl: does not exist"),
    "bad line": (["traces", "import", "{folder}/bad.jsonl"], "bad.jsonl:2: field record: expected valid JSON"),
    "empty file": (["traces", "import", "{folder}/empty.jsonl"], "empty.jsonl: holds no trace"),
    "empty store": ([*BUILD, "--filter", "game=x"], "is empty; generate or import traces first"),
    "filter without value": ([*BUILD, "--filter", "game"], "expected KEY=VALUE"),
    "filter of nothing": ([*BUILD, "--filter", "game="], "expected a text"),
    "random without seed": ([*BUILD, "--strategy", "random"], "requires --seed"),
    "limit of nothing": ([*BUILD, "--limit", "0"], "limit: expected at least 1, got 0"),
    "no name": (["dataset", "build", "--version", "v1"], "give --name and --version, or --request FILE"),
    "hostile key": (["dataset", "build", "--name", "../x", "--version", "v1"], "'../x-v1'"),
    "request and name": ([*REQUEST, "{folder}/request.yaml", "--name", "x"], "leave out --name"),
    "request and seed 0": ([*REQUEST, "{folder}/request.yaml", "--seed", "0"], "leave out --seed"),
    "missing request": ([*REQUEST, "absent.yaml"], "absent.yaml: No such file"),
    "misspelt key of a request": ([*REQUEST, "{folder}/misspelt.yaml"], "did you mean dataset_name?"),
    "configuration and recipe": (
        ["dataset", "export", "x-v1", "--format", "messages", "--config", "c.yaml", "--recipe", "answer_sft_v1"],
        "leave out --recipe",
    ),
    "configuration and system instruction": (
        ["dataset", "export", "x-v1", "--format", "messages", "--config", "c.yaml", "--system-instruction", ""],
        "leave out --system-instruction",
    ),
    "unknown dataset": (["dataset", "export", "absent-v1", "--format", "trace"], "dataset absent-v1: not built"),
    "dataset outside": (["dataset", "export", "../../etc", "--format", "trace"], "cannot become a file name"),
    "missing training file": (["dataset", "validate", "absent"], "nor a dataset of this name; datasets here: none"),
    "bad training file": (["dataset", "validate", "{folder}/bad.jsonl"], "bad.jsonl:1: "),
    "missing configuration": (["run", "absent.yaml"], "absent.yaml: no such file; configs/ holds"),
    "misspelt key": (["run", "configs/smoke.yaml", "--set", "training.num_step=1"], "did you mean training.num_steps?"),
    "misspelt key of a file": (["run", "{folder}/misspelt.yaml"], "dataset_nmae: no such key"),
    "wrong type": (["run", "configs/smoke.yaml", "--set", "training.num_steps=many"], "expected a whole number"),
    "override without value": (["run", "configs/smoke.yaml", "--set", "training"], "expected KEY=VALUE"),
    "no data": (
        ["train", "--config", "configs/smoke.yaml", "--data", "absent.jsonl", "--output", "o"], "absent.jsonl: No such",
    ),
    "no tokenizer": (
        [*EVALUATE, "--model", "base", "--config", "configs/smoke.yaml"],
        "dataset smoke-v1: not built",
    ),
    "base of what": ([*EVALUATE, "--model", "base"], "give --config"),
    "no checkpoint": ([*EVALUATE, "--model", "x"], "x: not a checkpoint"),
    "no eval set": (["eval", "generate", "--model", "x", "--eval-set", "eval_v9", "--output", "o"], "eval set eval_v9"),
    "no evaluation": (["eval", "report", "--before", "a", "--after", "b", "--output", "c"], "a: No such file"),
    "no evaluation output": (
        ["eval", "report", "--before", "{folder}/bad.jsonl", "--after", "b", "--output", "c"], "bad.jsonl:1: ",
    ),
    "no run": (["runs", "show", "absent"], "run absent: no such run in "),
    "export of no run": (["export", "absent", "--to", "o"], "run absent: no such run in "),
    "export to nowhere": (["export", "absent"], "required: --to"),
    "export as what": (["export", "absent", "--to", "o", "--dtype", "float23"], "did you mean float32?"),
    "output below a file": (
        [*GENERATE, "--count", "1", "--output", "{folder}/bad.jsonl/x/t.jsonl"], "bad.jsonl/x: Not a directory",
    ),
    "output that is a folder": ([*GENERATE, "--count", "1", "--output", "{folder}"], "Is a directory"),
}  # fmt: skip


@pytest.mark.parametrize("words, said", WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_one_line_and_writes_nothing(words, said, call, home, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    lines(folder / "bad.jsonl", TRACE, '{"prompt": "cut')
    (folder / "empty.jsonl").write_text("\n\n")
    (folder / "request.yaml").write_text("{dataset_name: a, dataset_version: b}")
    (folder / "misspelt.yaml").write_text("{dataset_nmae: a, dataset_version: b}")
    before = files(tmp_path)
    ended = call(*(word.replace("{folder}", str(folder)) for word in words))
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: ") and said in ended.err and ended.err.count("\n") == 1
    assert files(tmp_path) == before and not home.exists() and not Path("o").exists()


def test_part_of_a_runs_name_is_met_with_the_whole_of_the_newest(call, home):
    for name in ("20250101_000000_duel", "20250102_000000_duel"):
        (home / name).mkdir(parents=True)
        (home / name / "state.json").write_text("{}")
    ended = call("runs", "show", "duel")
    assert ended.status == 2 and ended.err.endswith("did you mean 20250102_000000_duel?\n")


def test_a_home_that_cannot_be_written_is_one_line(call, tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    for words in ([*GENERATE, "--count", "1"], ["run", "configs/smoke.yaml"]):
        ended = call("--home", occupied, *words)
        assert ended.status == 2 and str(occupied) in ended.err and ended.err.count("\n") == 1
    assert files(tmp_path) == {str(occupied): sha256_file(occupied)}


def test_home_moves_everything(call, home, tmp_path):
    assert call("--home", tmp_path / "elsewhere", *GENERATE, "--count", 1).status == 0
    assert (tmp_path / "elsewhere" / "store").is_dir() and not home.exists()


@pytest.mark.parametrize("manifest", ["{", "[]", '{"status": "done"}'])
def test_a_damaged_run_manifest_is_named(manifest, call, home):
    (home / "toy").mkdir(parents=True)
    (home / "toy" / "run_manifest.json").write_text(manifest)
    ended = call("runs", "show", "toy")
    assert ended.status == 2 and f"{home}/toy/run_manifest.json: damaged" in ended.err
    ended = call("runs", "verify", "toy")
    assert ended.status == 1 and "edited: run_manifest.json" in ended.out
    assert call("runs", "list").out.split() == ["toy", "damaged"]


@pytest.mark.parametrize(
    "words, key, value",
    [
        (["traces", "import", "--", "--x.jsonl"], "files", ["--x.jsonl"]),
        (
            ["dataset", "export", "x-v1", "--format", "messages", "--system-instruction", "-- be brief"],
            "system_instruction",
            "-- be brief",
        ),
    ],
)
def test_what_stands_after_two_dashes_or_holds_a_blank_is_no_flag(words, key, value):
    assert getattr(parser().parse_args(words), key) == value


# ---- as a process -----------------------------------------------------------------------------------------


def test_as_a_process_too_a_wrong_flag_is_one_line_with_status_2(home):
    ended = process("traces", "list", "--limti", 3)
    assert (ended.status, ended.out) == (2, "") and not home.exists()
    assert ended.err == "error: unrecognized arguments: --limti; did you mean --limit?\n"


def test_as_a_process_standard_output_is_nothing_but_records(home):
    ended = process(*GENERATE, "--count", 2, "--no-persist")
    assert ended.status == 0 and ended.err == "" and not home.exists()
    assert [parse_trace(line.encode()).meta["episode_index"] for line in ended.out.splitlines()] == [0, 1]


def test_a_reader_that_has_enough_ends_it_quietly():
    command = f"'{sys.executable}' -m lib {' '.join(GENERATE)} --count 3000 --no-persist | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=repository_root(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 10)


def test_work_goes_on_where_its_reader_has_left():
    program = "from lib.commands.manners import say_on, tell; import sys; sys.stdin.read(); say_on('a'); tell('b')"
    command = f"(sleep 1; echo) | '{sys.executable}' -uc \"{program}\" | true; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", command], cwd=repository_root(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_of_the_remarks_who_leaves_takes_no_figures_along(tmp_path):
    program = (
        "from lib.commands.manners import heed, say, say_on, tell, tell_json; import argparse, sys; sys.stdin.read(); "
        "heed(argparse.Namespace(json=True)); say_on('a'); say('b'); tell('c', file=sys.stderr); tell_json({'n': 1})"
    )
    command = f"(sleep 1; echo) | '{sys.executable}' -uc \"{program}\" 2>&1 >{tmp_path}/figures | true; "
    done = subprocess.run(["bash", "-c", command + "exit ${PIPESTATUS[1]}"], cwd=repository_root())
    assert (done.returncode, (tmp_path / "figures").read_text()) == (0, '{"n": 1}\n')


# ---- manners ----------------------------------------------------------------------------------------------


def every_parser(made: Parser, name: str = "") -> Iterator[tuple[str, Parser]]:
    yield name, made
    for action in made._subparsers._group_actions if made._subparsers else ():
        for verb, inner in action.choices.items():
            yield from every_parser(inner, f"{name} {verb}".strip())


PARSERS = dict(every_parser(parser()))


@pytest.mark.parametrize("name", PARSERS)
def test_help_at_every_level_says_what_each_flag_is_and_gives_examples_that_are_commands(name):
    made = PARSERS[name]
    assert made.description and made.epilog.startswith("example")
    examples = [line.split("  ")[0] for line in re.findall(r"python -m lib (.*)", made.epilog)]
    assert examples and all(example.startswith(name) for example in examples)
    for example in examples:
        if "VERB" not in example:
            parser().parse_args(shlex.split(example))
    unexplained = [action.dest for action in made._actions if action.option_strings and not action.help]
    assert not unexplained and {"home", "quiet"} <= {action.dest for action in made._actions}
    # Two print what is no figure, and launch hands all that it is given to the command that it starts.
    if not made._subparsers and name not in ("dataset export", "dataset card", "launch"):
        assert "json" in {action.dest for action in made._actions}


def test_home_may_stand_before_the_verb_after_it_and_between(call, home, tmp_path):
    for place, words in enumerate((["--home", "H", "traces", "list"], ["traces", "--home", "H", "list"],
                                   ["traces", "list", "--home", "H"])):  # fmt: skip
        folder = tmp_path / str(place)
        ended = call(*(folder if word == "H" else word for word in words))
        assert ended.status == 0 and f"0 traces in {folder}/store" in ended.out


@pytest.mark.parametrize("flag", [True, False])
def test_a_relative_home_is_the_same_for_kernels_that_start_in_another_folder(flag, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not flag:
        monkeypatch.setenv("RETRACE_HOME", "mine")
    assert call("runs", "list", *(["--home", "mine"] if flag else [])).status == 0
    assert os.environ["RETRACE_HOME"] == str(tmp_path / "mine")


def test_the_job_tells_its_figures_as_json_and_nothing_else(in_job, call, tmp_path):
    report = ["eval", "report", "--before", in_job.before, "--after", in_job.after, "--output", tmp_path / "d.md"]
    for words, figure in [
        ([*GENERATE, "--count", 3, "--seed", 7], "added"),
        ([*BUILD, "--filter", "game=high_card_duel", "--strategy", "random", "--seed", 7], "trace_count"),
        (["dataset", "validate", "duel-v1"], "tokens"),
        (["train", "--config", in_job.config, "--data", in_job.data, "--output", in_job.output], "weights_sha256"),
        (report, "difference_interval"),
        (["traces", "verify"], "true"),
    ]:
        ended = call(*words, "--json")
        assert ended.status == 0 and figure in json.loads(ended.out), words
        silent = call(*words, "-q")
        assert silent.status == 0 and silent.err == "" and (silent.out == "" or words[1] in ("validate", "verify"))


def test_training_says_at_once_what_it_is_about_to_do(job):
    first = job.printed["train"].splitlines()[0]
    assert first.startswith("training tiny on ") and "3 steps of 8 are " in first and first.endswith(str(job.output))


@pytest.mark.parametrize(
    "environment, on_terminal, coloured",
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colour_is_only_where_it_is_seen_or_asked_for(environment, on_terminal, coloured, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    file.isatty = lambda: on_terminal
    tell("status ", red("fa\x1b[1miled"), file=file)
    shown = "fa␛[1miled"
    assert file.getvalue() == (f"status \x1b[31m{shown}\x1b[0m\n" if coloured else f"status {shown}\n")


def test_a_list_that_was_cut_says_so(call, tmp_path):
    traces = [TRACE | {"prompt": f"{number} + 1?", "meta": {"source": f"s{number}"}} for number in range(10)]
    assert call("traces", "import", lines(tmp_path / "ten.jsonl", *traces)).status == 0
    shown = call("traces", "list", "--limit", 2).out
    assert "  … and 8 more\n" in shown and shown.rstrip().endswith(", …") and shown.count("(1)") == 8
    assert "…" not in call("traces", "list", "--limit", 10).out.split("meta, with")[0]


def test_meta_values_are_listed_as_a_filter_names_them(call, tmp_path):
    values = [1, "1", True, "true", 1.0, "red", "", ["x"], {"x": 1}]
    traces = [TRACE | {"prompt": f"{number} + 1?", "meta": {"v": value}} for number, value in enumerate(values)]
    assert call("traces", "import", lines(tmp_path / "t.jsonl", *traces)).status == 0
    named = ["1", '"1"', "true", '"true"', "1.0", "red", '""', "[…]", "{…}"]
    told = json.loads(call("traces", "list", "--json").out)
    assert told["meta"] == {"v": dict.fromkeys(named, 1)} and told["count"] == len(told["traces"]) + 4 == 9


def test_what_a_shell_is_offered(in_job, monkeypatch):
    assert run_names() == ["duel"] and dataset_keys() == ["duel-v1"] and "high_card_duel_v1" in eval_sets()
    assert "configs/smoke.yaml" in config_files()
    assert {"training.seed=", "training.lora.rank=", "recipe="} <= set(config_keys())
    monkeypatch.setenv("COMP_LINE", f"python -m lib runs show --home {in_job.home.parent} du")
    assert run_names() == []


def test_completion_is_offered_by_the_program_itself(in_job, tmp_path):
    line, offered = "python -m lib runs show ", tmp_path / "offered"
    asks = {"_ARGCOMPLETE": "3", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SHELL": "bash"}
    process(_ARGCOMPLETE_STDOUT_FILENAME=str(offered), **asks)
    assert offered.read_text().split() == ["duel"]


def test_doctor_names_each_part_and_fails_only_for_what_is_required(call, tmp_path, monkeypatch):
    from lib.commands import doctor

    monkeypatch.setattr(doctor, "_pins", lambda file: {"numpy": doctor._version("numpy")})
    ended = call("doctor")
    assert ended.status == 0 and ended.err == "" and "jax devices" in ended.out and "required:" in ended.out
    told = json.loads(call("doctor", "--json").out)
    assert told["ok"] and {part["state"] for part in told["required"]} <= {"ok", "note"}
    assert all(part["found"] or part["todo"] for group in ("required", "optional") for part in told[group])
    monkeypatch.setattr(doctor, "_pins", lambda file: {"numpy": "0.1", "nothing-of-this-name": "1.0"})
    ended = call("doctor", "--home", lines(tmp_path / "file") / "x")
    assert ended.status == 1 and ended.err.startswith("error: packages, home: ") and ended.err.count("\n") == 1
    assert "nothing-of-this-name" in ended.out and "pip install -r requirements.txt" in ended.out


def test_doctor_wants_the_memory_that_the_quickstart_says_it_takes(call, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 30, total=1 << 34))
    [wanted] = re.findall(r"the quickstart wants (.*);", call("doctor").out)
    assert f", {wanted} of free memory. " in (repository_root() / "configs" / "quickstart.yaml").read_text()


def test_doctor_reads_the_direct_dependencies_alone():
    from lib.commands.doctor import _pins

    pins = _pins(repository_root() / "requirements.txt")
    assert {"jax", "polars", "argcomplete", "ruff"} <= pins.keys() and "absl-py" not in pins


def test_the_requirements_name_all_that_they_bring_in_as_they_are_installed_without_looking_for_more():
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


ASKED_TO_END = """
import gc, os, signal, time
from lib.__main__ import end_when_asked
signal.signal(signal.{name}, signal.SIG_DFL)  # it may have been started under nohup
end_when_asked()
asked = []
def callback(phase, about):
    if not asked:
        asked.append(os.kill(os.getpid(), signal.{name}))
        for _ in range(1000):
            pass
gc.callbacks.append(callback)
try:
    gc.collect()
    time.sleep(10)
    print("went on")
except BaseException as end:
    print(type(end).__name__)
"""


@pytest.mark.parametrize(
    "name, ends_by", [("SIGTERM", "Terminated"), ("SIGHUP", "Terminated"), ("SIGINT", "KeyboardInterrupt")]
)
def test_a_command_ends_when_it_is_asked_to_even_while_garbage_is_collected(name: str, ends_by: str):
    program = ASKED_TO_END.format(name=name)
    done = subprocess.run([sys.executable, "-c", program], cwd=repository_root(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{ends_by}\n", "")


def test_a_command_under_nohup_goes_on_when_its_terminal_hangs_up():
    program = "import os, signal; from lib.__main__ import end_when_asked; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    program += "; end_when_asked(); os.kill(os.getpid(), signal.SIGHUP); print('went on')"
    done = subprocess.run([sys.executable, "-c", program], cwd=repository_root(), capture_output=True, text=True)
    assert done.stdout == "went on\n", done.stderr
