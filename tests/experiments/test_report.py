"""The delta report as Markdown and as a page: it says what was found, and hostile text in it stays text."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import mistune
import pytest
from bs4 import BeautifulSoup
from hostile import METRICS, facts
from markdown_it import MarkdownIt

from lib.config import Config, DatasetConfig, EvaluationConfig, ModelConfig, TracesConfig
from lib.data.dataset import Dataset
from lib.data.renderer import Example, encode_example, render_conversation, render_example
from lib.data.selection import is_held_out
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.evaluation.compare import Comparison
from lib.evaluation.scoring import reasoning_steps
from lib.experiments import report, stages
from lib.experiments.evidence import needed
from lib.experiments.figures import accuracy_figure, bars, loss_figure, reliability_figure, svg
from lib.experiments.markdown import printable
from lib.experiments.report import (
    RunFacts,
    drawings,
    markdown,
    show_table,
    show_tokens,
    token_spans,
    write_markdown,
    write_page,
)
from lib.experiments.run import Run

ACTIVE = {"link", "image", "html_block", "html_inline", "block_html", "inline_html", "block_math", "inline_math"}
ACTIVE |= {"footnote_ref", "footnotes", "footnote_item", "strong", "emphasis", "strikethrough", "codespan", "list"}
ALLOWED = {"strong"}  # the verdict
PLUGINS = ["table", "url", "footnotes", "strikethrough", "math", "task_lists", "def_list", "abbr", "superscript"]

# Some payloads have letters that no font has, or that are too high for a figure.
pytestmark = pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")


@pytest.fixture(scope="module")
def tokenizer(dataset: Dataset) -> Tokenizer:
    return load_tokenizer(dataset.tokenizer_file)


@pytest.fixture(scope="module")
def hostile(comparison_of: Callable, payloads: list[str]) -> Comparison:
    return comparison_of(payloads)


@pytest.fixture(scope="module")
def harmless(comparison_of: Callable, payloads: list[str]) -> Comparison:
    return comparison_of([f"harmless {number:02}" for number in range(len(payloads))])


def page(comparison: Comparison, run: RunFacts, folder: Path) -> BeautifulSoup:
    """The page, with every item in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SHOWN", 1000)
        write_page(folder / "report.html", comparison, run, drawings(comparison, METRICS))
    return BeautifulSoup((folder / "report.html").read_text(), "html.parser")


@pytest.fixture(scope="module")
def hostile_page(hostile, payloads, dataset, tmp_path_factory) -> BeautifulSoup:
    return page(hostile, facts(dataset, "\n".join(payloads)), tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def harmless_page(harmless, examples, dataset, tmp_path_factory) -> BeautifulSoup:
    run = facts(dataset, "where it is from")._replace(example=examples[0])
    return page(harmless, run, tmp_path_factory.mktemp("harmless"))


def kinds(tokens: list[dict]) -> Iterator[str]:
    """Every kind of node in mistune's tree."""
    for token in tokens:
        yield token["type"]
        yield from kinds(token.get("children", []))


def parsed(text: str) -> list:
    """markdown-it's tokens, block by block, the inline ones in their `children`."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def plain(token) -> str:
    return "".join(" " if child.type == "softbreak" else child.content for child in token.children)


# ---- Markdown ---------------------------------------------------------------------------------------------


def test_the_parsers_would_see_what_must_not_come_out():
    text = "<b>x</b> [x](y) ![x](y) https://evil.example/ $x$ `x`"
    seen = set(kinds(mistune.create_markdown(renderer=None, plugins=PLUGINS)(text)))
    assert seen >= {"inline_html", "link", "image", "inline_math", "codespan"}
    assert {child.type for child in parsed(text)[1].children} >= {"html_inline", "link_open", "image", "code_inline"}


def test_f41_hostile_text_in_markdown_becomes_no_markup(payload, comparison_of):
    text = markdown(comparison_of([payload]))
    seen = set(kinds(mistune.create_markdown(renderer=None, plugins=PLUGINS)(text)))
    assert seen & ACTIVE <= ALLOWED and {"heading", "block_code", "table"} <= seen
    inline = {child.type for token in parsed(text) for child in token.children or []}
    assert inline <= {"text", "softbreak", "strong_open", "strong_close"}


def test_f41_hostile_text_in_markdown_opens_no_heading_and_closes_no_fence(payload, comparison_of):
    tokens = parsed(markdown(comparison_of([payload])))
    headings = [plain(body) for mark, body in zip(tokens, tokens[1:], strict=False) if mark.type == "heading_open"]
    named = [printable(" ".join(f"{payload}{number}".split())) for number in (1, 0, 0)]
    assert [re.sub(r" \(\d+\)$", "", heading) for heading in headings] == [
        "Delta report", "Counts", "By category", "Controls: each model against itself", "Leaks",
        "Reasoning steps that were wrong after training",
        "Broken: correct before, not after", named[0], "Fixed: correct after, not before", named[1],
        "Wrong before and after", "Right answer, wrong reasoning", named[2],
    ]  # fmt: skip
    fences = [token for token in tokens if token.type == "fence"]
    assert len(fences) == 7 and {token.info for token in fences} == {"text"}
    shown = printable(payload)
    assert {token.content for token in fences} == {f"{shown}\n", f"Reasoning:\n1. {shown}\n"}
    assert not {token.type for token in tokens} & {"code_block", "blockquote_open", "bullet_list_open", "hr"}


def test_f41_hostile_text_in_a_table_stays_in_its_cell(payload, comparison_of):
    rows = []
    tokens = parsed(markdown(comparison_of([payload])))
    for mark, body in zip(tokens, tokens[1:], strict=False):
        if mark.type == "tr_open":
            rows.append([])
        elif mark.type == "td_open":
            rows[-1].append(plain(body))
    by_category = [row for row in rows if len(row) == 7]
    assert [row[:2] for row in by_category] == [[printable(" ".join(payload.split())), "2"]]


def test_the_markdown_says_the_verdict_the_counts_and_what_changed(comparison_of, tmp_path):
    found = comparison_of(["plain words", "more words"])
    write_markdown(tmp_path / "delta_report.md", found)
    text = (tmp_path / "delta_report.md").read_text()
    assert f"**{found.headline}**" in text
    assert "| items | 4 | 4 |" in text and "| correct | 2 | 2 |" in text and "| wrong | 2 | 2 |" in text
    assert "2 fixed, 2 broken; p = 1." in text and "4 of 4 | 0 | 0 | nothing" in text
    assert "## Broken: correct before, not after (2)" in text and "## Fixed: correct after, not before (2)" in text
    assert "First wrong: step 1 (legal\\_move): does not read as a step of kind legal\\_move" in text
    assert "p < 0.05" in text and "by 1.0 points or more" in text


@pytest.mark.parametrize("blank, said", [("", "(nothing)"), (" \n ", "(3 blanks and line breaks, no text)")])
def test_a_completion_without_text_is_said_to_be_one(blank, said, comparison_of):
    fences = [token.content for token in parsed(markdown(comparison_of([blank]))) if token.type == "fence"]
    assert said + "\n" in fences


def test_a_rule_is_said_to_be_set_before_the_run_only_where_a_run_set_it(comparison_of):
    found = comparison_of(["x"])
    assert "Rule, set before the run: improved" in markdown(found)
    by_hand = markdown(found._replace(controls=None))
    assert "Rule, given to this report: improved" in by_hand and "before the run" not in by_hand


def test_items_that_could_show_nothing_are_not_said_to_show_something(comparison_of):
    text = markdown(comparison_of(["x"]))
    assert "With 2 items, no change is sure to be found with 80 % power; to tell 1.0 points" in text
    assert "of 100.0 points" not in text


@pytest.mark.parametrize("side", ["before_summary", "after_summary"])
def test_where_one_model_wrote_no_step_to_check_its_figure_is_not_made_up(side, comparison_of, tmp_path):
    found = comparison_of(["x"])
    unchecked = getattr(found, side)._replace(checkable=0, checked=0, sound=0, sound_interval=None, errors={})
    found = found._replace(**{side: unchecked})
    assert "every step true" not in [name for name, *_ in report.metrics(found)]
    report.write_comparison(tmp_path / "page.html", found, ("one", "other"), [], [])
    rows = BeautifulSoup((tmp_path / "page.html").read_text(), "html.parser").find_all("tr")
    cells = {row.th.get_text(): [cell.get_text() for cell in row.find_all("td")] for row in rows if row.th}
    place = ("before_summary", "after_summary").index(side)
    for name in ("every reasoning step true", "no reasoning written", "right answer, wrong reasoning"):
        assert cells[name].pop(place) == "not checkable" and cells[name][0][0].isdigit()


def test_what_is_not_shown_is_counted(comparison_of):
    text = markdown(comparison_of([f"item {number}" for number in range(report.SHOWN + 3)]))
    assert text.count("And 3 more, whole in the evaluation outputs beside this report.") == 3
    assert text.count("### ") == 3 * report.SHOWN


# ---- the page ---------------------------------------------------------------------------------------------


def test_f41_f43_the_page_has_no_script_no_handler_and_no_address(hostile_page):
    active = ["script", "iframe", "object", "embed", "link", "base", "form", "img", "image"]
    assert not hostile_page.find_all(active)
    sections = {f"#{section['id']}" for section in hostile_page.select("section[id]")}
    for element in hostile_page.find_all(True):
        if element.name == "a":
            assert element.attrs.keys() == {"href"} and element["href"] in sections | {"01_traces.html"}
            continue
        for name, value in element.attrs.items():
            assert not name.startswith("on") and name not in ("srcdoc", "src", "href", "action", "formaction")
            names = name.startswith("xmlns") or name == "rdf:resource"  # identifiers, which nothing loads
            assert names or not re.search(r"//|javascript:", "".join(value)), (element.name, name, value)
    for style in hostile_page.find_all("style"):
        assert not re.search(r"@import|url\((?!#)", style.text)


def test_f41_hostile_text_adds_no_element_to_the_page(hostile_page, harmless_page):
    def elements(soup: BeautifulSoup) -> list[str]:
        varying = {id(part) for part in soup.select("svg *, .tokens *")}
        return [element.name for element in soup.find_all(True) if id(element) not in varying]

    assert elements(hostile_page) == elements(harmless_page) and len(elements(hostile_page)) > 500


def test_f41_hostile_text_is_shown_as_it_is(hostile_page, payloads, completions):
    # HTML knows one kind of line end
    shown = {element.get_text() for element in hostile_page.select(".steps .said")}
    assert shown == {text.replace("\r", "\n") for completion in completions for text in reasoning_steps(completion)}
    assert len(shown) == len(payloads)
    summaries = [element.get_text() for element in hostile_page.find_all("summary")]
    assert all(any(text.replace("\r", "\n") in summary for summary in summaries) for text in payloads)
    assert hostile_page.title.get_text().split() == f"{' '.join(payloads)} · Retrace".split()
    drawn = hostile_page.find_all("svg")[0].get_text()
    assert "<script>alert(1)</script> (n = 2)" in drawn and "$\\bad$" in drawn


def test_the_page_forbids_what_it_does_not_need(harmless_page):
    policy = harmless_page.head.find_all(True)[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'; base-uri 'none'; form-action 'none'; ")


def test_the_page_says_the_verdict_the_tokens_and_where_it_comes_from(harmless_page, harmless, examples, tokenizer):
    assert harmless_page.select_one(".verdict p").get_text() == harmless.headline
    spans, shown = token_spans(examples[0], tokenizer), harmless_page.select(".tokens span")
    assert [bool({"trained"} & set(span.get("class", []))) for span in shown] == [span.trained for span in spans]
    trained = sum(span.trained for span in spans)
    assert f"The {trained} highlighted of {len(spans)} are the ones the loss covers" in harmless_page.get_text()
    assert harmless_page.get_text().count("where it is from") >= 8
    figures = harmless_page.find_all(role="img")
    assert len(figures) == 3 and all(figure.svg and figure.get("aria-label") for figure in figures)


DUEL = Config("duel", DatasetConfig("duel", "v1"), traces=TracesConfig("high_card_duel", 9))
RECORD = {
    "code": {"git_sha": "c" * 40, "git_dirty": False}, "fingerprint": {"device_kind": "cpu"}, "fingerprint_changed": [],
    "dataset": {"dataset_key": "duel-v1", "provenance": {"sources": {"builtin": {}}}},
}  # fmt: skip


@pytest.mark.parametrize(
    "record, config, what",
    [
        ({}, {}, []),
        ({"code": {"git_sha": "c" * 40, "git_dirty": True}}, {}, ["not committed"]),
        ({"code": {"git_sha": None}}, {}, ["no commit was recorded"]),
        ({}, {"traces": TracesConfig()}, ["our own engines did not play"]),
        ({"dataset": {"provenance": {"sources": {"builtin": {}, "file": {}}}}}, {}, ["our own engines did not play"]),
        ({}, {"model": ModelConfig("google/gemma-3-270m-it")}, ["weights of google/gemma-3-270m-it"]),
        ({}, {"evaluation": EvaluationConfig("my/own.jsonl")}, ["eval set my/own.jsonl"]),
        ({}, {"evaluation": EvaluationConfig("evalsets/arithmetic_v1.jsonl")}, []),
    ],
)
def test_a_page_says_what_doing_its_run_again_needs_beside_it(record, config, what):
    found = needed(RECORD | record, replace(DUEL, **config))
    assert len(found) == len(what) and all(part in one for part, one in zip(what, found, strict=True))


@pytest.mark.parametrize(
    "changed, said",
    [
        ({}, "comes out equal, bit for bit"),
        ({"fingerprint": {"device_kind": "NVIDIA H200"}}, "on a CPU alone, and this was NVIDIA H200"),
        ({"fingerprint_changed": ["jax", "code"]}, "jax, code had changed: equality is not promised"),
    ],
)
def test_a_page_promises_the_same_bits_only_where_they_are_promised(changed, said, comparison_of, dataset, tmp_path):
    run = facts(dataset, "x")
    shown = page(comparison_of(["x"]), run._replace(config=DUEL, record=run.record | RECORD | changed), tmp_path)
    origin = shown.select_one("#origin").get_text()
    assert said in origin and "with this page alone" in origin and ("bit for bit" in origin) == (not changed)


def test_the_example_on_the_page_is_one_that_was_trained_on(monkeypatch):
    both = {is_held_out(f"question {n}"): Example(str(n), f"Be brief.\n\nquestion {n}", "Answer: 1") for n in range(99)}
    monkeypatch.setattr(stages, "training_examples", lambda run: [both[True], both[False]])
    run = Run(Path("run"), replace(DUEL, system_instruction="Be brief."))
    assert stages.trained_example(run) == both[False]


def test_a_packed_row_is_not_called_an_example(comparison_of, dataset, tmp_path):
    run = facts(dataset, "x")
    padded = page(comparison_of(["x"]), run, tmp_path).select_one("#learning").get_text()
    packed = replace(run.config, training=replace(run.config.training, batching="packed"))
    packed = page(comparison_of(["x"]), run._replace(config=packed), tmp_path).select_one("#learning").get_text()
    assert "2 steps of 2 examples," in padded and "2 steps of 2 rows," in packed


def test_the_same_facts_give_the_same_page(comparison_of, dataset, tmp_path):
    pages = [page(comparison_of(["same"]), facts(dataset, "same"), tmp_path) for _ in range(2)]
    assert pages[0].decode() == pages[1].decode()


# ---- figures and tokens -----------------------------------------------------------------------------------


def test_the_same_figure_is_the_same_text_twice(harmless):
    drawn = (accuracy_figure, reliability_figure)
    for draw in (
        *(partial(one, harmless) for one in drawn),
        lambda: loss_figure(METRICS),
        lambda: bars("ab", [1, 2], "x"),
    ):
        first = svg(draw())
        assert first == svg(draw()) and first.startswith("<svg") and "<dc:date>" not in first


def test_a_label_is_what_it_says_whatever_it_holds(payload):
    soup = BeautifulSoup(svg(bars([payload, "plain"], [1, 2], "x")), "html.parser")
    assert not soup.find_all(["script", "img", "iframe", "a", "meta"])
    assert " ".join(payload.split())[:39].isprintable() <= (" ".join(payload.split())[:39] in soup.get_text())


def test_labels_that_begin_alike_stay_two_bars():
    soup = BeautifulSoup(svg(bars(["long " * 20 + "one", "long " * 20 + "two"], [1, 2], "x")), "html.parser")
    assert soup.get_text().count("long…") == 2


def test_trained_flags_of_the_tokens_equal_the_loss_mask(dataset, tokenizer):
    example = render_example(next(iter(dataset.traces)))
    spans, encoded = token_spans(example, tokenizer), encode_example(example, tokenizer)
    assert [span.trained for span in spans] == encoded.loss_mask
    assert "".join(span.text for span in spans).removeprefix("<bos>") == render_conversation(example)
    trained = "".join(span.text for span in spans if span.trained)
    assert trained == example.response + "<end_of_turn>"
    control = [span.text for span in spans if span.control]
    assert control == ["<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_turn>", "<end_of_turn>"]


def test_f41_tables_and_tokens_in_a_notebook_show_hostile_text_as_text(payload, tokenizer):
    table = BeautifulSoup(show_table([{payload: payload}]).data, "html.parser")
    assert [cell.get_text() for cell in table.find_all(["th", "td"])] == [payload, payload]
    assert {element.name for element in table.find_all(True)} == {"table", "thead", "tbody", "tr", "th", "td"}
    tokens = BeautifulSoup(show_tokens(Example("toy", payload, payload), tokenizer).data, "html.parser")
    assert {element.name for element in tokens.find_all(True)} <= {"p", "span", "br"}


def test_a_table_without_rows_says_so():
    assert "(none)" in show_table([]).data


def test_numbers_of_a_table_stand_right_and_words_left():
    cells = BeautifulSoup(show_table([{"what": "traces", "n": 3}]).data, "html.parser").find_all("td")
    assert [cell["style"] for cell in cells] == ["text-align: left", "text-align: right"]
    assert json.loads(cells[1].get_text()) == 3
