"""What is looked at while exploring: filters, shades and steps; the notebook itself runs in test_pipeline."""

import hostile
import pytest
from bs4 import BeautifulSoup

from lib.config import load_config
from lib.data.store import Store
from lib.errors import RequestError
from lib.evaluation.results import ItemResult
from lib.experiments import explore
from lib.experiments.explore import Chosen, matching, shaded, walked
from lib.experiments.run import create_run
from lib.files import write_json
from lib.tasks import high_card_duel
from lib.tasks.steps import StepCheck
from lib.trace import make_trace

TRACES = list(high_card_duel.generate(20, seed=0))


def test_traces_are_found_by_any_text_in_them_and_by_a_value_of_their_meta():
    assert matching(TRACES, "", None) == TRACES
    ties = matching(TRACES, "EQUAL TO", None)
    assert ties == [trace for trace in TRACES if trace.final_answer == "tie"]
    assert matching(TRACES, "", ("episode_index", 3)) == [TRACES[3]]
    assert matching(TRACES, "no such words", None) == matching(TRACES, "", ("game", "chess")) == []


def test_an_unsure_token_is_darker_and_has_its_probability_below_it():
    sure, unsure, end = BeautifulSoup(
        shaded([Chosen("a", 1.0, []), Chosen("<b>", 0.25, []), Chosen("↵", 0.9, [])]), "html.parser"
    ).find_all("span")
    shade = [int(span["style"][len("background-color: #") :][:2], 16) for span in (sure, unsure, end)]
    assert shade[1] < shade[2] < shade[0] and unsure.sub.text == "25" and not sure.sub
    assert unsure.text == "<b>25"


def test_a_walk_shows_each_step_in_its_turn_and_the_answer_after_the_last():
    checks = [StepCheck("a", True, ""), StepCheck("b", False, "says 3, the engine says 4", "false")]
    item = ItemResult("i", "2+2?", "4", "", "", "", "3", "wrong", ["one", "two"], checks, 1, -1.0)
    first, last = walked(item, 1), walked(item, 2)
    assert "one ✓ true" in first and "two" not in first and "expected 4" not in first
    assert "two ✗ says 3, the engine says 4" in last and "3 (wrong; expected 4)" in last and "step 2 of 2" in last


def test_a_walk_through_many_steps_shows_the_last_of_them():
    steps = [f"step number {n}" for n in range(1, 31)]
    item = ItemResult("i", "2+2?", "4", "", "", "", "4", "correct", steps, [], 1, -1.0)
    assert "step number 20" in walked(item, 20) and "step number 21" not in walked(item, 20)
    assert "step number 30" in walked(item, 30) and "more" not in walked(item, 30)


def test_the_run_that_was_trained_last_is_found_and_any_by_its_name(home):
    assert explore.find("") is None
    first, second = (create_run(load_config("configs/smoke.yaml"), name) for name in ("first", "second"))
    assert explore.find("") is None
    with pytest.raises(RequestError, match=f"{first.name}: not trained"):
        explore.find(first.name)
    write_json(second.path("checkpoint-final", "model.json"), {})
    write_json(first.path("checkpoint-final", "model.json"), {})
    assert explore.find("").folder == first.folder and explore.find(second.name).folder == second.folder
    with pytest.raises(RequestError, match="run nowhere"):
        explore.find("nowhere")


def test_where_nothing_is_trained_each_view_says_what_to_run_first(tmp_path, capsys, monkeypatch):
    said = []
    monkeypatch.setattr(explore, "display", said.append)
    explore.ask(None)
    explore.steps(None)
    explore.traces(Store(tmp_path))
    said += [explore.about(None), explore.conclusion(None)]
    assert len(said) == 5 and all("make quickstart" in text.data and "01_traces.ipynb" in text.data for text in said)


def test_f41_what_is_browsed_is_inert(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(explore, "display", lambda data, raw: shown.append(data["text/html"]))
    texts = [text for text in hostile.PAYLOADS.values() if "\0" not in text][:5]
    store = Store(tmp_path)
    store.add(make_trace(text, [("step", text)], text, {"source": text[:60]}) for text in texts)
    explore.traces(store)
    tags = {tag.name for tag in BeautifulSoup(shown[0], "html.parser").find_all(True)}
    assert tags <= {"p", "div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
