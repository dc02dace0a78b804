"""Doing a run again: equal results are certified, and whatever was changed is found and named."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from small import SmallRun

from lib.__main__ import main
from lib.config import load_config, parse_yaml
from lib.data.store import Store
from lib.errors import RequestError
from lib.experiments import manifest, stages
from lib.experiments import reproduce as again
from lib.experiments.evidence import compare_results, first_step_apart, read_record
from lib.experiments.manifest import code_of
from lib.experiments.run import Run
from lib.files import repository_root, sealed, write_json
from lib.tasks.reasoning_gym import VARIABLE


@pytest.fixture
def made(processes_compile_once, small_run: SmallRun) -> Path:
    """The folder of a run that is done."""
    return small_run.folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(made.parent, tmp_path / "copy")
    monkeypatch.setenv("RETRACE_HOME", str(tmp_path / "copy"))
    return tmp_path / "copy" / made.name


def reproduce(*words: str) -> int:
    """The exit status of the verb."""
    try:
        return main(["runs", *words])
    except SystemExit as end:
        return end.code


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_a_run_done_again_by_its_code_is_equal_in_every_result_and_certified(run, capsys):
    assert reproduce("reproduce", run.name) == 0
    said = capsys.readouterr().out
    [file] = (run.parent / "certificates").glob("*.json")
    certificate = json.loads(file.read_bytes())
    names = [row["what"] for row in certificate["rows"]]
    assert certificate["equal"] and all(row["equal"] for row in certificate["rows"])
    assert f"Equal: all {len(names)} results, bit for bit." in said and f"{file.with_suffix('.html')}" in said
    for name in ("dataset content", "losses, every logged step", "tuned weights", "pictures of the report",
                 "weights and optimizer state, step 2", "weights and optimizer state, step 3",
                 "text of the base model's answers", "text of the tuned model's answers"):  # fmt: skip
        assert name in names
    page = BeautifulSoup(file.with_suffix(".html").read_text(), "html.parser")
    assert "came out the same again, bit for bit" in page.select_one(".verdict").get_text()
    assert not page.find_all(["script", "link", "iframe"])
    assert not list(run.parent.glob(".reproduce_*")) and reproduce("verify", run.name) == 0


@pytest.mark.slow
def test_the_page_alone_is_enough_and_another_nproc_is_found_and_named(made, tmp_path):
    """In the home of a colleague, who has the repository and the one file; and another number of threads."""
    record = read_record(made / "report.html")
    assert record == read_record(made / "evidence.json")
    if record["code"]["git_dirty"]:  # of which a page holds too little to do it again
        with pytest.raises(again.RequestError, match="changes that were not committed"):
            again.reproduce(str(made / "report.html"))
        record["code"] |= {"git_sha": None, "git_dirty": False}
    page = f'<pre id="evidence">{json.dumps(record).replace("<", "&lt;")}</pre>'
    (tmp_path / "report.html").write_text(page)
    environment = {**os.environ, "NPROC": "3"}
    words = ["--home", tmp_path / "theirs", "runs", "reproduce", tmp_path / "report.html", "--json"]
    command = [sys.executable, "-m", "lib", *map(str, words)]
    ended = subprocess.run(command, cwd=repository_root(), env=environment, capture_output=True, text=True)
    certificate = json.loads(ended.stdout)
    assert certificate["fingerprint"] == [{"name": "nproc", "recorded": "2", "found": "3"}]
    apart = [row["what"] for row in certificate["rows"] if not row["equal"]]
    assert "dataset content" not in apart and ended.returncode == (1 if apart else 0)
    if apart:
        assert any("nproc: 2 recorded, 3 here" in sentence for sentence in certificate["explanation"])


def test_a_run_that_was_gone_on_with_by_other_code_promises_no_equality(run):
    said = json.loads((run / "run_manifest.json").read_bytes())
    attempts = [{"git_sha": "a" * 40, "git_dirty": False}, {}, *said["attempts"]]  # the second was killed at once
    write_json(run / "state.json", {name: said[name] for name in ("run_id", "created_at")} | {"attempts": attempts})
    stages.write_report(Run(run, load_config(run / "config.yaml")))
    record = read_record(run / "evidence.json")
    assert record["fingerprint_changed"] == ["code"] and record["code"] == code_of(said["attempts"][-1])
    rows = compare_results(record["results"], record["results"] | {"weights_sha256": "b" * 64})
    told = " ".join(again._explanation(record, rows, [], [], []))
    assert "code had changed: equality is not promised" in told and "was not kept" not in told
    told = " ".join(again._explanation(record | {"fingerprint_changed": []}, rows, [], [], []))
    assert "equality was promised, and was not kept" in told


def test_traces_that_a_run_did_not_play_are_taken_from_this_home(run, tmp_path):
    record = read_record(run / "evidence.json")
    again._restore_traces(record, tmp_path / "played")
    assert Store(tmp_path / "played" / "store").count() == 0
    config = parse_yaml(record["config"], "config.yaml")
    del config["traces"]
    record["config"] = json.dumps(config)
    again._restore_traces(record, tmp_path / "kept")
    assert Store(tmp_path / "kept" / "store").count() == Store(run.parent / "store").count() > 0
    shutil.rmtree(run.parent / "datasets")
    with pytest.raises(RequestError, match="did not play itself"):
        again._restore_traces(record, tmp_path / "gone")


@pytest.mark.parametrize("name", ["train.tunix_sft.jsonl", "eval_after.jsonl", "metrics.jsonl", "delta_report.md"])
def test_f37_one_changed_byte_is_named_in_the_certificate(name, made, run, monkeypatch, capsys):
    flip(run / name)
    # What executing it again would leave, without the minute that this takes.
    monkeypatch.setattr(again, "_execute", lambda record, scratch, *rest: shutil.copytree(made, scratch / "again"))
    assert reproduce("reproduce", run.name) == 1
    said = capsys.readouterr().out
    assert f"differs: on disk: edited: {name}" in said and "What was executed, to look at:" in said
    [page] = (run.parent / "certificates").glob("*.html")
    assert f"edited: {name}" in page.read_text()


def test_one_changed_byte_of_the_dataset_is_named_by_verify(run, capsys):
    flip(run.parent / "datasets" / "smoke-v1" / "traces.parquet")
    assert reproduce("verify", run.name) == 1
    assert "edited: dataset smoke-v1" in (said := capsys.readouterr().out) and "traces.parquet" in said


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints/03_train-checkpoint.ipynb", "checkpoint-final/.DS_Store", "checkpoints/Thumbs.db"]
)
def test_what_is_left_by_who_looked_at_a_run_is_no_part_of_it(name, run, capsys):
    sealed_before = manifest.hash_files(run)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("what was seen")
    assert reproduce("verify", run.name) == 0 and manifest.hash_files(run) == sealed_before
    (run / "notes.txt").write_text("a note")
    assert reproduce("verify", run.name) == 1 and name not in (said := capsys.readouterr().out)
    assert "extra: notes.txt" in said


@pytest.mark.parametrize(
    "change, row",
    [
        ({"dataset_sha256": "0"}, "dataset content"),
        ({"weights_sha256": "0"}, "tuned weights"),
        ({"pictures": []}, "pictures of the report"),
        ({"summary_sha256": "0"}, "figures of the comparison"),
    ],
)
def test_a_result_that_differs_is_a_row_that_differs(change, row, made):
    recorded = read_record(made / "evidence.json")["results"]
    rows = compare_results(recorded, recorded | change)
    assert [found.what for found in rows if not found.equal] == [row]


def test_the_first_step_and_the_first_item_apart_are_named(made):
    recorded = read_record(made / "evidence.json")["results"]
    found = json.loads(json.dumps(recorded))
    found["losses"][1][1] = math.nextafter(found["losses"][1][1], math.inf)
    found["checkpoints"][-1][1] = "0" * 64
    found["eval_after"][2][1] = "0"
    found["inputs"]["training"]["seed"] += 1
    rows = {row.what: row.note for row in compare_results(recorded, found) if not row.equal}
    assert rows["losses, every logged step"].startswith(f"first differs at step 2: loss {recorded['losses'][1][1]}")
    assert rows["text of the tuned model's answers"] == f"first differs at item {recorded['eval_after'][2][0]}"
    assert re.fullmatch(r"training.seed: \d+ recorded, \d+ found", rows["training settings, seed among them"])
    assert "weights and optimizer state, step 3" in rows and first_step_apart(recorded, found) == 2


def test_the_code_is_restored_with_its_patch_and_an_edited_patch_is_refused(run, tmp_path):
    """In a repository of its own, with a change that was not committed and a file that was never added."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    root = repository_root()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("old\n")
    for words in (["init", "-q"], ["add", "lib"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "lib" / "a.py").write_text("new\n")
    (tmp_path / "lib" / "b.py").write_text("never added\n")
    with pytest.MonkeyPatch.context() as patch:
        for module in (manifest, again):
            patch.setattr(module, "repository_root", lambda: tmp_path)
        code = manifest.save_code(run)
        source = again._Source({"code": code}, run, [])
        again._restore_code(source, run.parent / "code")
        assert code["git_dirty"] and root != tmp_path
        assert (run.parent / "code" / "lib" / "a.py").read_text() == "new\n"
        assert (run.parent / "code" / "lib" / "b.py").read_text() == "never added\n"
        assert b"lib/b.py" not in subprocess.run([*git, "ls-files"], capture_output=True).stdout
        shutil.rmtree(run.parent / "code")
        flip(run / "git.patch")
        with pytest.raises(again.RequestError, match="not the changes that the run was made with"):
            again._restore_code(source, run.parent / "code")


def test_what_a_run_named_by_a_path_is_found_by_the_code_that_is_executed_again(tmp_path, monkeypatch):
    here, code = tmp_path / "here", tmp_path / "scratch" / "code"
    (here / "weights" / "gemma").mkdir(parents=True)
    code.mkdir(parents=True)
    for name in ("mine.jsonl", "mine.manifest.json", "secret"):
        (here / name).write_text(name)
    monkeypatch.chdir(here)
    again._bring_along({"evaluation": {"eval_set": "mine.jsonl"}, "model": {"name": "weights/gemma"}}, code)
    assert (code / "mine.jsonl").read_text() == "mine.jsonl" and (code / "mine.manifest.json").is_file()
    assert (code / "weights" / "gemma").is_dir()
    for name in ("../secret", "../../here/../secret", str(here / "secret"), "high_card_duel_v1"):
        again._bring_along({"evaluation": {"eval_set": name}, "model": {"name": "tiny"}}, code)
    for config in ({}, {"evaluation": None, "model": ["a"]}, {"evaluation": {"eval_set": 1}, "model": {"name": None}}):
        again._bring_along(config, code)
    assert sorted(path.name for path in code.iterdir()) == ["mine.jsonl", "mine.manifest.json", "weights"]
    assert [path.name for path in code.parent.iterdir()] == ["code"]


def test_an_interpreter_is_looked_for_from_where_the_command_is_given(tmp_path, monkeypatch):
    seen = {}

    def started(command, env, **options):
        seen.update(command=command, environment=env)
        raise RequestError("seen")

    place = tmp_path / "here" / ".venv" / "bin" / "python"
    place.parent.mkdir(parents=True)
    place.symlink_to(sys.executable)
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv(VARIABLE, ".venv/bin/python")
    monkeypatch.setattr(again.subprocess, "Popen", started)
    for named, found in ((".venv/bin/python", str(place)), ("python-of-the-path", "python-of-the-path")):
        with pytest.raises(RequestError, match="seen"):
            again._execute({"config": f"traces: {{ungar_python: {named}}}"}, tmp_path, Path(sys.executable), print)
        assert seen["command"][-2:] == ["--set", f'traces.ungar_python="{found}"']
        assert seen["environment"][VARIABLE] == str(place)


def test_why_doing_it_again_failed_is_told_without_colours(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    (tmp_path / "code").symlink_to(repository_root())
    with pytest.raises(again.RetraceError, match="^doing it again failed: [^\x1b]*no such key"):
        again._execute({"config": "nmae: x"}, tmp_path, Path(sys.executable), print)


@pytest.mark.parametrize("config", ["traces: a text", "traces: [1]", "traces: {game: [1]}"])
def test_a_record_whose_traces_are_anything_is_refused_in_one_line(config, home, tmp_path):
    record = {"config": config, "results": {"dataset_sha256": "0"}}
    record["dataset"] = {"dataset_key": "toy-v1", "provenance": {"sources": {"builtin": 1}}}
    with pytest.raises(RequestError, match="^dataset toy-v1: holds traces that the run did not play itself"):
        again._restore_traces(record, tmp_path / "target")


def test_a_commit_that_is_no_commit_is_refused(run):
    record = read_record(run / "evidence.json")
    for name, said in (("--output=/tmp/x", "expected the name of a commit"), ("0" * 40, "is not in this repository")):
        record["code"] = {"git_sha": name, "git_dirty": False}
        with pytest.raises(again.RequestError, match=said):
            again._restore_code(again._Source(record, run, []), run.parent / "code")
        shutil.rmtree(run.parent / "code", ignore_errors=True)


def test_a_run_that_is_not_done_and_a_page_without_a_record_are_refused(run, tmp_path, capsys):
    said = json.loads((run / "run_manifest.json").read_bytes()) | {"status": "interrupted"}
    write_json(run / "run_manifest.json", sealed(said))
    assert reproduce("reproduce", run.name) == 2
    (tmp_path / "page.html").write_text("<p>nothing</p>")
    assert reproduce("reproduce", str(tmp_path / "page.html")) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "its status is interrupted" in first and "holds no record of a run" in second


def with_another_learning_rate(run: Path) -> Path:
    """The run `other`, which says that it was made so."""
    other = shutil.copytree(run, run.parent / "other")
    manifest = json.loads((other / "run_manifest.json").read_bytes())
    manifest["config"]["training"]["learning_rate"] = 0.1
    write_json(other / "run_manifest.json", sealed(manifest))
    return other


def test_two_runs_compared_name_their_differences(run, capsys):
    with_another_learning_rate(run)
    assert reproduce("compare", run.name, "other") == 0
    said = capsys.readouterr().out
    assert "training.learning_rate" in said and "results are equal, bit for bit" in said


def test_two_runs_whose_folders_have_one_name_are_both_in_the_figures(run, capsys):
    (run.parent / "elsewhere").mkdir()
    other = with_another_learning_rate(run).rename(run.parent / "elsewhere" / run.name)
    assert reproduce("compare", run.name, str(other), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["differences"] == [{"key": "training.learning_rate", "one": "0.003", "other": "0.1"}]
    assert told["accuracy"].keys() == {"one", "other"} and told["accuracy"]["one"].keys() == {"before", "after"}


def test_the_page_about_two_runs_says_what_is_different_then_the_figures_then_each_item(run):
    with_another_learning_rate(run)
    assert reproduce("compare", run.name, "other", "--output", str(run.parent / "page.html")) == 0
    page = BeautifulSoup((run.parent / "page.html").read_text(), "html.parser")
    sections = [section["id"] for section in page.select("section")]
    assert sections[:3] == ["differences", "verdict", "accuracy"] and {"broken", "fixed", "wrong"} < set(sections[3:])
    rows = [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in page.select("#differences tr")]
    assert rows == [["", run.name, "other"], ["training.learning_rate", "0.003", "0.1"]]
    assert (
        len(page.select("#accuracy svg.axis")) >= 3 and "before and after" in page.select_one("#differences").get_text()
    )
    foot = page.footer.get_text()
    commands = [f"runs reproduce {name}" for name in (run.name, "other")]
    assert all(command in foot for command in commands) and "python 3." in foot and "dataset smoke-v1 " in foot


def test_the_table_of_runs_holds_what_comparing_them_needs(run):
    other = with_another_learning_rate(run)
    (other / "eval_after.jsonl").write_text("damaged")
    assert reproduce("list", "--html") == 0
    soup = BeautifulSoup((run.parent / "index.html").read_text(), "html.parser")
    rows = {row["data-run"]: row for row in soup.select("tbody tr")}
    assert json.loads(rows["other"]["data-facts"]) == {"training.learning_rate": "0.1"}
    assert len(rows[run.name]["data-marks"]) == 4 and "data-marks" not in rows["other"].attrs
    [items] = json.loads(soup.select_one("#runs")["data-items"]).values()
    assert [len(item) for item in items] == [2] * 4 and rows[run.name].select_one(".result svg.axis")
