"""What the figures draw is what they were given."""

import matplotlib.colors
import pytest

from lib.evaluation.results import ItemResult
from lib.experiments import figures
from lib.tasks.steps import StepCheck


def item(*errors: str) -> ItemResult:
    """An item whose steps a, b … have these errors, or are true."""
    checks = [StepCheck(kind, not error, error, error) for kind, error in zip("abc", errors, strict=False)]
    return ItemResult("i", "?", "4", "", "", "", "4", "correct", ["x"] * len(checks), checks, 1, -1.0)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_funnel_ends_where_what_is_left_out_begins():
    axes = figures.funnel_figure(10, {"asked": 3, "over the limit": 1}, {"train": 5, "held_out": 1}).axes[0]
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert spans == [(0, 10), (7, 10), (6, 7), (0, 5), (5, 6)]
    assert texts(axes) == ["10", "3", "1", "5", "1"]
    assert [tick.get_text() for tick in axes.get_yticklabels()][-2:] == ["chosen, train", "chosen, held out"]


def test_the_step_map_has_a_share_for_each_step_and_each_thing_that_was_said_of_one():
    items = [item("", "false", ""), item("", "", "missing"), item("", "", ""), item("", "", "missing")]
    left, right = figures.step_figure({"before": items, "after": items[2:3]}).axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["true", "false", "missing"]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["a", "b", "c"]
    assert texts(left) == ["100", "0", "0", "75", "25", "0", "50", "0", "50"]
    assert texts(right) == ["100", "0", "0"] * 3


def test_there_is_no_step_map_where_no_step_can_be_checked(capsys):
    figure = figures.step_figure({"before": [item()], "after": [item()]})
    assert figure is None
    figures.show(figure, alt="0 of 2 steps")
    assert capsys.readouterr().out == "0 of 2 steps\n"


def test_a_loss_that_was_logged_once_is_seen():
    once, twice = [{"step": 1, "loss": 2.0, "learning_rate": 0.1}], [{"step": 2, "loss": 1.0, "learning_rate": 0.1}]
    for lines, marker in ((once, "o"), (once + twice, "None")):
        assert [axes.lines[0].get_marker() for axes in figures.loss_figure(lines).axes] == [marker] * 2


@pytest.mark.parametrize("longest", [90, 500, 1000])
def test_no_bar_of_a_histogram_hides_what_fits_behind_what_does_not(longest):
    counts = dict.fromkeys(range(1, longest + 1), 1)
    axes = figures.histogram(counts, "tokens", "examples", max_length=77).axes[0]
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches if bar.get_height()]
    assert sum(bar.get_height() for bar in axes.patches) == longest and len(spans) == len(set(spans))
    assert any(right == 77.5 for _, right in spans) and any(left == 77.5 for left, _ in spans)


def test_before_and_after_differ_in_greyscale():
    colors = map(matplotlib.colors.to_rgb, (figures.BEFORE, figures.AFTER))
    light, dark = (0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue in colors)
    assert light > dark + 0.2
