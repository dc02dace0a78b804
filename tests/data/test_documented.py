"""The examples of docs/importing.md and docs/workflow.md, copied and pasted: they import as the text says."""

import json
import re
from pathlib import Path

import pytest

from lib.__main__ import main
from lib.data.store import Store
from lib.files import repository_root
from lib.trace import Trace

PAGE = (repository_root() / "docs" / "importing.md").read_text()
WORKFLOW = (repository_root() / "docs" / "workflow.md").read_text()


@pytest.fixture(autouse=True)
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder with a home of its own, and the files of the page by their names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETRACE_HOME", str(tmp_path / "home"))
    for name, content in re.findall(r"`([\w.]+)`:\n\n```\w*\n(.*?)```", PAGE, re.DOTALL):
        Path(name).write_text(content)


def imported(*words: str) -> dict[str, Trace]:
    assert main(["traces", "import", *words]) == 0
    return {trace.prompt: trace for trace in Store(Path("home/store")).scan()}


def commands(text: str) -> list[str]:
    return re.findall(r"^python -m lib traces import (.*?)(?:\s+#.*)?$", text, re.MULTILINE)


def test_the_commands_of_the_page_import_its_files():
    assert {"eggs.jsonl", "quiz.csv --mapping quiz.yaml"} <= {*commands(PAGE), *commands(WORKFLOW)}
    eggs = imported("eggs.jsonl")["A pack has 6 eggs. How many are in 3 packs, after 2 broke?"]
    assert [step.content for step in eggs.steps] == [
        "3 packs hold 3*6 = 18 eggs.",
        "Without the broken ones, 18-2 = 16 are left.",
    ]
    assert eggs.final_answer == "16"
    pens = imported("quiz.csv", "--mapping", "quiz.yaml")["A box holds 3 red and 4 blue pens. How many pens?"]
    assert [step.content for step in pens.steps] == ["3 red and 4 blue are counted.", "3 + 4 = 7"]
    assert (pens.final_answer, pens.meta) == ("7", {"category": "addition", "source": "my_quiz"})


def test_the_records_and_the_mapping_of_the_workflow_are_read():
    records = re.search(r"```json\n(.*?)```", WORKFLOW, re.DOTALL)[1]
    Path("mine.jsonl").write_text(records)
    assert {trace.final_answer for trace in imported("mine.jsonl").values()} == {"5", "6", "7"}
    assert len(records.splitlines()) == len([json.loads(line) for line in records.splitlines()]) == 3
    Path("short.yaml").write_text(re.search(r"```yaml\n(\{prompt.*?)```", WORKFLOW, re.DOTALL)[1])
    assert len(imported("quiz.csv", "--mapping", "short.yaml")) == 5


def test_every_rule_of_the_page_is_as_the_page_says():
    rules = re.findall(r"^\| `(.*?)`.*? \| `(72)` \|", PAGE, re.MULTILINE)
    assert len(rules) == 5
    for last, answer in rules[:-1]:
        Path("one.jsonl").write_text(json.dumps({"question": last, "answer": f"first\n{last}"}))
        assert imported("one.jsonl")[last].final_answer == answer
