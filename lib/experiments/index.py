"""`index.html` of a home: every run in one table, to be sorted, filtered and compared in any browser, from its file.

    write_index(home() / "index.html")

The table is plain and complete; a script of ours, `templates/index.js`, makes it move. It is the only one that the
page's policy lets run, by its hash, it asks nobody for anything, and it sets text as text alone. What it compares
stands in the rows: what each run was made from, where runs differ in it, and how each item came out, a letter each.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from filelock import FileLock
from markupsafe import Markup

from lib.errors import RetraceError
from lib.experiments.compare_runs import made_from
from lib.experiments.report import templates
from lib.experiments.run import list_runs
from lib.experiments.stages import OUTPUTS, command
from lib.experiments.sweep_report import PAGE
from lib.files import atomic_write, home

SCRIPT = Path(__file__).parent / "templates" / "index.js"
QUESTION = 120  # characters of a question that are shown


class Script(NamedTuple):
    """A script for a page, and its hash for the page's policy."""

    text: Markup
    sha256: str


class Page(NamedTuple):
    """A page of this home that is no run's, and where it lies there."""

    name: str
    place: str


class Answered(NamedTuple):
    """How a tuned model did, item by item: c correct, w wrong, u unscored, t truncated; to the eval set `asked`."""

    asked: str
    marks: str
    items: list[tuple[str, str]]


def write_index(path: Path) -> None:
    """The page of all runs of this home, newest first, with links to the pages of its sweeps and certificates."""
    sweeps = sorted(home().glob(f"sweeps/*/{PAGE}"))
    certificates = sorted(home().glob("certificates/*.html"))
    others = {
        "Sweeps": [Page(page.parent.name, page.relative_to(home()).as_posix()) for page in sweeps],
        "Certificates": [Page(page.stem, page.relative_to(home()).as_posix()) for page in certificates],
    }
    with FileLock(path.with_name(".lock")):  # or of two runs that end at once one could be left out
        write_table(path, [row | _compared(home() / row["run"]) for row in list_runs()], others)


def write_table(path: Path, runs: list[dict[str, Any]], others: dict[str, list[Page]]) -> None:
    """The same of given rows: those of `list_runs`, each with its `facts` and what was `answered`."""
    known = [row["facts"] for row in runs if row["facts"]]
    values: dict[str, set[str]] = {key: set() for facts in known for key in facts}
    for key, found in values.items():
        found.update(str(facts.get(key)) for facts in known)
    apart = {key for key, found in values.items() if len(found) > 1}
    rows = [row | {"facts": json.dumps({key: str(value) for key, value in row["facts"].items() if key in apart})}
            for row in runs]  # fmt: skip
    answered = [row["answered"] for row in runs if row["answered"]]
    answered.sort(key=lambda one: len(one.items))  # of a set that was asked in part, too, the longest list has all
    items = {one.asked: one.items for one in answered}
    page = templates().get_template("index.html.j2")
    words = command("runs", "compare")
    atomic_write(path, page.render(runs=rows, others=others, items=json.dumps(items), compare=words, script=script()))


def script() -> Script:
    """The script of the page."""
    text = SCRIPT.read_text("utf-8")
    return Script(Markup(text), base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())


def _compared(folder: Path) -> dict[str, Any]:
    """What is compared of a run; nothing of one that has not come to its end, or whose files cannot be read."""
    try:
        facts = made_from(folder)
    except (RetraceError, OSError):
        return {"facts": {}, "answered": None}
    return {"facts": facts, "answered": _answered(folder / OUTPUTS["after"])}


class _Meta(msgspec.Struct):
    eval_id: str
    eval_set_sha256: str
    sample: int


class _Line(msgspec.Struct):
    prompt: str
    verdict: str
    meta: _Meta


def _answered(file: Path) -> Answered | None:
    """None where an item was asked several times: then the answer of most counts, which `runs compare` works out."""
    try:
        lines = list(_lines(file))
    except (OSError, ValueError):
        return None
    if not lines or any(line.meta.sample for line in lines):
        return None
    items = [(line.meta.eval_id, line.prompt[:QUESTION]) for line in lines]
    return Answered(lines[0].meta.eval_set_sha256, "".join(line.verdict[:1] for line in lines), items)


def _lines(file: Path) -> Iterator[_Line]:
    decoder = msgspec.json.Decoder(_Line)
    for line in file.read_bytes().split(b"\n"):
        if line:
            yield decoder.decode(line)
