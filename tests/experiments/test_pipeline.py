"""The whole job for real, as small as it can be: what a run leaves behind, and how it ends when a notebook does not."""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from safetensors.numpy import load_file, save_file
from small import CONFIG, RUN, SMALL, SmallRun

from lib.__main__ import main
from lib.config import load_config, to_dict
from lib.data.dataset import load_dataset
from lib.data.importing import Accepted, read_traces
from lib.data.tokenizer import train_tokenizer
from lib.errors import RequestError
from lib.evaluation.evalsets import load_eval_set
from lib.evaluation.results import read_results
from lib.experiments import pipeline
from lib.experiments.pipeline import STAGES, run_pipeline
from lib.experiments.run import Run, create_run, open_run
from lib.files import repository_root, sha256_file, write_json
from lib.model.releasing import write_released

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("processes_compile_once")]

LOCKS = {".lock", ".kernel.lock", ".kernel.pid"}
STAGE_NAMES = ["01_traces", "02_dataset", "04_evaluate_before", "03_train", "04_evaluate_after", "05_compare"]


@pytest.fixture
def done(small_run: SmallRun) -> SmallRun:
    return small_run


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_ends_well_and_prints_its_conclusion(done):
    sentence = done.manifest["metrics"]["evaluation"]["sentence"]
    *_, conclusion, report, reproduce = done.printed.splitlines()
    assert conclusion == sentence and sentence.endswith(".")
    assert report == f"Report: {done.folder / 'report.html'}"
    assert reproduce.startswith("Reproduce: ") and reproduce.endswith(
        f"-m lib --home {done.home} runs reproduce {done.folder.name}"
    )
    assert [line.split()[0] for line in done.printed.splitlines()[1:7]] == STAGE_NAMES


def test_the_manifest_is_the_last_file_and_names_every_other_with_its_hash(done):
    assert done.manifest["status"] == "done" and "error" not in done.manifest
    assert set(done.manifest["artifacts"]) == files(done.folder) - {"run_manifest.json", *LOCKS}
    for name, recorded in done.manifest["artifacts"].items():
        file = done.folder / name
        assert recorded == {"sha256": sha256_file(file), "bytes": file.stat().st_size}, name
    times = {file.stat().st_mtime_ns for file in done.folder.rglob("*") if file.is_file()}
    assert (done.folder / "run_manifest.json").stat().st_mtime_ns == max(times)
    assert not (done.folder / "state.json").exists()


def test_every_notebook_is_there_executed_to_its_end_and_readable_as_a_page(done):
    assert [stage.name for stage in STAGES] == STAGE_NAMES
    for name in STAGE_NAMES:
        notebook = nbformat.read(done.folder / f"{name}.ipynb", as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
        conclusion = json.loads((done.folder / "stages" / f"{name}.json").read_bytes())["sentence"]
        assert cells[-1].outputs[0].data["text/markdown"] == conclusion and conclusion in done.printed
        page = BeautifulSoup((done.folder / f"{name}.html").read_text(), "html.parser")
        assert not page.find_all(["script", "iframe", "link"]) and page.find("h1")
        assert all(image.get("alt") for image in page.find_all("img"))
        assert conclusion.split(";")[0].split(",")[0] in page.get_text()


def test_every_notebook_opens_with_two_sentences_of_the_run(done):
    for name in STAGE_NAMES:
        [setup] = [c for c in nbformat.read(done.folder / f"{name}.ipynb", as_version=4).cells if c.id == "setup"]
        [summary] = [output.data["text/markdown"] for output in setup.outputs]
        assert re.fullmatch(r"\*\*[^*]+\.\*\* [^*]+\.", summary), summary
        page = BeautifulSoup((done.folder / f"{name}.html").read_text(), "html.parser")
        assert page.strong.text.split(":")[0].split(",")[0] in summary.replace("\\", "")


def test_links_from_notebook_to_notebook_and_from_page_to_page_lead_to_files_of_the_run(done):
    for name in STAGE_NAMES:
        cells = nbformat.read(done.folder / f"{name}.ipynb", as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        page = BeautifulSoup((done.folder / f"{name}.html").read_text(), "html.parser")
        links = [link["href"] for link in page.select("a[href]") if not link["href"].startswith("#")]
        assert links and all(link.endswith(".html") for link in links)
        assert all((done.folder / link).is_file() for link in [*links, *re.findall(r"\]\(([^)]*)\)", text)])


def test_the_reports_say_the_verdict_of_the_manifest(done):
    evaluation = done.manifest["metrics"]["evaluation"]
    assert evaluation == json.loads((done.folder / "eval_summary.json").read_bytes())
    assert f"**{evaluation['sentence']}**" in (done.folder / "delta_report.md").read_text()
    page = BeautifulSoup((done.folder / "report.html").read_text(), "html.parser")
    assert page.select_one(".verdict p").get_text() == evaluation["sentence"]
    for said in (done.folder.name, done.manifest["run_id"], done.manifest["metrics"]["weights_sha256"]):
        assert said in page.get_text()


def test_the_manifest_tells_what_went_in(done):
    manifest = done.manifest
    dataset = load_dataset(done.home / "datasets", "smoke-v1")
    assert manifest["dataset_key"] == dataset.key
    assert manifest["inputs"]["dataset"] == {"key": "smoke-v1", "content_sha256": dataset.manifest["content_sha256"]}
    eval_set = load_eval_set(repository_root() / "evalsets" / "high_card_duel_v1.jsonl")
    assert manifest["inputs"]["eval_set"] == {"name": eval_set.name, "sha256": eval_set.sha256}
    assert manifest["config"] == to_dict(load_config(CONFIG, SMALL))
    assert manifest["config"] == to_dict(load_config(done.folder / "config.yaml"))
    assert manifest["training_config"] == manifest["config"]["training"]
    assert (manifest["recipe"], manifest["seed"]) == ("trace_sft_v1", 7)
    assert uuid.UUID(manifest["run_id"]) and manifest["created_at"] < manifest["finished_at"]
    assert manifest["artifacts_path"] == done.folder.name
    assert list(manifest["wall_s"]) == STAGE_NAMES and all(seconds > 0 for seconds in manifest["wall_s"].values())
    assert any(line.startswith("jax==") for line in manifest["environment"])


def test_the_manifest_tells_what_was_learned(done):
    model = json.loads((done.folder / "checkpoint-final" / "model.json").read_bytes())
    metrics = done.manifest["metrics"]
    assert metrics["weights_sha256"] == model["weights_sha256"] and len(model["weights_sha256"]) == 64
    assert metrics["training"]["steps"] == 3 and done.manifest["fingerprint"] == model["fingerprint"]
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["loss"] == metrics["training"]["loss"]
    before, after = (read_results(done.folder / f"eval_{name}.jsonl") for name in ("before", "after"))
    assert after.weights_sha256 == model["weights_sha256"] == done.manifest["metrics"]["weights_sha256"]
    assert before.weights_sha256 != after.weights_sha256


def test_no_path_of_this_machine_is_in_the_manifest(done):
    text = (done.folder / "run_manifest.json").read_text()
    assert str(done.home) not in text and str(repository_root()) not in text


def test_evaluations_have_the_limit_and_import_back(done):
    for name in ("before", "after"):
        records = list(read_traces(done.folder / f"eval_{name}.jsonl"))
        assert len(records) == 4 and all(isinstance(record, Accepted) for record in records)


def test_nothing_temporary_stays(done):
    hidden = {name for name in files(done.home) if "/." in f"/{name}"}
    assert {name.split("/")[-1] for name in hidden} == {".lock", ".kernel.lock", ".kernel.pid"}


def test_runs_list_and_show_tell_of_it(done, monkeypatch, capsys):
    monkeypatch.setenv("RETRACE_HOME", str(done.home))
    assert main(["runs", "list"]) == 0
    listed = capsys.readouterr().out.split(maxsplit=2)
    sentence = done.manifest["metrics"]["evaluation"]["sentence"]
    assert listed == [done.folder.name, "done", f"{sentence}\n"]
    assert main(["runs", "list", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["run"], row["status"], row["verdict"]) == (done.folder.name, "done", sentence)
    assert (row["dataset"], row["model"], row["report"]) == ("smoke-v1", "tiny", True)
    for name in (done.folder.name, str(done.folder)):
        assert main(["runs", "show", name]) == 0
        shown = capsys.readouterr().out
        assert sentence in shown and done.manifest["metrics"]["weights_sha256"] in shown
    assert main(["runs", "show", done.folder.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == done.manifest


def test_a_run_that_is_done_is_not_opened_again(done):
    with pytest.raises(RequestError, match="not a run folder at work"):
        open_run("configs/smoke.yaml", str(done.folder))


# ---- runs that are refused --------------------------------------------------------------------------------


def test_a_run_goes_on_in_its_own_home_alone(home, tmp_path, monkeypatch, capsys):
    run, other = create_run(load_config(CONFIG), "toy"), tmp_path / "other"
    before = files(home)
    monkeypatch.setenv("RETRACE_HOME", str(other))
    assert main(["resume", str(run.folder)]) == 2
    said = f"error: {run.folder}: lies outside of the home {other}; it goes on in its own alone: give --home {home}\n"
    assert capsys.readouterr().err == said
    assert files(home) == before and not other.exists()


def test_a_notebook_at_work_by_hand_loses_nothing_to_one_who_would_resume_it(home, capsys):
    run = open_run(CONFIG)
    run.path(".metrics.jsonl.x.tmp").write_text("at work")
    assert main(["resume", run.name]) == 2
    assert "belongs to notebooks executed by hand" in capsys.readouterr().err
    assert run.path(".metrics.jsonl.x.tmp").read_text() == "at work"


# ---- runs that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, error",
    [
        pytest.param("raise ValueError('first')", "ValueError: first", id="f17"),
        pytest.param("import sys; sys.exit(0)", "the notebook ended before its last cell", id="f19"),
        pytest.param("import os; os.kill(os.getpid(), 9)", "Kernel died", id="f18"),
    ],
)
def test_f17_f18_f19_a_notebook_that_does_not_end_makes_the_run_failed(source, error, repository_with, home, capsys):
    repository_with("01_traces", "verify", source)
    assert main([*RUN, "--name", "toy"]) == 1
    said = capsys.readouterr().err.splitlines()
    [folder] = home.glob("*_toy")
    manifest = json.loads((folder / "run_manifest.json").read_bytes())
    assert len(said) == 1 and said[0] == f"error: {manifest['error']}"
    assert manifest["status"] == "failed" and error in manifest["error"]
    assert manifest["error"].startswith("01_traces: ") and "01_traces.ipynb" in manifest["error"]
    notebook = nbformat.read(folder / "01_traces.ipynb", as_version=4)
    texts = {cell.id: str(cell.get("outputs")) for cell in notebook.cells}
    assert "traces added" in texts["generate"] and texts["conclusion"] == "[]"
    assert "traces added" in (folder / "01_traces.html").read_text()
    assert set(manifest["artifacts"]) >= {"01_traces.ipynb", "01_traces.html", "config.yaml"}
    assert not (folder / "stages" / "01_traces.json").exists() and not list(folder.glob("02_*"))
    assert manifest["wall_s"] == {} and not (folder / "state.json").exists()
    assert manifest["metrics"] == {"training": None, "weights_sha256": None, "evaluation": None}
    main(["runs", "list"])
    assert f"{folder.name}  " in (listed := capsys.readouterr().out) and "failed" in listed


def test_an_example_that_would_not_fit_ends_a_run_before_any_model_answers(home, capsys):
    assert main([*RUN, "--set", "model.max_length=50", "--name", "toy"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: 02_dataset: ") and " examples are longer than model.max_length 50: " in said
    [folder] = home.glob("*_toy")
    assert not list(folder.glob("*04_evaluate*")) and not list(folder.glob("*eval_before*"))
    cells = {cell.id: cell for cell in nbformat.read(folder / "02_dataset.ipynb", as_version=4).cells}
    assert "examples are over max_length 50" in str(cells["lengths"].outputs)


@pytest.mark.parametrize(
    "failure, status", [(OSError(28, "No space left on device"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
@pytest.mark.parametrize("at", [0, len(STAGE_NAMES) - 1], ids=["first stage", "last stage"])
def test_f21_f28_no_run_is_done_that_was_stopped_by_whatever(failure, status, at, monkeypatch, home):
    def execute(stage, run: Run, deadline: float) -> str:
        if stage.name == STAGE_NAMES[at]:
            raise failure
        return "done"

    monkeypatch.setattr(pipeline, "execute", execute)
    with pytest.raises(type(failure)):
        run_pipeline(load_config("configs/smoke.yaml"), "toy", say=lambda line: None)
    [folder] = home.glob("*_toy")
    manifest = json.loads((folder / "run_manifest.json").read_bytes())
    assert manifest["status"] == status and manifest["error"]
    assert not (folder / "state.json").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        ("evaluation.eval_set=absent_v1", "eval set absent_v1: no such file"),
        ("model.name=someone/absent", "model someone/absent: not on this machine"),
        ("training.num_stepz=1", "did you mean training.num_steps?"),
    ],
)
def test_what_could_only_fail_later_is_refused_before_a_folder_is_made(change, said, home, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*RUN, "--set", change]) == 2
    assert said in capsys.readouterr().err and not home.exists()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def with_a_shorter_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"][1:].copy()}, folder / "model.safetensors")


def of_another_architecture(folder: Path) -> None:
    write_json(folder / "config.json", json.loads((folder / "config.json").read_bytes()) | {"model_type": "llama"})


def with_a_larger_tokenizer(folder: Path) -> None:
    words = " ".join("".join(letters) for letters in product("abcdefghij", repeat=3))
    train_tokenizer([words] * 5, vocab_size=2000).save(folder / "tokenizer.json")


@pytest.mark.parametrize(
    "damage, said",
    [
        (cut_weights, "model.safetensors"),
        (without_a_norm, "model.norm.weight"),
        (with_a_shorter_norm, "model.norm.weight"),
        (of_another_architecture, "llama"),
        (with_a_larger_tokenizer, "tokenizer"),
    ],
)
def test_a_bad_folder_of_weights_is_refused_before_a_folder_is_made(damage, said, small_model, tmp_path, home, capsys):
    weights = tmp_path / "weights"
    weights.mkdir()
    write_released(weights, small_model)
    damage(weights)
    assert main([*RUN, "--set", f"model.name={weights}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not home.exists()


def test_f39_a_hostile_name_makes_no_folder(home, capsys):
    for name in ("../x", "/tmp/x", "a b", "{x}", "x" * 300):
        assert main([*RUN, "--name", name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 5 and not home.exists()


# ---- notebooks alone --------------------------------------------------------------------------------------


@pytest.fixture
def own_runs_folder() -> Iterator[None]:
    """The runs/ of the repository is as it was when the test is over."""

    def listing() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (repository_root() / "runs").glob("by_hand_*")}

    before = listing()
    yield
    assert listing() == before


@pytest.mark.parametrize("name", ["01_traces", "02_dataset", "05_compare"])
def test_a_notebook_runs_alone_under_plain_papermill(name, home, tmp_path, own_runs_folder):
    command = [sys.executable, "-m", "papermill", f"notebooks/{name}.ipynb", str(tmp_path / "out.ipynb")]
    command += ["-p", "overrides", "training.num_steps=3 training.eval_every=3 evaluation.limit=8"]
    done = subprocess.run(command, cwd=repository_root(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    [folder] = home.glob("by_hand_smoke_*")
    sentence = json.loads((folder / "stages" / f"{name}.json").read_bytes())["sentence"]
    assert notebook.cells[-1].outputs[0].data["text/markdown"] == sentence
    if name == "05_compare":  # which is all of the job
        assert "on 8 items" in sentence and (folder / "report.html").is_file()
        assert json.loads((folder / "eval_summary.json").read_bytes())["sentence"] == sentence


def as_text(tokens: str) -> str:
    """Bytes that are tokens of their own, <0xBB>, as the text that they decode to."""
    runs = r"(?:<0x[0-9A-F]{2}>)+"
    return re.sub(runs, lambda run: bytes.fromhex(re.sub("<0x|>", "", run[0])).decode(errors="replace"), tokens)


def test_a_run_is_explored_under_plain_papermill_and_nothing_in_it_changes(done, home, tmp_path):
    before = {path: sha256_file(path) for path in done.folder.rglob("*") if path.is_file()}
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", "notebooks/00_explore.ipynb", str(out), "-p", "run_dir", done.folder]
    environment = os.environ | {"RETRACE_HOME": str(done.home)}
    ended = subprocess.run(command, cwd=repository_root(), capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    views = {cell.id: cell.outputs[-1].data for cell in nbformat.read(out, as_version=4).cells if cell.get("outputs")}
    for name in ("traces", "ask", "steps"):  # moved in JupyterLab, still everywhere else
        assert "application/vnd.jupyter.widget-view+json" in views[name] and "<script" not in views[name]["text/html"]
    asked = BeautifulSoup(views["ask"]["text/html"], "html.parser")
    assert [title.text.split(":")[0] for title in asked.find_all("strong")][:2] == ["tiny (base)", "tiny (tuned)"]
    for model, tokens in zip(("before", "after"), asked.find_all("p")[1:3], strict=True):
        [probability.decompose() for probability in tokens.find_all("sub")]
        answered = read_results(done.folder / f"eval_{model}.jsonl").items[0]
        assert as_text(tokens.text.replace("↵", "\n")) == answered.completion
    assert views["conclusion"]["text/markdown"].replace("\\", "") == done.manifest["metrics"]["evaluation"]["sentence"]
    assert {path: sha256_file(path) for path in done.folder.rglob("*") if path.is_file()} == before
