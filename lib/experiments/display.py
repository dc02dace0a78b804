"""What the notebooks show beside figures and tables: their summary, training items as tokens, completions in pairs.

    summary = display.opening()                                # in the first cell: a place for what is known at the end
    display.fill(summary, "What it came to.", "And how.")      # in the last cell

HTML that is made here holds no text as markup, and keeps its styles on the elements: a rendered page has no style sheet
of its outputs, and JupyterLab shows them on light and on dark alike.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from IPython.display import HTML, DisplayHandle, Markdown
from IPython.display import display as show

from lib.cards import card, visible
from lib.data.renderer import Example
from lib.data.tokenizer import Tokenizer
from lib.evaluation.results import ItemResult
from lib.experiments import report
from lib.experiments.markdown import inline

_CELL = "vertical-align: top; text-align: left; padding: 2px 8px 2px 0; overflow-wrap: anywhere"


def opening() -> DisplayHandle | None:
    """The head of a notebook, which its last cell fills with the summary of the run; None outside of a notebook."""
    return show(Markdown("*The summary appears here when the last cell has run.*"), display_id=True)


def fill(summary: DisplayHandle | None, first: str, second: str) -> None:
    """Write the two sentences of the summary at the head of the notebook."""
    if summary is not None:
        summary.update(Markdown(f"**{inline(first)}** {inline(second)}"))


def tokens(examples: Sequence[Example], tokenizer: Tokenizer) -> HTML:
    """Training items as tokens: trained ones highlighted, control tokens dark."""
    return HTML("".join(report.show_tokens(example, tokenizer).data for example in examples))


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of them, from the first to the last at even distances.

    spread("abcdefg", 3) == ["a", "d", "g"]
    """
    if len(items) <= count:
        return list(items)
    return [items[place * (len(items) - 1) // (count - 1)] for place in range(count)]


def pairs(found: Sequence[tuple[ItemResult, ItemResult]], none: str) -> HTML:
    """Completions of the same question side by side, before and after; `none` is said where there is no pair."""
    return HTML("".join(_pair(*pair) for pair in found) or f"<p>{escape(none)}</p>")


def _pair(before: ItemResult, after: ItemResult) -> str:
    question = f"{before.prompt} (expected: {before.expected})"
    return (
        f"<p>{escape(visible(question))}</p>{side_by_side([completion(before, 'Before'), completion(after, 'After')])}"
    )


def side_by_side(cards: Sequence[str]) -> str:
    """Cards, which are HTML, in one row."""
    cells = "".join(f'<td style="{_CELL}">{one}</td>' for one in cards)
    return f'<table style="table-layout: fixed; width: 100%"><tbody><tr>{cells}</tr></tbody></table>'


def completion(item: ItemResult, title: str) -> str:
    """A completion as a card: its steps with what the engine says of each, or, where it has none, its text."""
    written = {"steps": item.marked_steps} if item.steps else {"wrote": report.readable(item.completion)}
    return card(f"{title}: {item.verdict}", written | {"answer": item.answer})
