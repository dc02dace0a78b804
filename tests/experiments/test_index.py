"""The table of runs: whole without a script, and with ours, in a browser, sorted, filtered and compared."""

import json
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from inert import browser, static_problems

from lib.experiments.index import Answered, script, write_index, write_table

ITEMS = [("item-1", "Is it <b>one</b>?"), ("item-2", "Is it two?"), ("item-3", "Is it three?")]


def row(name: str, after: float | None, wall_s: float, **facts: str) -> dict:
    """A run as the table is given it; one without an accuracy has failed."""
    done = after is not None
    sides = {"before": 0.0, "before_interval": [0.0, 0.1], "after": after, "after_interval": [0.2, 0.9]} if done else {}
    answered = Answered("sha", "cwt" if after == 0.25 else "ccw", ITEMS) if done else None
    nothing = dict.fromkeys(("before", "before_interval", "after", "after_interval"))
    return nothing | sides | {
        "run": name, "status": "done" if done else "failed", "dataset": "toy-v1", "model": "tiny", "n": 3,
        "verdict": "Improved: much." if done else "", "error": "" if done else "03_train: a reason", "wall_s": wall_s,
        "created_at": "2026-11-22T10:15:00Z", "report": done, "facts": facts, "answered": answered,
    }  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Path:
    rows = [
        row("b", 0.25, 100.0, seed="1", recipe="x"),
        row("a", 0.75, 20.0, seed="2", recipe="x"),
        row("c", None, 3.0),
    ]
    write_table(tmp_path / "index.html", rows, {})
    return tmp_path / "index.html"


def test_the_table_is_whole_without_its_script(page):
    soup = BeautifulSoup(page.read_text(), "html.parser")
    [head, *rows] = [
        [cell.get_text(" ", strip=True) for cell in line.find_all(["th", "td"])] for line in soup.select("tr")
    ]
    assert head == ["run", "status", "dataset", "model", "accuracy", "verdict", "wall time"]
    assert rows[0] == ["b 2026-11-22 10:15", "done", "toy-v1", "tiny", "0.0 % → 25.0 % 20.0 to 90.0 %, 3 items",
                       "Improved: much.", "1 min 40 s"]  # fmt: skip
    assert rows[2] == ["c 2026-11-22 10:15", "failed", "toy-v1", "tiny", "", "03_train: a reason", "3 s"]
    assert [link["href"] for link in soup.select("th a")] == ["./b/report.html", "./a/report.html"]
    assert soup.select_one("#tools").has_attr("hidden") and soup.select_one("#compared").has_attr("hidden")


def test_the_policy_lets_this_script_run_and_no_other(page):
    soup = BeautifulSoup(page.read_text(), "html.parser")
    assert [tag.get_text() for tag in soup.find_all("script")] == [script().text]
    assert f"script-src 'sha256-{script().sha256}'" in soup.select_one("meta[http-equiv]")["content"]
    assert static_problems(page) == []
    page.write_text(page.read_text().replace("'use strict'", "'use strict';"))
    assert static_problems(page)


def test_only_what_differs_between_runs_is_kept_of_what_they_were_made_from(page):
    rows = BeautifulSoup(page.read_text(), "html.parser").select("tbody tr")
    assert [json.loads(one["data-facts"]) for one in rows] == [{"seed": "1"}, {"seed": "2"}, {}]


def test_a_home_without_a_run_says_how_to_start_one(home):
    home.mkdir()
    write_index(home / "index.html")
    soup = BeautifulSoup((home / "index.html").read_text(), "html.parser")
    assert "0 runs" in soup.get_text() and "python -m lib run configs/quickstart.yaml" in soup.get_text()


def test_the_pages_of_sweeps_and_certificates_are_a_click_away(home):
    made = [home / "sweeps" / "lr-1f0c92ab" / "sweep.html", home / "certificates" / "20261122_a_b.html"]
    for page in made:
        page.parent.mkdir(parents=True)
        page.touch()
    write_index(home / "index.html")
    soup = BeautifulSoup((home / "index.html").read_text(), "html.parser")
    links = {link.get_text(): home / link["href"] for link in soup.select("li a")}
    assert links == dict(zip(["lr-1f0c92ab", "20261122_a_b"], made, strict=True))


def test_runs_that_were_asked_the_head_of_a_set_are_compared_over_that_head(tmp_path):
    rows = [row("b", 0.25, 1.0), row("a", 0.75, 1.0), row("all", 0.75, 1.0), row("one", 0.75, 1.0)]
    rows[2]["answered"] = Answered("sha", "ccwcc", [*ITEMS, ("item-4", "Is it four?"), ("item-5", "Is it five?")])
    rows[3]["answered"] = Answered("sha", "c", ITEMS[:1])
    write_table(tmp_path / "index.html", rows, {})
    tick = "document.querySelector('[aria-label=\"compare {}\"]').click()"
    with browser() as opened:
        asked = [tick.format("a"), tick.format("b"), "new Promise(setTimeout)", "compared.innerText"]
        [text] = [said for said in opened.ask(tmp_path / "index.html", asked) if said is not None]
    assert "Of 3 items 1 are correct in all of them, 1 in none; 1 only in a, 0 only in b." in text


def test_runs_are_sorted_filtered_and_compared_in_a_browser(page):
    names = "[...document.querySelectorAll('tbody tr')].filter(row => !row.hidden).map(row => row.dataset.run).join('')"
    press = "[...document.querySelectorAll('thead button')].find(one => one.textContent === '{}').click()"
    find = "document.getElementById('filter').value = '{}'; void filter()"
    tick = "document.querySelector('[aria-label=\"compare {}\"]').click()"
    with browser() as opened:
        asked = [names, press.format("run"), names, press.format("run"), names, press.format("accuracy"), names,
                 press.format("wall time"), names, find.format("DONE toy"), names, "count.textContent", find.format(""),
                 tick.format("b"), "compared.hidden", tick.format("a"), "new Promise(setTimeout)", "compared.hidden",
                 "compared.innerText", tick.format("a"), "new Promise(setTimeout)", "compared.hidden"]  # fmt: skip
        said = [answer for answer in opened.ask(page, asked) if answer is not None]
    assert said[:7] == ["bac", "abc", "cba", "bac", "cab", "ab", "2 of 3 shown"]
    alone, together, text, again = said[7:]
    assert (alone, together, again) == (True, False, True)
    lines = [line.strip() for line in text.replace("\t", "\n").split("\n") if line.strip()]
    assert lines[:8] == ["2 runs compared", "What is different", "entry", "a", "b", "seed", "2", "1"]
    assert lines.index("What is different") < lines.index("Accuracy on one axis") < lines.index("item-2")
    assert "item-1" not in lines and "item-3" not in lines  # correct in both, and in neither
    assert lines[lines.index("item-2") :][:4] == ["item-2", "Is it two?", "correct", "wrong"]
    assert "Of 3 items 1 are correct in all of them, 1 in none; 1 only in a, 0 only in b." in text
    assert "runs compare a b --output compared_b.html" in text
