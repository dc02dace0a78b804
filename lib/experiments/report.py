"""The delta report, as Markdown and as one self-contained page.

    write_markdown(run.path("delta_report.md"), comparison)
    write_page(run.path("report.html"), facts)

Text from traces and models is never markup: fenced in Markdown by a fence longer than any in it, escaped in HTML
by the template engine, and a Content-Security-Policy lets no script run and nothing load. In Markdown, which is read
in a terminal too, characters that a terminal obeys are shown instead.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from IPython.display import HTML
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lib.config import Config
from lib.data.renderer import CONTROL_TOKENS, Example, encode_example
from lib.data.tokenizer import Tokenizer
from lib.evaluation.compare import Comparison, ItemResult, Summary
from lib.evaluation.statistics import Interval
from lib.experiments.figures import accuracy_figure, loss_figure, svg
from lib.experiments.markdown import fenced, inline, table
from lib.files import atomic_write

SHOWN = 10


class TokenSpan(NamedTuple):
    """One token of an example, for looking at: its text, whether it is trained on, whether it is a control token."""

    text: str
    trained: bool
    control: bool


class RunFacts(NamedTuple):
    """What the page says of the run besides the comparison; `record` is what reproducing it needs and compares."""

    config: Config
    dataset: dict[str, Any]
    example: Example
    tokenizer: Tokenizer
    metrics: list[dict[str, float]]
    training: dict[str, Any]
    record: dict[str, Any]
    reproduce: str


def token_spans(example: Example, tokenizer: Tokenizer) -> list[TokenSpan]:
    """The tokens of a training item, in order, as a reader wants to see them."""
    encoded = encode_example(example, tokenizer)
    pieces = tokenizer.pieces(encoded.tokens)
    return [
        TokenSpan(piece.replace("▁", " "), trained, piece in CONTROL_TOKENS)
        for piece, trained in zip(pieces, encoded.loss_mask, strict=True)
    ]


def show_tokens(example: Example, tokenizer: Tokenizer) -> HTML:
    """The tokens of a training item, for a notebook: trained ones highlighted, control tokens dark."""
    return HTML(_templates().get_template("tokens.html.j2").render(spans=token_spans(example, tokenizer)))


def show_table(rows: list[dict[str, Any]]) -> HTML:
    """Rows with the same keys as a table, for a notebook."""
    return HTML(_templates().get_template("table.html.j2").render(rows=rows))


def write_markdown(path: Path, comparison: Comparison) -> None:
    atomic_write(path, markdown(comparison))


def drawings(comparison: Comparison, metrics: list[dict[str, float]]) -> dict[str, str]:
    """The pictures of the page, as SVG."""
    return {"accuracy": svg(accuracy_figure(comparison)), "loss": svg(loss_figure(metrics))}


def write_page(path: Path, comparison: Comparison, facts: RunFacts, drawn: dict[str, str]) -> None:
    """The whole report as one HTML file that needs nothing from anywhere."""
    spans = token_spans(facts.example, facts.tokenizer)
    page = _templates().get_template("report.html.j2").render(
        comparison=comparison, facts=facts, spans=spans, trained=sum(span.trained for span in spans), shown=SHOWN,
        confidence=f"{100 * (1 - comparison.rule.alpha):g}", record=json.dumps(facts.record, ensure_ascii=False),
        drawn={name: Markup(picture) for name, picture in drawn.items()},
    )  # fmt: skip
    atomic_write(path, page)


def write_certificate(path: Path, certificate: Any) -> None:
    """What came of doing a run again, as one page; of a Certificate of `reproduce`."""
    atomic_write(path, _templates().get_template("certificate.html.j2").render(certificate=certificate))


def write_index(path: Path, runs: list[dict[str, Any]]) -> None:
    """Every run as a row of one page; rows as `list_runs` gives them."""
    atomic_write(path, _templates().get_template("index.html.j2").render(runs=runs))


def markdown(comparison: Comparison) -> str:
    """The report as Markdown: verdict, counts, categories, steps, what was fixed and what broke."""
    before, after, confidence = comparison.before, comparison.after, f"{100 * (1 - comparison.rule.alpha):g} %"
    sections = [
        "# Delta report",
        f"**{inline(comparison.headline)}**",
        f"Before: {inline(before.model)}, weights {inline(before.weights_sha256[:12])}. "
        f"After: {inline(after.model)}, weights {inline(after.weights_sha256[:12])}. "
        f"Eval set: {inline(before.eval_set)}, {comparison.paired.n} items.",
        f"Rule, set before the run: improved or regressed where the exact McNemar test gives p < "
        f"{comparison.rule.alpha:g} and accuracy changes by {100 * comparison.rule.min_effect:.1f} points or more; "
        "otherwise no detectable change. Accuracy is correct items over all items; an item without a readable "
        "answer, or cut off by the token limit, is not correct and is counted apart.",
        "## Counts",
        table(
            ["", "before", "after"],
            [
                ["items", before_n := comparison.before_summary.n, before_n],
                [f"accuracy ({confidence} interval)", *map(_accuracy, _sides(comparison))],
                *[
                    [name, *(side.counts[name] for side in _sides(comparison))]
                    for name in comparison.before_summary.counts
                ],
                [f"all steps true ({confidence} interval)", *map(_sound, _sides(comparison))],
                ["no reasoning written", *(_checkable(side, side.no_reasoning) for side in _sides(comparison))],
                [
                    "right answer, wrong reasoning",
                    *(_checkable(side, side.right_answer_wrong_reasoning) for side in _sides(comparison)),
                ],
            ],
        ),
        f"Paired difference: {percent(comparison.paired.difference, signed=True)} "
        f"({confidence} interval {100 * comparison.paired.low:+.1f} to "
        f"{100 * comparison.paired.high:+.1f}); {comparison.paired.fixed} fixed, "
        f"{comparison.paired.broken} broken; exact McNemar p = {comparison.paired.p_value:.3g}.",
        "## By category",
        table(
            ["category", "n", "before", "after"],
            [[inline(c.name), c.before.n, _accuracy(c.before), _accuracy(c.after)] for c in comparison.categories],
        ),
        _leaks(comparison),
        _step_errors(comparison),
        *_pairs("Broken: correct before, not after", comparison.broken),
        *_pairs("Fixed: correct after, not before", comparison.fixed),
        *_unsound_items(comparison.unsound),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def visible(completion: str) -> str:
    """A completion for reading; one of blanks alone, as an untrained model writes them, is described."""
    if completion.strip():
        return completion
    return f"({len(completion)} blanks and line breaks, no text)" if completion else "(nothing)"


def percent(share: float, signed: bool = False) -> str:
    return f"{100 * share:+.1f} points" if signed else f"{100 * share:.1f} %"


def interval(found: Interval | None) -> str:
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}" if found else ""


def _sides(comparison: Comparison) -> tuple[Summary, Summary]:
    return comparison.before_summary, comparison.after_summary


def _accuracy(side: Summary) -> str:
    return f"{percent(side.accuracy)} ({interval(side.interval)})"


def _sound(side: Summary) -> str:
    return f"{side.sound} of {side.checked} ({interval(side.sound_interval)})" if side.checked else "not checkable"


def _checkable(side: Summary, count: int) -> str:
    return str(count) if side.checked else "not checkable"


def _leaks(comparison: Comparison) -> str:
    if comparison.leaks is None:
        return "## Leaks\n\nNot looked for, as the training data was not given."
    if not comparison.leaks:
        return "## Leaks\n\nNo item is asked in the training data."
    rows = [[inline(leak.item), leak.kind, inline(leak.trace)] for leak in comparison.leaks[:SHOWN]]
    more = len(comparison.leaks) - SHOWN
    rest = f"\n\nAnd {more} more pairs, whole in comparison.json beside this report." if more > 0 else ""
    return f"## Leaks ({comparison.leaking_items} items)\n\n" + table(["item", "kind", "training trace"], rows) + rest


def _step_errors(comparison: Comparison) -> str:
    if not comparison.after_summary.checked:
        return ""
    if comparison.after_summary.no_reasoning == comparison.after_summary.checked:
        return "## Reasoning steps\n\nThe tuned model wrote no reasoning, so there is none to check."
    if not comparison.step_errors:
        return "## Reasoning steps\n\nEvery step that the tuned model wrote is true."
    rows = sorted(comparison.step_errors.items(), key=lambda row: -row[1])
    return "## Reasoning steps that were wrong after training\n\n" + table(["step", "times"], rows)


def _pairs(title: str, pairs: list[tuple[ItemResult, ItemResult]]) -> list[str]:
    sections = [f"## {title} ({len(pairs)})"]
    for before, after in pairs[:SHOWN]:
        sections += [f"### {inline(before.id)}", f"Expected: {inline(before.expected)}", fenced(before.prompt)]
        sections += [f"Before ({before.verdict}):", fenced(visible(before.completion))]
        sections += [f"After ({after.verdict}):", fenced(visible(after.completion))]
    return [*sections, *_rest([after for _, after in pairs])]


def _unsound_items(items: list[ItemResult]) -> list[str]:
    if not items:
        return []
    sections = [f"## Right answer, wrong reasoning ({len(items)})"]
    for item in items[:SHOWN]:
        sections += [f"### {inline(item.id)}", f"First wrong: {inline(item.first_error)}"]
        sections += [fenced(visible(item.completion))]
    return [*sections, *_rest(items)]


def _rest(items: list[ItemResult]) -> list[str]:
    more = len(items) - SHOWN
    return [f"And {more} more, whole in the evaluation outputs beside this report."] if more > 0 else []


def _templates() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"percent": percent, "interval": interval, "visible": visible}
    return templates
