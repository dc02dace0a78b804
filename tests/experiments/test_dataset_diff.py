"""What is told of two datasets: on one screen, as JSON, as Markdown and as a page, all the same and all inert."""

import json
import re
from pathlib import Path

import pytest
from hostile import PAYLOADS
from inert import static_problems
from markdown_it import MarkdownIt
from msgspec.structs import replace

from lib.__main__ import main
from lib.config import DatasetConfig
from lib.data.dataset import Dataset, build_dataset
from lib.data.diff import diff_datasets
from lib.data.store import Store
from lib.experiments.dataset_diff import markdown, sentence, summary, write_dataset_diff
from lib.tasks import high_card_duel
from lib.trace import Trace, make_trace


@pytest.fixture
def duels(home: Path) -> tuple[Dataset, Dataset]:
    """The same twenty episodes but for the two newest; of one other the answer differs, of another the meta."""
    store = Store(home / "store")
    traces = list(high_card_duel.generate(22, seed=0, created_at="2025-01-01T00:00:00Z"))
    store.add([replace(trace, id=f"t{n:02}") for n, trace in enumerate(traces[:20])])
    before = build_dataset(store, DatasetConfig("duel", "v1"), {}, home / "datasets")
    others = Store(home / "others")
    traces[5] = replace(traces[5], final_answer="who knows")
    traces[6] = replace(traces[6], meta=traces[6].meta | {"seed": 99})
    others.add([replace(trace, id=f"u{n:02}") for n, trace in enumerate(traces[2:], 2)])
    after = build_dataset(others, DatasetConfig("duel", "v2", limit=50), {}, home / "datasets")
    return before, after


def rows(text: str) -> list[str]:
    return [re.sub(r"\\(.)", r"\1", line) for line in text.splitlines() if line.startswith("| ")]


def test_the_command_tells_on_one_screen_what_became_of_the_rows(duels, capsys: pytest.CaptureFixture):
    assert main(["dataset", "diff", "duel-v1", "duel-v2"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "duel-v1 → duel-v2: 16 traces are the same, 2 changed, 2 removed, 2 added."
    assert told[1] == "changed: 1 in final_answer, 1 in meta" and "  limit: none → 50" in told
    assert any(line.startswith("such as: High Card Duel: ") for line in told)
    assert told[-1].startswith("  final_answer: ") and told[-1].endswith("→ who knows")


def test_json_holds_the_same_for_a_script(duels, capsys: pytest.CaptureFixture):
    assert main(["dataset", "diff", "duel-v1", "duel-v2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: told[name] for name in ("same", "changed", "removed", "added", "request")} == {
        "same": 16, "changed": 2, "removed": 2, "added": 2, "request": [["limit", None, 50]],
    }  # fmt: skip
    assert told["changed_rows"][0]["differences"][0]["after"] == "who knows" and len(told["added_rows"]) == 2
    assert {"key": "seed", "value": "99", "before": 0, "after": 1, "changed": 1, "removed": 0, "added": 0} in told[
        "values"
    ]


def test_page_and_markdown_hold_every_figure(duels, tmp_path: Path):
    diff = diff_datasets(*duels)
    for ending in ("html", "md"):
        assert main(["dataset", "diff", "duel-v1", "duel-v2", "--output", str(tmp_path / f"diff.{ending}")]) == 0
        text = (tmp_path / f"diff.{ending}").read_text("utf-8")
        assert sentence(diff) in text.replace("\\", "") and "who knows" in text
        for row in (*diff.added_rows, *diff.removed_rows):
            assert row.id in text
    told = rows(markdown(diff))
    assert (
        "| limit | none | 50 |" in told
        and "| final_answer | 1 |" in told
        and "| seed | 99 | 0 | 1 | 1 | 0 | 0 |" in told
    )
    page = (tmp_path / "diff.html").read_text("utf-8")
    lengths = duels[0].manifest["lengths"]
    assert page.count("<svg") == 2 and f"duel-v1: {lengths['min']} to {lengths['max']}, mean" in page
    assert page.count('role="img"') == 2 and static_problems(tmp_path / "diff.html") == []


def test_equal_datasets_are_said_to_be_equal(duels):
    before, _ = duels
    assert list(summary(diff_datasets(before, before))) == ["duel-v1 → duel-v1: The same 20 traces in the same order."]
    turned = before._replace(traces=list(before.traces)[::-1], manifest=before.manifest | {"content_sha256": "other"})
    assert sentence(diff_datasets(before, turned)) == "The same 20 traces in another order."


def test_another_ending_and_a_dataset_that_is_not_there_are_refused(duels, tmp_path, capsys: pytest.CaptureFixture):
    assert main(["dataset", "diff", "duel-v1", "duel-v2", "--output", str(tmp_path / "diff.pdf")]) == 2
    assert "diff.pdf: expected a name that ends in .html or .md" in capsys.readouterr().err
    assert main(["dataset", "diff", "duel-v1", "duel-v3"]) == 2
    assert "dataset duel-v3: not built" in capsys.readouterr().err and not list(tmp_path.glob("*.pdf"))


# ---- hostile ------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(home: Path) -> tuple[Dataset, Dataset]:
    """Each payload is all of a trace: some changed, some were removed, some added; and everything is named so."""
    texts = list(PAYLOADS.values())
    every = "\n".join(texts)

    def one(text: str, answer: str) -> Trace:
        return make_trace(text, [("step", text), ("step", answer)], answer, {text: text, "kind": text}, id=text[:200])

    traces = [one(text, text) for text in texts]
    before, after = traces[: 2 * len(texts) // 3], [replace(trace, final_answer="new") for trace in traces[5:]]
    found = []
    for name, chosen in (("a", before), ("b", after)):
        manifest = {
            "dataset_key": every + name, "trace_count": len(chosen), "split": {every: 1}, "stats": {every: 0.5},
            "provenance": {"sources": {every: 3}}, "dropped": {every: 4}, "content_sha256": name,
            "filters": {every: name}, "lengths": {"min": 1, "mean": 1.0, "p95": 1, "max": 1, "trained_tokens": 1,
            "longest": [], "counts": {"1": 1}}, "curation": {every: name},
        }  # fmt: skip
        found.append(Dataset(home, manifest, chosen))
    return tuple(found)


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")
def test_hostile_text_is_inert_on_the_page_and_in_the_markdown(hostile, tmp_path: Path):
    diff = diff_datasets(*hostile)
    assert diff.changed and diff.removed and diff.added and diff.changed_rows
    write_dataset_diff(tmp_path / "diff.html", diff)
    assert static_problems(tmp_path / "diff.html") == []
    text = markdown(diff)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    within = {child.type for token in tokens for child in token.children or []}
    assert within <= {"text", "softbreak", "strong_open", "strong_close"}
    assert not {token.type for token in tokens} & {"html_block", "code_block", "blockquote_open", "bullet_list_open"}
    headings = [
        after.content for mark, after in zip(tokens, tokens[1:], strict=False) if mark.tag == "h2" and mark.nesting == 1
    ]
    assert headings[:3] == ["What was asked for differently", "Statistics", "In which fields the rows changed"]
    assert len(headings) == 7
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_what_is_told_of_hostile_datasets_fits_one_screen(hostile):
    diff = diff_datasets(*hostile)
    names = diff._replace(before="a-v1", after="b-v1")
    lines = list(summary(names))
    assert 12 < len(lines) <= 24 and all(len(line) <= 110 and "\n" not in line for line in lines)
