"""The main objects show themselves: briefly as text, as a card in a notebook, and whatever they hold is inert there."""

import subprocess
import sys
from pathlib import Path

import hostile
import pytest
from bs4 import BeautifulSoup

from lib.cards import brief, card
from lib.config import TrainingConfig, load_config
from lib.evaluation.compare import Comparison
from lib.experiments.run import create_run
from lib.trace import make_trace

TRACE = make_trace(
    "2+2?", [("step", "2+2=4"), ("step", "so 4")], "4", {"source": "builtin", "state": {"x": 1}}, id="t-1"
)


def text(shown: object) -> str:
    return BeautifulSoup(shown._repr_html_(), "html.parser").get_text("|")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return hostile.comparison(tmp_path_factory.mktemp("outputs"), list(hostile.PAYLOADS.values()))


def test_a_card_is_a_title_over_what_is_not_empty():
    soup = BeautifulSoup(card("A", {"n": 1200, "none": None, "list": ["x", "y"], "pairs": {"k": 0}}), "html.parser")
    assert soup.strong.text == "A"
    assert [row.get_text("=") for row in soup.find_all("tr")] == ["n=1,200", "list=1. x\n2. y", "pairs=k 0"]


def test_a_long_text_and_a_long_list_are_cut_where_it_is_said():
    shown = card("A", {"text": "x" * 2000, "list": list(range(40))})
    assert "x" * 600 + "…" in shown and "x" * 601 not in shown and "… and 28 more" in shown


def test_a_trace_shows_question_steps_answer_and_meta():
    assert repr(TRACE) == "Trace('t-1', '2+2?', 2 steps, answer '4')"
    for said in ("Trace t-1", "2+2?", "1. 2+2=4\n2. so 4", "source builtin"):
        assert said in text(TRACE)


def test_a_dataset_a_run_and_a_section_of_the_configuration_show_themselves(dataset):
    assert repr(dataset) == f"Dataset('toy-v1', {len(dataset.traces)} traces)"
    assert f"held out {dataset.manifest['split']['held_out']}" in text(dataset)
    run = create_run(load_config("configs/smoke.yaml"))
    run.conclude("01_traces", "Two traces.")
    assert repr(run) == f"Run({run.name!r}, stale)"
    assert "Two traces." in text(run) and "smoke-v1" in text(run)
    assert "num_steps|20" in text(run.config.training) and "alpha" not in text(run.config.evaluation)
    assert TrainingConfig(num_steps=20).changed() == {"num_steps": 20}


def test_an_evaluation_its_items_and_a_comparison_show_themselves(comparison):
    assert "of" in repr(comparison.after) and repr(comparison).startswith("Comparison('")
    assert len(repr(comparison.after)) < 200 and len(repr(comparison)) < 200
    assert comparison.headline[:40] in text(comparison)
    summary = comparison.after_summary
    assert f"correct {summary.counts['correct']}, wrong {summary.counts['wrong']}" in text(comparison.after)
    item = next(item for item in comparison.after.items if item.checks and not item.sound)
    assert repr(item).startswith("ItemResult(") and "✗" in text(item) and item.verdict in text(item)


def test_f41_what_the_objects_hold_is_inert(comparison):
    traces = [make_trace(said, [("step", said)], said, {"source": said[:64]}, id="x") for said in
              (payload.replace("\0", "") for payload in hostile.PAYLOADS.values()) if said.isprintable()]  # fmt: skip
    assert len(traces) > 30
    for shown in (*traces, comparison, comparison.before, *comparison.after.items):
        soup = BeautifulSoup(shown._repr_html_(), "html.parser")
        assert {tag.name for tag in soup.find_all(True)} <= {"div", "strong", "table", "tbody", "tr", "th", "td"}
        assert all(set(tag.attrs) <= {"style", "scope"} for tag in soup.find_all(True))


def test_a_repr_is_one_line_that_no_terminal_obeys():
    hidden = make_trace("a\nb\x1b[2J\u202ec", [("step", "x")], "y" * 400, {"source": "x"}, id="i")
    assert repr(hidden).isprintable() and len(repr(hidden)) < 200
    assert brief("a\x1b[2J\n\u202eb") == "a␛[2J \N{REPLACEMENT CHARACTER}b"


def test_a_trace_shows_itself_where_nothing_heavy_is_imported():
    heavy = ("jax", "polars", "matplotlib", "IPython", "jinja2")
    program = f"import sys; import lib.trace; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
