"""What the notebooks show beside figures: a summary that is filled at the end, tokens, completions in pairs."""

import hostile
from bs4 import BeautifulSoup

from lib.data.tokenizer import load_tokenizer
from lib.experiments import display


def test_the_summary_is_two_sentences_in_which_nothing_is_markup(monkeypatch):
    shown = []
    monkeypatch.setattr(display, "show", lambda said, **options: Handle(shown, said))
    summary = display.opening()
    assert "appears here" in shown[0]
    display.fill(summary, "All of <b>it</b>.", "And *how*.")
    assert shown[1] == r"**All of \<b\>it\</b\>.** And \*how\*."


class Handle:
    """As IPython's, it updates what it stands for."""

    def __init__(self, shown: list[str], said) -> None:
        self.shown = shown
        self.update(said)

    def update(self, said) -> None:
        self.shown.append(said.data)


def test_some_items_are_spread_from_the_first_to_the_last():
    assert display.spread("abcdefg", 3) == ["a", "d", "g"]
    assert display.spread("ab", 3) == ["a", "b"] and display.spread([], 3) == []


def test_three_examples_are_shown_with_trained_and_control_tokens_apart(dataset, examples):
    shown = BeautifulSoup(display.tokens(examples, load_tokenizer(dataset.tokenizer_file)).data, "html.parser")
    assert len(shown.find_all("p")) == len(examples) == 3
    looks = {span["style"].partition(";")[0] for span in shown.find_all("span")}
    assert len(looks) == 3 and "<end_of_turn>" in shown.text.replace("▁", "_")


def test_f41_completions_stand_side_by_side_as_text(tmp_path):
    comparison = hostile.comparison(tmp_path, list(hostile.PAYLOADS.values())[:40])
    pairs = list(zip(comparison.before.items, comparison.after.items, strict=True))
    soup = BeautifulSoup(display.pairs(pairs, "none").data, "html.parser")
    assert {tag.name for tag in soup.find_all(True)} <= {"p", "div", "strong", "table", "tbody", "tr", "th", "td"}
    assert len([title for title in soup.find_all("strong") if title.text.startswith("Before: ")]) == len(pairs)
    assert display.pairs([], "Nothing <broke>.").data == "<p>Nothing &lt;broke&gt;.</p>"
