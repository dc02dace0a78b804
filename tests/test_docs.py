"""README.md and docs/: what they tell a reader to type can be typed, what they link to is there, the tutorial works."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from lib.__main__ import parser
from lib.config import load_config
from lib.errors import RequestError
from lib.files import repository_root

ROOT = repository_root()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in
         [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "runs" / "README.md"]}  # fmt: skip
CONFIGS = {f"configs/{path.name}": path.read_text("utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))}


class Command(NamedTuple):
    page: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands(page: str, text: str) -> Iterator[Command]:
    """What follows `python -m lib`, in blocks and in running text; not a synopsis, which holds […] or …."""
    text = re.sub(r"\\\n[# ]*", "", text)
    for found in re.findall(r"python -m lib ([^`\n]*)", text):
        said = re.split(r" #|\s{2,}\(", found)[0]
        if not re.search(r"[\[…]", said):
            yield Command(page, shlex.split(said))


COMMANDS = [command for page, text in (PAGES | CONFIGS).items() for command in commands(page, text)]


class Block(NamedTuple):
    """What stands between fences, and the file that the line before says it is; empty where it says none."""

    file: str
    kind: str
    text: str


def all_blocks(text: str) -> list[Block]:
    found = re.findall(r"(?:`([\w./]+)`:\n\n)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(*parts) for parts in found]


def blocks(text: str, kind: str) -> list[str]:
    return [block.text for block in all_blocks(text) if block.kind == kind]


def test_the_readme_is_three_screens_and_its_first_commands_are_the_two():
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert blocks(PAGES["README.md"], "")[0] == "make quickstart\nmake test\n"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_one(command: Command):
    try:
        arguments = parser().parse_args(command.words)
    except SystemExit as helped:
        assert helped.code == 0 and "--help" in command.words
        return
    except RequestError as error:
        pytest.fail(f"{command}: {error}")
    if (config := getattr(arguments, "config", None)) in CONFIGS:
        load_config(config, getattr(arguments, "set", None) or [])


def test_the_commands_are_found_where_they_are():
    text = "Type `python -m lib runs list`.\n```\n.venv/bin/python -m lib run a \\\n    --name b  # c\n```\n"
    assert [command.words for command in commands("x", text)] == [["runs", "list"], ["run", "a", "--name", "b"]]
    assert list(commands("x", "python -m lib traces import FILE… [--mapping M]")) == []
    assert len(COMMANDS) > 60


def test_every_target_of_make_is_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for text in PAGES.values() for name in re.findall(r"(?:`|^)make ([a-z][\w-]*)`?", text, re.MULTILINE)}
    assert {"quickstart", "test", "install", "lab"} <= named
    assert named <= targets


def test_the_path_of_a_checkout_may_have_a_blank():
    assert set(re.findall(r"(.)\$\(CURDIR\)", (ROOT / "Makefile").read_text())) == {'"'}


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.read_text("utf-8")), f"{page}: {target}: no such heading"


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w.]+)", PAGES["README.md"]))
    assert {name for name in PAGES if name.startswith("docs/")} <= linked


def test_the_picture_is_small_and_says_what_it_shows():
    [(text, path)] = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", PAGES["README.md"])
    content = (ROOT / path).read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 200_000
    assert "accuracy" in text and len(text) > 100


def test_version_and_licence_are_the_same_everywhere():
    project = (ROOT / "pyproject.toml").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1]
    assert citation["version"] == version and f"\n## {version}" in PAGES["CHANGELOG.md"]
    assert citation["license"] == re.search(r'^license = "(.*)"$', project, re.MULTILINE)[1] == "Apache-2.0"
    assert "Apache License\n" in (ROOT / "LICENSE").read_text()


# ---- in a checkout of their own, as a reader would ----------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, as cloned."""
    folder = tmp_path / "retrace"
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("lib", "notebooks", "configs", "evalsets", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", "requirements.txt", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    monkeypatch.delenv("RETRACE_HOME")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    typed(folder, "git init -q && git add -A && git -c user.name=n -c user.email=e@example.org commit -qm all")
    return folder


def typed(folder: Path, text: str) -> str:
    """What a shell says to it."""
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


# The tutorial's own run takes minutes; with so few steps, questions and tokens, seconds.
SHORTENED = {
    "num_steps: 300": "num_steps: 4",
    "warmup_steps: 30": "warmup_steps: 1",
    "batch_size: 100\n": "batch_size: 100\n  limit: 8\n",
    "max_new_tokens: 80": "max_new_tokens: 4",
}


FIRST_RUN = "python -m lib run configs/weekdays.yaml\n"


@pytest.mark.slow
@pytest.mark.usefixtures("processes_compile_once")
@pytest.mark.parametrize("until", [FIRST_RUN, pytest.param("", marks=pytest.mark.tutorial)])
def test_the_tutorial_is_followed_block_by_block(until: str, checkout: Path):
    """Up to its first run, as each takes a minute; `make test-tutorial` follows it to its end."""
    text = PAGES["docs/tutorial.md"]
    for whole, part in SHORTENED.items():
        assert text.count(whole) == 1, whole
        text = text.replace(whole, part)
    install, *rest = blocks(text, "sh")
    rest = rest[: rest.index(until)] if until else rest
    assert install == "make install\nsource .venv/bin/activate\n"
    said = "".join(typed(checkout, block) for block in rest)
    for shown in blocks(PAGES["docs/tutorial.md"], "")[:2]:  # what the first commands print
        assert shown in said
    assert blocks(text, "json") == [(checkout / "evalsets" / "weekdays_v1.jsonl").read_text().splitlines(True)[0]]
    assert len((checkout / "weekdays.jsonl").read_text().splitlines()) == 500
    if until:
        return
    assert re.search(r"^Report: runs/\w+_weekdays/report.html$", said, re.MULTILINE)
    assert (checkout / "worth.html").stat().st_size > 10_000
    assert re.search(r"^Equal: all \d+ results, bit for bit\.$", said, re.MULTILINE)


def test_the_task_of_the_page_is_written_checked_and_asked(checkout: Path):
    text = PAGES["docs/own_task.md"]
    for block in all_blocks(text):
        if block.kind == "diff":
            edit(checkout / block.file, block.text.splitlines())
        elif block.file:
            (checkout / block.file).write_text(block.text)
    generate, evaluate, run = blocks(text, "sh")
    assert typed(checkout, generate) == blocks(text, "")[0]
    typed(checkout, evaluate)
    assert run == "python -m lib run configs/weekdays_checked.yaml\n"
    typed(checkout, f"python - <<'END'\n{JUDGED}\nEND")


def edit(path: Path, lines: list[str]) -> None:
    """Each line that is marked - becomes the one after it, which is marked +, unless a reader has done it already."""
    content = path.read_text("utf-8")
    for old, new in zip(lines[::2], lines[1::2], strict=True):
        if f"{new[1:]}\n" in content:
            continue
        assert (old[0], new[0], content.count(f"{old[1:]}\n")) == ("-", "+", 1), old
        content = content.replace(old[1:], new[1:])
    path.write_text(content, "utf-8")


JUDGED = """
from lib.config import load_config
from lib.errors import RequestError
from lib.experiments.stages import find_eval_set, make_dataset
from lib.tasks import weekdays
config = load_config("configs/weekdays_checked.yaml")
asked = {item.prompt for item in find_eval_set(config.evaluation.eval_set).items}
assert len(asked) == 200 and asked.isdisjoint(trace.prompt for trace in make_dataset(config).traces)
true = ["23 = 3 * 7 + 2.", "Count: 0 Tuesday, 1 Wednesday, 2 Thursday."]
state = {"start": "Tuesday", "days": "23"}
assert weekdays.canonical({"days": "023", "start": "Tuesday", "note": "late"}) == weekdays.canonical(state) == state
assert weekdays.canonical({"days": "many"}) == {"days": "many"}
assert [check.error for check in weekdays.check_steps(state, true)] == ["", ""]
assert [check.error for check in weekdays.check_steps(state, [true[0], true[1].replace("Thu", "Fri")])] == ["", "false"]
assert [check.error for check in weekdays.check_steps(state, ["23 is odd."])] == ["unreadable", "missing"]
"""
