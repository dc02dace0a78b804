"""Hostile texts, names, notebooks and files, by every way in, on every surface that shows them: nothing happens."""

import ast
import gc
import json
import os
import pickle
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import NamedTuple

import hostile
import mistune
import nbformat
import numpy as np
import papermill
import pytest
from hostile import CONTROL, HOST, MARK, MARKDOWN, MARKUP, OTHER, PAYLOADS
from inert import Browser, assert_inert, browser, letters, static_problems
from markdown_it import MarkdownIt
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from lib.__main__ import main
from lib.config import load_config
from lib.data.dataset import Dataset, load_dataset
from lib.data.export import FORMATS, export_lines, read_examples
from lib.data.importing import Accepted, read_traces
from lib.data.renderer import render_example
from lib.data.store import Store
from lib.errors import RequestError, RetraceError
from lib.evaluation.compare import Comparison
from lib.evaluation.leaks import Leak
from lib.experiments import display, index, report
from lib.experiments.evidence import Provenance, Row
from lib.experiments.explore import Chosen, shaded
from lib.experiments.markdown import printable
from lib.experiments.notebooks import check_parameters
from lib.experiments.pages import render
from lib.experiments.reproduce import Certificate
from lib.experiments.run import open_run
from lib.files import repository_root
from lib.model.weights import base_model, load_model, save_model
from lib.tasks import high_card_duel
from lib.trace import trace_from

ALL = PAYLOADS | CONTROL
EVERYTHING = "\n\n".join(ALL.values())
COLOUR = re.compile(r"␛\[[\d;]*m")  # as the Markdown shows what a terminal takes for one
NOTEBOOKS = repository_root() / "notebooks"
CONFIG = """
name: hostile
dataset: {dataset_name: hostile, dataset_version: v1, filters: {kind: text}}
model: {name: tiny, max_length: 1000000}
"""
# A renderer that takes its text's word for everything.
TRUSTING = mistune.create_markdown(
    renderer=mistune.HTMLRenderer(escape=False, allow_harmful_protocols=True),
    plugins=["table", "url", "footnotes", "strikethrough", "math", "task_lists", "def_list", "abbr", "superscript"],
)

# Some payloads have letters that no font has, or that are too high for a figure.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout"),
    # where a part of a checkpoint cannot be read, Orbax leaves the readers of the others behind
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


# ---- every way in -----------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A home whose traces hold every payload, and a configuration that uses them."""

    home: Path
    config: Path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Imported as anybody would: one trace a payload, and traces of a known game that its engine denies."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = hostile.traces(PAYLOADS, kind="text")
    texts[0]["created_at"] = "2999-01-01T00:00:00Z"  # the latest, so the example that notebooks show
    game = {"game": high_card_duel.NAME, "state": high_card_duel.state_of(high_card_duel.deal(0)), "kind": "denied"}
    denied = [record | {"id": f"denied {record['id'][:90]}", "meta": game} for record in hostile.traces(OTHER)[:0:-1]]
    records = texts + hostile.traces(CONTROL, kind="control") + denied
    found = Stored(folder / "a home {x}", folder / "hostile.yaml")
    found.config.write_text(CONFIG)
    with _home(found.home):
        assert main(["traces", "import", str(hostile.write_lines(folder / "t.jsonl", records))]) == 0
    return found


@contextmanager
def _home(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRACE_HOME", str(folder))
        yield


@pytest.fixture
def in_store(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> Stored:
    """The same, its home the one of this test."""
    monkeypatch.setenv("RETRACE_HOME", str(stored.home))
    return stored


def test_there_are_enough_payloads_and_all_differ():
    assert len(ALL) == len(set(ALL.values())) > 120 and all(text.strip() for text in ALL.values())


@pytest.fixture(scope="module")
def built(stored: Stored) -> Dataset:
    with _home(stored.home):
        words = ["--name", "texts", "--version", "v1", "--filter", "kind=text"]
        assert main(["dataset", "build", *words]) == 0
        return load_dataset(stored.home / "datasets", "texts-v1")


@pytest.mark.parametrize("format", FORMATS)
def test_f41_hostile_text_goes_out_in_every_format_and_comes_back_as_it_was(format, built, tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_bytes(b"".join(export_lines(built.traces, format)))
    examples = read_examples(file)
    assert [example.prompt for example in examples] == [trace.prompt for trace in built.traces]
    back = [record.trace for record in read_traces(file) if isinstance(record, Accepted)]
    assert [(trace.prompt, trace.final_answer, trace.meta) for trace in back] == [
        (trace.prompt, trace.final_answer, trace.meta) for trace in built.traces
    ]


@pytest.mark.parametrize("text", CONTROL.values(), ids=CONTROL)
def test_f41_a_control_token_in_a_text_is_refused_at_render_by_the_trace_id(text, tmp_path):
    whole = {"trace_version": "1.0", "prompt": "2 + 2?", "final_answer": "4", "id": "the id of it"}
    whole |= {"steps": [{"i": 0, "type": "step", "content": "2 + 2 = 4"}]}
    in_step = {"steps": [{"i": 0, "type": "step", "content": text}]}
    for change in ({"prompt": text}, {"final_answer": text}, in_step):
        with pytest.raises(RequestError, match="trace the id of it: its text holds the control token '<"):
            render_example(trace_from(whole | change))
    assert render_example(trace_from(whole | {"meta": {text: text}})).prompt == "2 + 2?"
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "Answer: 4"}]
    with pytest.raises(RequestError, match="control token"):
        read_examples(hostile.write_lines(tmp_path / "x.jsonl", [{"id": "x", "messages": turns}]))


def test_f41_a_dataset_of_control_tokens_is_not_built(in_store, capsys):
    words = ["--name", "control", "--version", "v1", "--filter", "kind=control"]
    assert main(["dataset", "build", *words]) == 2
    said = capsys.readouterr().err
    found = re.search(r"all (\d+) traces that match are left out \((\d+) with a control token", said)
    assert found and found[1] == found[2] and int(found[1]) >= len(CONTROL)
    assert not (in_store.home / "datasets" / "control-v1").exists()


# ---- every surface ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    found = hostile.comparison(tmp_path_factory.mktemp("outputs"), ALL.values())
    return found._replace(leaks=[Leak(text, "exact", text, 1.0) for text in ALL.values()])


@pytest.fixture(scope="module")
def notebooks(stored, built, comparison, tmp_path_factory) -> dict[str, Path]:
    """Pages of notebooks: two executed in that home, one with what 04 and 05 show of hostile answers, one made up."""
    folder = tmp_path_factory.mktemp("notebooks")
    for name in ("01_traces", "02_dataset"):
        with _home(stored.home):
            papermill.execute_notebook(
                str(NOTEBOOKS / f"{name}.ipynb"), str(folder / f"{name}.ipynb"), {"config": str(stored.config)},
                cwd=str(NOTEBOOKS), kernel_name="python3", progress_bar=False,
            )  # fmt: skip
    nbformat.write(_answers(comparison), folder / "04_05_answers.ipynb")
    (folder / "forged.ipynb").write_text(json.dumps(_forged()))
    for path in folder.glob("*.ipynb"):
        path.with_suffix(".html").write_text(render(path))
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.fixture(scope="module")
def pages(comparison, built, tmp_path_factory) -> dict[str, Path]:
    """The pages that are made without a notebook, with every item in them."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SHOWN", len(ALL))
        facts = hostile.facts(built, EVERYTHING)._replace(example=render_example(next(iter(built.traces))))
        few = hostile.comparison(folder, list(MARKUP.values())[::4])  # a picture of all would take its time
        report.write_page(folder / "report.html", comparison, facts, report.drawings(few, hostile.METRICS))
    origin = Provenance(*[EVERYTHING] * len(Provenance._fields))
    report.write_certificate(folder / "certificate.html", _certificate(EVERYTHING), origin)
    names = ("\n".join(ALL.values()), EVERYTHING)
    differences = [(text, text, text) for text in ALL.values()]
    report.write_comparison(folder / "compared.html", few, names, differences, [origin, origin])
    texts = [*ALL.values(), "javascript:alert(1)//"]
    rows = [_index_row(text) for text in texts]
    index.write_table(folder / "index.html", rows, {"Sweeps": [index.Page(text, text) for text in texts]})
    index.write_table(folder / "ticked.html", [_answered_row(number) for number in range(8)], {})
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.fixture(scope="module")
def markdown(comparison, tmp_path_factory) -> dict[str, Path]:
    """The delta report, and pages that two renderers make of it, HTML in it allowed."""
    folder = tmp_path_factory.mktemp("markdown")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SHOWN", len(ALL))
        report.write_markdown(folder / "delta_report.md", comparison)
    text = (folder / "delta_report.md").read_text()
    careful = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for name, made in {"markdown-it": careful.render(text), "mistune": TRUSTING(text)}.items():
        (folder / f"{name}.html").write_text(_page(made))
    return {path.stem: path for path in folder.iterdir()}


def _page(body: str) -> str:
    return f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>safe</title></head><body>{body}</body></html>"


def _cards(found: Comparison) -> list[str]:
    """What shows itself in the notebooks 00, 04 and 05."""
    pairs = list(zip(found.before.items, found.after.items, strict=True))
    return [
        *(item._repr_html_() for item in found.after.items),
        found._repr_html_(),
        found.after._repr_html_(),
        display.pairs(pairs, none="").data,
        shaded([Chosen(text, 0.3, []) for text in ALL.values()]),
    ]


def _answers(found: Comparison) -> nbformat.NotebookNode:
    """What the notebooks 04 and 05 show of these answers, and what a notebook shows that fails over them."""
    items = "\n\n".join(f"{item.prompt}\n{report.readable(item.completion)}\n→ {item.verdict}; {item.first_error}"
                        for item in found.after.items)  # fmt: skip
    table = report.show_table([{EVERYTHING: text, "answer": text} for text in ALL.values()])
    outputs = [
        new_output("stream", name="stdout", text=items),
        new_output("stream", name="stderr", text=items),
        new_output("display_data", {"text/markdown": report.markdown(found), "text/plain": "<Markdown>"}),
        new_output("display_data", {"text/html": table.data, "text/plain": repr(table)}),
        *(new_output("display_data", {"text/html": html}) for html in _cards(found)),
        *(new_output("error", ename=text, evalue=text, traceback=[text, f"\x1b[31m{text}\x1b[0m"])
          for text in ALL.values()),
    ]  # fmt: skip
    return new_notebook(cells=[new_code_cell("", outputs=outputs)])


def _forged() -> nbformat.NotebookNode:
    """A notebook as an enemy would write it: hostile in sources, outputs and metadata, of which no kernel knows."""
    cells, payloads = [], list(ALL.values())
    for text in ["\n\n".join(payloads[start : start + 8]) for start in range(0, len(payloads), 8)]:
        image = {"width": f'1" onerror="{hostile.JS}', "height": text, "alt": text, "unconfined": text}
        image |= {"needs_background": text, "filenames": {"image/png": f"{hostile.URL}.png"}}
        outputs = [new_output("display_data", {mime: text}, metadata={mime: image, **image}) for mime in _MIMES]
        cells.append(new_code_cell(text, outputs=outputs))
        cells.append(new_markdown_cell(text, attachments={"a.png": {"image/png": text}}))
        cells.append(new_raw_cell(text, metadata={"raw_mimetype": "text/html"}))
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": {"x": MARKUP["out of JSON"]}}}
    language = {"name": MARKUP["out of an attribute"], "pygments_lexer": "html"}
    notebook = new_notebook(cells=cells, metadata={"widgets": widgets, "title": EVERYTHING, "language_info": language})
    for cell in notebook.cells[::3]:  # what no valid notebook has, and nbconvert believes all the same
        cell.metadata.tags = [f'x" onmouseover="{hostile.JS}', cell.source.replace(",", "")]
        cell.outputs[0].svg_filename = f"{hostile.URL}.svg"
    return notebook


_MIMES = ["image/svg+xml", "image/png", "image/jpeg", "text/html", "text/markdown", "text/latex", "text/plain"]
_MIMES += ["text/vnd.mermaid", "application/javascript"]


def _certificate(text: str) -> Certificate:
    differs = {"name": text, "recorded": text, "found": text}
    return Certificate(
        certificate_version="1.0", run=text, run_id=text, created_at=text, equal=False, first_step_apart=1,
        rows=[Row(payload, payload, payload, False, payload) for payload in ALL.values()], fingerprint=[differs],
        packages=[differs], explanation=[text], code={"git_sha": text, "git_dirty": True}, environment=text,
        seconds=1.0,
    )  # fmt: skip


def _index_row(text: str) -> dict:
    figures = {"before": 0.5, "before_interval": [0.4, 0.6], "after": 0.5, "after_interval": [0.4, 0.6], "n": 4}
    figures |= {"wall_s": 1.0, "report": True, "facts": {"a": text}, "answered": None}
    return dict.fromkeys(("run", "status", "verdict", "error", "created_at", "dataset", "model"), text) | figures


def _answered_row(number: int) -> dict:
    """A run that differs in everything from its neighbours, and was correct where they were not."""
    facts = {text: f"{text}{number}" for text in ALL.values()}
    items = [(text, text) for text in ALL.values()]
    answered = index.Answered("sha", "cw"[number % 2] * len(items), items)
    return _index_row(list(ALL.values())[number]) | {"facts": facts, "answered": answered}


def seen(text: str) -> str:
    """What is left of a text when blanks, line ends, colours and all that has no shape of its own are taken away."""
    return letters(re.sub("[␍↵]", "", COLOUR.sub("", printable(text))))


def assert_shown(page: str, texts: list[str]) -> None:
    found = seen(page)
    hidden = [text for text in texts if seen(text) not in found]
    assert not hidden, f"{len(hidden)} of {len(texts)} are not to be read, the first: {hidden[0]!r}"


def test_f41_f42_f43_hostile_text_is_inert_and_readable_on_every_page(pages, notebooks):
    made = pages | notebooks
    shown = assert_inert(made.values())
    for name in ("report", "certificate", "index", "compared", "04_05_answers", "forged"):
        assert_shown(shown[made[name]], list(ALL.values()))
    assert f"{len(ALL) + 1} runs compared" in shown[made["index"]]  # poked, the script drew all that it can draw
    assert_shown(shown[made["ticked"]].partition("8 runs compared")[2], list(ALL.values()))
    # a table of a notebook shows a control character as a question mark, and a token as its bytes
    plain = [text for text in PAYLOADS.values() if not obeyed(text)]
    assert_shown(shown[made["01_traces"]], plain)
    assert_shown(shown[made["02_dataset"]], [text for text in list(PAYLOADS.values())[::3] if text in plain])


def test_f41_f43_the_delta_report_is_inert_by_whatever_it_is_rendered(markdown):
    made = [markdown["markdown-it"], markdown["mistune"]]
    for text in assert_inert(made, policy=False).values():
        assert_shown(text, list(ALL.values()))


def test_f41_the_delta_report_holds_nothing_that_a_terminal_obeys(markdown):
    text = markdown["delta_report"].read_text()
    assert obeyed(text) == [] and "␛[2J" in text


# ---- without which the silence above would prove nothing ----------------------------------------------------


def control_page(folder: Path, body: str) -> Path:
    (folder / "control.html").write_text(_page(body))
    return folder / "control.html"


def raw(text: str) -> str:
    """A page that puts the text where it likes: among its elements, and into an attribute with either quote."""
    return f"<div>{text}</div><b title=\"{text}\">x</b><b title='{text}'>x</b>"


def own_mark(text: str, number: int) -> str:
    """The text with a mark of its own, so that many can be told apart on one page."""
    text = text.replace(MARK, f"title{number}.").replace("pwned", f"p{number}.")
    return re.sub(r"ert\(1?\)", f"ert({number})", text)


def acting(opened: Browser, bodies: dict[str, str], folder: Path) -> set[str]:
    """Which of these bodies act, each in a frame of one page; whatever sets its title is written into it instead."""
    script = """<p id=marks></p><script>
    Object.defineProperty(document, 'title', {get: () => 'safe', set(title) { marks.append(title + '. ') }})
    </script>"""
    frames = "".join(f'<iframe srcdoc="{escape(own_mark(body, number))}"></iframe>'
                     for number, body in enumerate(bodies.values(), 1000))  # fmt: skip
    seen = opened.visit(control_page(folder, script + frames))
    acts = " ".join([*seen.acts, seen.text])
    return {name for number, name in enumerate(bodies, 1000)
            if re.search(rf"/p{number}\b|title{number}\b|dialog: '{number}'", acts)}  # fmt: skip


def test_f41_every_payload_acts_in_a_page_that_does_not_escape(tmp_path):
    bodies = {name: raw(text) for name, text in MARKUP.items()}
    bodies |= {name: TRUSTING(text) for name, text in MARKDOWN.items()}
    with browser() as opened:
        silent = bodies.keys() - acting(opened, bodies, tmp_path)
        for _ in range(2 if silent else 0):  # what waits for a frame to be drawn may come late
            silent -= acting(opened, {name: bodies[name] for name in silent}, tmp_path)
        assert not silent
        assert any(HOST in words for words in opened.reached), "no request arrived"
        for body, act in {
            MARKUP["script title"]: f"the title became '{MARK}'",
            MARKUP["script"]: "opened a dialog: '1'",
            MARKUP["image remote"]: f"asked for {hostile.URL}.png",
            MARKUP["meta refresh"]: f"the address became {hostile.URL}.html",
        }.items():
            assert act in opened.visit(control_page(tmp_path, body)).acts
    with pytest.raises(AssertionError, match="asked for"):
        assert_inert([control_page(tmp_path, MARKUP["image remote"])], policy=False)
    assert_inert([control_page(tmp_path, "<p>nothing</p>")], policy=False)


def test_f43_the_policy_alone_lets_no_script_run_and_nothing_load(pages, tmp_path):
    names = ["script title", "script remote", "script fetch", "image", "image remote", "svg", "svg style", "style font",
             "style import", "style attribute", "iframe srcdoc", "iframe data", "object", "video", "form", "base",
             "link javascript", "details", "preload"]  # fmt: skip
    [policy] = re.findall(r"<meta http-equiv.*>", pages["certificate"].read_text())
    body = "".join(f"<div>{MARKUP[name]}</div>" for name in names)
    page = control_page(tmp_path, body)
    page.write_text(page.read_text().replace("<title>", f"{policy}<title>"))
    with browser() as opened:
        acts = opened.visit(page).acts
        assert [act for act in acts if not act.startswith(("asked for ", "reached "))] == []  # asked, and blocked
        assert set(opened.reached) <= {"b''"}  # a connection made in advance heeds no policy, and says nothing
        assert opened.visit_without_policy(page).acts and opened.reached


@pytest.mark.parametrize("name", [*MARKUP, "expression", "data link", "speculation", "mutation style"])
def test_f43_the_parser_sees_what_must_not_be_there(name, tmp_path):
    assert static_problems(control_page(tmp_path, raw((MARKUP | OTHER)[name])), policy=False)


@pytest.mark.parametrize(
    "policy",
    [
        "",
        "default-src *; base-uri 'none'; form-action 'none'",
        "default-src 'none'; base-uri 'none'; form-action 'none'; script-src 'unsafe-inline'",
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src http:",
        "default-src 'none'; base-uri 'none'",
    ],
)
def test_f43_a_policy_that_is_missing_or_lets_through_is_seen(policy, tmp_path):
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">' if policy else ""
    (tmp_path / "page.html").write_text(f"<html><head>{meta}<title>x</title></head><body></body></html>")
    assert static_problems(tmp_path / "page.html")


# ---- names ------------------------------------------------------------------------------------------------

NAMES = {
    "parent": "../x", "parents": "a/../../x", "absolute": "/tmp/retrace-hostile", "braces": "{x}", "format": "{0.a}",
    "NUL": "a\0b", "long": "x" * 300, "home": "~root", "dots": "..", "blank": " ", "line": "a\nb", "dash": "-x",
    "hidden": ".x", "backslash": "a\\b", "direction": "a\u202eb", "escape": "a\x1b[2Jb", "shell": "$(touch x)",
    "markup": "<b>", "full-width": "\uff0e\uff0e\uff0fx",
}  # fmt: skip
COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "run --name": lambda name: ["run", "configs/smoke.yaml", f"--name={name}"],
    "run of a name": lambda name: ["run", "configs/smoke.yaml", f"--set=name={json.dumps(name)}"],
    "dataset of a name": lambda name: ["run", "configs/smoke.yaml", f"--set=dataset.dataset_name={json.dumps(name)}"],
    "build --name": lambda name: ["dataset", "build", f"--name={name}", "--version=v1"],
    "build --version": lambda name: ["dataset", "build", "--name=x", f"--version=/../{name}"],
    "export": lambda name: ["dataset", "export", "--format=trace", name],
    "eval set": lambda name: ["run", "configs/smoke.yaml", f"--set=evaluation.eval_set={json.dumps(name)}"],
    "show": lambda name: ["runs", "show", name],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_f39_a_hostile_name_is_refused_in_one_line_and_nothing_is_written(name, command, home, tmp_path, capsys):
    if name in ("..", "-x", ".x") and command is COMMANDS["run --name"]:
        name = f"/{name}"  # alone it would only end the folder's name, which begins with the time
    try:
        assert main(command(name)) == 2
    except SystemExit as ended:  # -x is read as a flag
        assert ended.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    assert not home.exists() and list(tmp_path.iterdir()) == [] and not Path("/tmp/retrace-hostile").exists()


@pytest.mark.parametrize("existing", [True, False], ids=["to a folder", "to nothing"])
def test_f39_a_link_planted_in_the_home_leads_nowhere(existing, home, tmp_path, capsys):
    outside, config = tmp_path / "outside", tmp_path / "c.yaml"
    if existing:
        outside.mkdir()
    config.write_text(CONFIG)
    by_hand = open_run(str(config)).folder
    for path in by_hand.iterdir():
        path.unlink()
    by_hand.rmdir()
    by_hand.symlink_to(outside)
    with pytest.raises(RequestError, match="a link that leads out of"):
        open_run(str(config))
    (home / "datasets").mkdir()
    (home / "datasets" / "x-v1").symlink_to(outside)
    Store(home / "store").add([trace_from(record) for record in hostile.traces({"one": "two"})])
    for words in (["build", "--name=x", "--version=v1"], ["export", "x-v1", "--format=trace"]):
        assert main(["dataset", *words]) == 2 and "a link that leads out of" in capsys.readouterr().err
    assert outside.exists() == existing and not (existing and list(outside.iterdir()))


# ---- parameters -------------------------------------------------------------------------------------------


def mark_of(folder: Path) -> tuple[Path, str]:
    """A file that must not come to be, and Python that would make it."""
    return folder / "pwned", f"open({str(folder / 'pwned')!r}, 'w').close()"


@pytest.mark.parametrize(
    "name", ["x=1;{} #", "config=1;{} #", "config\n{}\nx", "config = ({}) or run_dir", "__class__", "config ", "{}"]
)
def test_f40_a_parameter_name_that_is_code_is_refused(name, home, tmp_path):
    mark, code = mark_of(tmp_path)
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        with pytest.raises(RequestError, match="no such parameter"):
            check_parameters(notebook, {name.replace("{}", code): "x"})
    assert not mark.exists() and not home.exists()


@pytest.mark.parametrize("key", ["x=1;{} #", "name;{}", "training.{}", "__class__.__init__", "dataset.__class__.x"])
def test_f40_a_key_or_value_of_set_that_is_code_is_refused(key, home, tmp_path, capsys):
    mark, code = mark_of(tmp_path)
    values = ["1", f"!!python/object/apply:os.system ['touch {mark}']", f"$(touch {mark})", f"`{code}`"]
    for value in values:
        words = [f"--set={key.replace('{}', code)}={value}", "--set=training.num_steps=0"]
        assert main(["run", "configs/smoke.yaml", *words]) == 2
    for value in values[1:]:
        assert main(["run", "configs/smoke.yaml", f"--set=training.num_steps={value}"]) == 2
    assert not mark.exists() and not home.exists()


@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_f40_a_value_of_a_parameter_stays_one_text_in_the_cell_that_papermill_writes(text):
    notebook = load_notebook_node(str(NOTEBOOKS / "01_traces.ipynb"))
    given = {"config": text, "run_dir": f"'''{text}", "overrides": f'"\\\n{text}'}
    made = parameterize_notebook(notebook, given)
    [cell] = [cell for cell in made.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    written = ast.parse(cell.source).body
    assert {line.targets[0].id: ast.literal_eval(line.value) for line in written} == given


# ---- files that would execute when they are read ------------------------------------------------------------


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture(params=["pickle", "npy"])
def trap(request: pytest.FixtureRequest, mark: Path, tmp_path: Path) -> bytes:
    """Bytes that execute where they are believed."""
    if request.param == "pickle":
        return pickle.dumps(Touch(mark))
    np.save(tmp_path / "trap.npy", np.array([Touch(mark)], dtype=object), allow_pickle=True)
    return (tmp_path / "trap.npy").read_bytes()


def test_f44_the_traps_work(trap, mark, tmp_path):
    (tmp_path / "x").write_bytes(trap)
    np.load(tmp_path / "x", allow_pickle=True)
    assert mark.is_dir()


def test_f44_a_checkpoint_of_pickles_is_refused_or_not_read_and_never_executed(trap, mark, small_model, tmp_path):
    """Orbax keeps some notes of its own; without them the weights are still those that were saved."""
    folder, refused = tmp_path / "checkpoint", 0
    digest = save_model(folder, small_model)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        before = path.read_bytes()
        path.write_bytes(trap)
        try:
            assert load_model(folder).weights_sha256 == digest
        except RetraceError:
            refused += 1
        path.write_bytes(before)
    assert load_model(folder).weights_sha256 == digest and refused >= 5
    assert not mark.exists()
    gc.collect()  # or what Orbax leaves behind is complained of elsewhere


@pytest.mark.parametrize("name", ["model.pkl", "model.pt", "weights.npy", "pytorch_model.bin", "checkpoint.ckpt"])
def test_f44_a_pickle_offered_as_a_model_is_refused_and_not_executed(name, trap, mark, dataset, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(trap)
    for offered in (folder, folder / name):
        assert main(["eval", "generate", "--model", str(offered), "--eval-set", "eval_v1", "--output", "o"]) == 2
    released = {"vocab_size": 512, "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8,
                "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(released | {"model_type": "gemma"}))
    (folder / "tokenizer.json").write_bytes(dataset.tokenizer_file.read_bytes())
    with pytest.raises(RequestError):
        base_model(str(folder), 0, folder / "tokenizer.json")
    assert not mark.exists() and not Path("o").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_f44_a_pickle_in_the_dress_of_released_weights_is_refused(name, trap, mark, dataset, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    released = {"vocab_size": 4096, "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8,
                "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(released | {"model_type": "gemma"}))
    (folder / "tokenizer.json").write_bytes(dataset.tokenizer_file.read_bytes())
    (folder / name).write_bytes(trap)
    with pytest.raises(RequestError, match="not (a )?readable"):
        base_model(str(folder), 0, folder / "tokenizer.json")
    assert not mark.exists()


def test_f44_a_pickle_where_traces_or_examples_are_read_is_refused(trap, mark, home, tmp_path, capsys):
    file = tmp_path / "traces.jsonl"
    file.write_bytes(trap)
    for words in (["traces", "import"], ["dataset", "validate"], ["dataset", "build", "--request"], ["run"]):
        assert main([*words, str(file)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    train = ["train", "--config", "configs/smoke.yaml", "--output", str(tmp_path / "out"), "--data", str(file)]
    compare = ["eval", "report", "--before", str(file), "--after", str(file), "--output", str(tmp_path / "r.md")]
    assert main(train) == main(compare) == 2
    with pytest.raises(RequestError):
        load_config(file)
    assert not mark.exists() and not (tmp_path / "out").exists() and not home.exists()


# ---- terminals --------------------------------------------------------------------------------------------


def obeyed(text: str) -> list[str]:
    """The characters that a terminal would act on, and those that turn the direction of what follows."""
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return sorted({letter for letter in text if letter not in "\n\t" and (
        unicodedata.category(letter) == "Cc" or unicodedata.bidirectional(letter) in turning)})  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["traces", "list", "--limit", "1000"],
        ["traces", "verify"],
        ["runs", "list"],
        ["runs", "verify", "--all"],
        ["dataset", "build", "--name", "control", "--version", "v1", "--filter", "key=obeyed"],
        ["dataset", "build", "--name", "none", "--version", "v1", "--filter", "absent=1"],
    ],
    ids=" ".join,
)
def test_f41_nothing_is_printed_that_a_terminal_obeys(words, home, capsys):
    obeys = {name: text for name, text in OTHER.items() if obeyed(text)}
    game = {"game": high_card_duel.NAME, "state": high_card_duel.state_of(high_card_duel.deal(0))}
    records = hostile.traces(obeys) + [record | {"id": f"\x1b{record['id'][:100]}", "meta": game | {"key": "obeyed"}}
                                       for record in hostile.traces(obeys | CONTROL)[1:]]  # fmt: skip
    Store(home / "store").add(map(trace_from, records))
    run = home / "".join(text for text in NAMES.values() if obeyed(text) and "\0" not in text)
    run.mkdir()
    (run / "run_manifest.json").write_text(json.dumps({"status": OTHER["terminal"]}))
    with suppress(SystemExit):  # what verifies fails, as it must
        main(words)
    said = capsys.readouterr()
    assert len(obeys) > 6 and (said.out or said.err) and obeyed(said.out + said.err) == []
