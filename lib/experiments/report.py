"""The delta report, as Markdown and as one self-contained page.

    write_markdown(run.path("delta_report.md"), comparison)
    write_page(run.path("report.html"), facts)

Text from traces and models is never markup: fenced in Markdown by a fence longer than any in it, escaped in HTML
by the template engine, and a Content-Security-Policy lets no script run and nothing load. In Markdown, which is read
in a terminal too, characters that a terminal obeys are shown instead.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from IPython.display import HTML
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lib.config import Config
from lib.data.renderer import CONTROL_TOKENS, Example, encode_example
from lib.data.tokenizer import Tokenizer
from lib.evaluation.compare import Category, Comparison
from lib.evaluation.leaks import Near
from lib.evaluation.results import ItemResult, Summary
from lib.evaluation.statistics import Interval, wilson_interval
from lib.evaluation.verdict import wanted_effect
from lib.experiments.evidence import Provenance, needed, promised, provenance
from lib.experiments.markdown import fenced, inline, table
from lib.files import atomic_write

SIDES = ("before", "after")
TITLES = {"broken": ("Broken", "correct before, not after"), "fixed": ("Fixed", "correct after, not before")}
SHOWN = 10
SHOWN_TRIALS = 40


class TokenSpan(NamedTuple):
    """One token of an example, for looking at: its text, whether it is trained on, whether it is a control token."""

    text: str
    trained: bool
    control: bool


class ShownStage(NamedTuple):
    """A stage of a run, for its report: what it came to, and the code of its notebook, cell by cell."""

    name: str
    title: str
    sentence: str
    code: list[str]


class Frame(NamedTuple):
    """What stands around a notebook on its page."""

    title: str
    style: Markup
    nav: Markup
    footer: Markup


class RunFacts(NamedTuple):
    """What the page says of the run besides the comparison.

    `nearest` are the training traces most like each question that is shown; `record` is what reproducing the run needs
    and compares. `pages` are the names and titles of the pages beside this one, the report among them.
    """

    config: Config
    dataset: dict[str, Any]
    example: Example
    tokenizer: Tokenizer
    metrics: list[dict[str, float]]
    training: dict[str, Any]
    nearest: dict[str, list[Near]]
    origins: dict[str, str]
    record: dict[str, Any]
    reproduce: str
    stages: list[ShownStage]
    pages: list[tuple[str, str]]


class Metric(NamedTuple):
    """A share of the items, with its interval where it has one."""

    value: float
    interval: Interval | None


class ShownStep(NamedTuple):
    """One step of a completion: `mark` is true, or the kind of its error, or empty where nobody can check it."""

    text: str
    mark: str
    reason: str
    differs: bool


def shown_steps(item: ItemResult, other: ItemResult | None = None) -> list[ShownStep]:
    """The steps of an item as a reader wants to see them; `differs` where the other completion says something else."""
    count = max(len(item.steps), len(item.checks))
    return [_shown_step(place, item, other) for place in range(count)]


def _shown_step(place: int, item: ItemResult, other: ItemResult | None) -> ShownStep:
    text = item.steps[place] if place < len(item.steps) else ""
    check = item.checks[place] if place < len(item.checks) else None
    theirs = other.steps[place] if other and place < len(other.steps) else ""
    mark = "" if check is None or check.correct is None else "true" if check.correct else check.error
    return ShownStep(text, mark, check.reason if check else "", other is not None and text != theirs)


def shown_prompts(comparison: Comparison) -> list[str]:
    """The questions of all items that the page shows."""
    pairs = [*comparison.broken[:SHOWN], *comparison.fixed[:SHOWN], *comparison.both_wrong[:SHOWN]]
    return [item.prompt for item in (*(after for _, after in pairs), *comparison.unsound[:SHOWN])]


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
    return HTML(templates().get_template("tokens.html.j2").render(spans=token_spans(example, tokenizer)))


def show_table(rows: list[dict[str, Any]]) -> HTML:
    """Rows with the same keys as a table, for a notebook."""
    return HTML(templates().get_template("table.html.j2").render(rows=rows))


def write_markdown(path: Path, comparison: Comparison) -> None:
    atomic_write(path, markdown(comparison))


def drawings(comparison: Comparison, metrics: list[dict[str, float]]) -> dict[str, str]:
    """The pictures of the page, as SVG; of the loss only where there are metrics.

    What draws is imported here, and below, where something is drawn: matplotlib takes long to come up.
    """
    from lib.experiments.figures import accuracy_figure, loss_figure, reliability_figure, svg

    drawn = {"accuracy": svg(accuracy_figure(comparison)), "reliability": svg(reliability_figure(comparison))}
    return drawn | ({"loss": svg(loss_figure(metrics))} if metrics else {})


def write_page(path: Path, comparison: Comparison, facts: RunFacts, drawn: dict[str, str]) -> None:
    """The whole report of a run as one HTML file that needs nothing from anywhere."""
    spans = token_spans(facts.example, facts.tokenizer)
    about = {"spans": spans, "trained": sum(span.trained for span in spans), "facts": facts, "names": SIDES}
    about |= {"record": json.dumps(facts.record, ensure_ascii=False), "titles": TITLES}
    about |= {"needed": needed(facts.record, facts.config), "promised": promised(facts.record)}
    origins = [provenance(facts.record, facts.reproduce)]
    atomic_write(path, _page(comparison, facts.record["run"], drawn, origins, **about))


def write_comparison(
    path: Path, comparison: Comparison, names: tuple[str, str], differences: list[tuple[str, str, str]],
    origins: list[Provenance],
) -> None:  # fmt: skip
    """The tuned models of two runs as such a page: what is different, metrics on one axis, then item by item.

    `differences` are name, there, here.
    """
    from lib.experiments.figures import reliability_figure, svg

    one, other = names
    titles = {"broken": (f"Only {one}", "correct there alone"), "fixed": (f"Only {other}", "correct there alone")}
    about = {"differences": differences, "facts": None, "names": names, "titles": titles}
    drawn = {"reliability": svg(reliability_figure(comparison))}
    atomic_write(path, _page(comparison, f"{one} against {other}", drawn, origins, **about))


def _page(
    comparison: Comparison, title: str, drawn: dict[str, str], origins: list[Provenance], **about: Any
) -> str:  # fmt: skip
    pictures = {name: Markup(picture) for name, picture in drawn.items()}
    confidence = f"{100 * (1 - comparison.rule.alpha):g}"
    known = {"comparison": comparison, "title": title, "drawn": pictures, "origins": origins, "shown": SHOWN}
    return templates().get_template("report.html.j2").render(confidence=confidence, **known, **about)


def metrics(comparison: Comparison) -> list[tuple[str, Metric, Metric]]:
    """Every share of the items that both sides have, by its name."""

    def both(name: str, share: Callable[[Summary], Metric]) -> tuple[str, Metric, Metric]:
        return name, *map(share, _sides(comparison))

    last = comparison.after_summary
    rows = [both("correct", lambda side: Metric(side.accuracy, side.interval))]
    if len(comparison.categories) > 1:
        rows += [
            (f"correct, {row.name}", *(Metric(side.accuracy, side.interval) for side in (row.before, row.after)))
            for row in comparison.categories
        ]
    if last.samples > 1:
        rows.append(both(f"at least one of {last.samples} samples", lambda side: Metric(side.pass_at_all.mean, None)))
    if all(side.checkable for side in _sides(comparison)):
        rows.append(both("every step true", lambda side: _sound_share(side, 1 - comparison.rule.alpha)))
    return rows + [
        both(name, lambda side, name=name: Metric(side.counts[name] / side.n, None))
        for name in ("unscored", "truncated")
    ]


def _sound_share(side: Summary, confidence: float) -> Metric:
    """Of all items whose task is known, as one without a step that could be checked is not known to be sound."""
    return Metric(side.sound / side.checkable, wilson_interval(side.sound, side.checkable, confidence))


def frame_of(name: str, pages: Sequence[tuple[str, str]], origin: Provenance | None) -> Frame:
    """The frame of the page `name`, one of `pages`, each a name and a title; of no run where there is no origin."""
    style = (Path(__file__).parent / "templates" / "style.css").read_text("utf-8")
    if origin is None:
        return Frame(name, Markup(style), Markup(""), Markup(""))
    parts = templates().get_template("parts.html.j2").module
    return Frame(f"{name} · {origin.run}", Markup(style), parts.stages(pages, name), parts.provenance(origin))


def write_certificate(path: Path, certificate: Any, origin: Provenance) -> None:
    """What came of doing a run again, as one page; of a Certificate of `reproduce`, and where the run is from."""
    page = templates().get_template("certificate.html.j2")
    atomic_write(path, page.render(certificate=certificate, origin=origin))


def write_diff(
    path: Path, diff: Any, said: str, tables: list[Any], pictures: list[tuple[str, str]], command: str
) -> None:
    """What changed between two datasets, as one page; of `dataset_diff`, with (text alternative, SVG) pictures."""
    drawn = [(alt, Markup(picture)) for alt, picture in pictures]
    page = templates().get_template("dataset_diff.html.j2")
    atomic_write(path, page.render(diff=diff, said=said, tables=tables, drawn=drawn, command=command))


def write_sweep(path: Path, report: Any, tables: dict[str, Any], origin: Provenance | None) -> None:
    """The trials of a sweep side by side, as one page; of `sweep_report`, with its tables and sentences."""
    from lib.experiments.figures import svg, trials_figure

    drawn = report.scored[:SHOWN_TRIALS] if report.best else []
    rows = [
        (f"{one.trial.number}: {one.label}", one.score.accuracy, one.score.interval, one.score.together)
        for one in drawn
    ]
    picture = Markup(svg(trials_figure(rows, 1 - report.rule.alpha))) if rows else None
    page = templates().get_template("sweep.html.j2")
    atomic_write(path, page.render(report=report, picture=picture, drawn=len(drawn), origin=origin, **tables))


def markdown(comparison: Comparison) -> str:
    """The report as Markdown: verdict, counts, categories, steps, what was fixed and what broke."""
    before, after, confidence = comparison.before, comparison.after, f"{100 * (1 - comparison.rule.alpha):g} %"
    stated = "given to this report" if comparison.controls is None else "set before the run"
    sections = [
        "# Delta report",
        f"**{inline(comparison.headline)}**",
        f"Before: {inline(before.model)}, weights {inline(before.weights_sha256[:12])}. "
        f"After: {inline(after.model)}, weights {inline(after.weights_sha256[:12])}. "
        f"Eval set: {inline(before.eval_set)}, {comparison.paired.n} items.",
        f"Rule, {stated}: {rule(comparison)} Accuracy is correct items over all items; an item without a "
        "readable answer, or cut off by the token limit, is not correct and is counted apart.",
        "## Counts",
        table(
            ["figure", "before", "after"],
            [
                ["items", before_n := comparison.before_summary.n, before_n],
                [f"accuracy ({confidence} interval)", *map(_accuracy, _sides(comparison))],
                *[
                    [name, *(side.counts[name] for side in _sides(comparison))]
                    for name in comparison.before_summary.counts
                ],
                [f"all steps true ({confidence} interval)", *map(_sound, _sides(comparison))],
                ["no reasoning written", *(checkable(side, side.no_reasoning) for side in _sides(comparison))],
                ["no step that could be checked", *(checkable(side, side.words_only) for side in _sides(comparison))],
                [
                    "right answer, wrong reasoning",
                    *(checkable(side, side.right_answer_wrong_reasoning) for side in _sides(comparison)),
                ],
                [
                    "wrong answer, right reasoning",
                    *(checkable(side, side.wrong_answer_right_reasoning) for side in _sides(comparison)),
                ],
                ["true steps of those written or missing", *map(true_steps, _sides(comparison))],
                *_samples(comparison),
                ["calibration error (ECE)", *(f"{side.calibration.ece:.3f}" for side in _sides(comparison))],
                ["Brier score", *(f"{side.calibration.brier:.3f}" for side in _sides(comparison))],
            ],
        ),
        f"Paired difference: {percent(comparison.paired.difference, signed=True)} "
        f"({confidence} interval {100 * comparison.paired.low:+.1f} to "
        f"{100 * comparison.paired.high:+.1f}); {comparison.paired.fixed} fixed, "
        f"{comparison.paired.broken} broken; p {p_value(comparison.paired.p_value)}. "
        f"Bootstrap interval {100 * comparison.bootstrap.low:+.1f} to {100 * comparison.bootstrap.high:+.1f}.",
        inline(power(comparison)),
        inline(constant(comparison)),
        "## By category",
        table(
            ["category", "n", "before", "after", "difference", "p (Holm)", "change"],
            [
                [
                    inline(c.name),
                    c.before.n,
                    _accuracy(c.before),
                    _accuracy(c.after),
                    difference(c),
                    p_value(c.p_value),
                    c.word,
                ]
                for c in comparison.categories
            ],
        ),
        _controls(comparison),
        _leaks(comparison),
        _step_errors(comparison),
        *_pairs("Broken: correct before, not after", comparison.broken),
        *_pairs("Fixed: correct after, not before", comparison.fixed),
        *_pairs("Wrong before and after", comparison.both_wrong),
        *_unsound_items(comparison.unsound),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def rule(comparison: Comparison) -> str:
    """The rule of the verdict, as whoever reads it needs it."""
    given = comparison.rule
    test = (
        "the exact McNemar test (with the clustered t and sign-flip tests)"
        if comparison.paired.clustered
        else "the exact McNemar test"
    )
    return (
        f"improved or regressed where {test} gives p < {given.alpha:g} and accuracy changes by "
        f"{100 * given.min_effect:.1f} points or more, improved only where a constant answer is beaten, too; else no "
        f"detectable change where {100 * wanted_effect(given):.1f} points would have given p < {given.alpha:g} with "
        f"{100 * given.power:g} % power, and underpowered where not."
    )


def power(comparison: Comparison) -> str:
    """What the items could have shown."""
    found = comparison.outlook
    change = f"a change of {100 * found.detectable_effect:.1f} points is"
    if found.detectable_effect == 1:
        change = "no change is sure to be"
    said = f"With {comparison.paired.n} items, {change} found with {100 * comparison.rule.power:g} % power"
    if found.items_needed is None or found.items_needed <= comparison.paired.n:
        return f"{said}."
    return f"{said}; to tell {100 * found.target:.1f} points from none needs {found.items_needed:,} items like these."


def constant(comparison: Comparison) -> str:
    """What a constant answer is worth here."""
    found = comparison.constant
    low, high = 100 * found.paired.low, 100 * found.paired.high
    return (
        f"Always answering {found.answer!r} is correct for {percent(found.paired.before)}; the tuned model is "
        f"{'better' if found.beaten else 'not detectably better'} than that ({low:+.1f} to {high:+.1f} points)."
    )


def p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"= {p:.3g}"


def difference(row: Category) -> str:
    return f"{100 * row.paired.difference:+.1f} ({100 * row.paired.low:+.1f} to {100 * row.paired.high:+.1f})"


def true_steps(side: Summary) -> str:
    return f"{side.true_steps} of {side.steps} ({percent(side.true_steps / side.steps)})" if side.steps else "none"


def readable(completion: str) -> str:
    """A completion for reading; one of blanks alone, as an untrained model writes them, is described."""
    if completion.strip():
        return completion
    return f"({len(completion)} blanks and line breaks, no text)" if completion else "(nothing)"


def percent(share: float, signed: bool = False) -> str:
    return f"{100 * share:+.1f} points" if signed else f"{100 * share:.1f} %"


def interval(found: Sequence[float] | None) -> str:
    return f"{100 * found[0]:.1f} to {100 * found[1]:.1f}" if found else ""


def duration(seconds: float) -> str:
    """`47 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _sides(comparison: Comparison) -> tuple[Summary, Summary]:
    return comparison.before_summary, comparison.after_summary


def _accuracy(side: Summary) -> str:
    return f"{percent(side.accuracy)} ({interval(side.interval)})"


def _sound(side: Summary) -> str:
    return f"{side.sound} of {side.checked} ({interval(side.sound_interval)})" if side.checked else "not checkable"


def checkable(side: Summary, count: int) -> str:
    """A count of completions by their reasoning, where their task is one whose steps can be checked."""
    return str(count) if side.checkable else "not checkable"


def _samples(comparison: Comparison) -> list[list[str]]:
    if comparison.after_summary.samples == 1:
        return []
    k = comparison.after_summary.samples
    return [
        ["one sample alone (pass@1)", *(percent(side.pass_at_1.mean) for side in _sides(comparison))],
        [f"at least one of {k} samples (pass@{k})", *(percent(side.pass_at_all.mean) for side in _sides(comparison))],
        [f"most of {k} samples (majority@{k})", *(percent(side.majority.mean) for side in _sides(comparison))],
    ]


def _controls(comparison: Comparison) -> str:
    if comparison.controls is None:
        return "## Controls\n\nNot run, as two evaluation outputs were compared."
    rows = [
        [
            inline(found.model),
            f"{found.same_text} of {found.paired.n}",
            found.paired.fixed,
            found.paired.broken,
            found.word or "nothing",
        ]
        for found in comparison.controls
    ]
    return (
        "## Controls: each model against itself\n\nThe same items, asked again in reverse and in other batches.\n\n"
        + table(["model", "same text", "fixed", "broken", "the rule finds"], rows)
    )


def _leaks(comparison: Comparison) -> str:
    if comparison.leaks is None:
        return "## Leaks\n\nNot looked for, as the training data was not given."
    if not comparison.leaks:
        return "## Leaks\n\nNo item is asked in the training data."
    rows = [[inline(leak.item), leak.kind, inline(leak.trace)] for leak in comparison.leaks[:SHOWN]]
    more = len(comparison.leaks) - SHOWN
    rest = f"\n\nAnd {more} more pairs, whole in eval_summary.json beside this report." if more > 0 else ""
    return f"## Leaks ({comparison.leaking_items} items)\n\n" + table(["item", "kind", "training trace"], rows) + rest


def _step_errors(comparison: Comparison) -> str:
    if not comparison.after_summary.checkable:
        return ""
    if not comparison.after_summary.errors:
        return f"## Reasoning steps\n\n{no_error(comparison.after_summary)}"
    rows = [[inline(kind), error, count] for kind, error, count in step_errors(comparison.after_summary)]
    return (
        "## Reasoning steps that were wrong after training\n\n"
        + table(["step", "error", "times"], rows)
        + f"\n\nFirst wrong step: {first_errors(comparison.after_summary)}."
    )


def no_error(side: Summary) -> str:
    """What is known of the reasoning of a model in which no step is wrong."""
    if side.no_reasoning == side.checkable:
        return "The tuned model wrote no reasoning, so there is none to check."
    said = "No step that the tuned model wrote could be checked."
    if side.steps:
        said = f"Every step that could be checked is true: {side.steps} of them, in {side.sound} of {side.checkable}."
    if side.words_only:
        said += f" Of {side.words_only} completions no step could be checked."
    return f"{said} No reasoning written: {side.no_reasoning}." if side.no_reasoning else said


def step_errors(side: Summary) -> list[tuple[str, str, int]]:
    """(kind of step, kind of error, times), the most frequent first."""
    return sorted(((*key, count) for key, count in side.errors.items()), key=lambda row: (-row[2], row[:2]))


def first_errors(side: Summary) -> str:
    """`step 4 in 12 items, step 5 in 3`."""
    parts = [f"step {step} in {count}" for step, count in side.first_errors.items()]
    return ", ".join(parts[:8]) + (
        f" and later ones in {sum(list(side.first_errors.values())[8:])}" if parts[8:] else ""
    )


def _pairs(title: str, pairs: list[tuple[ItemResult, ItemResult]]) -> list[str]:
    sections = [f"## {title} ({len(pairs)})"]
    for before, after in pairs[:SHOWN]:
        sections += [f"### {inline(before.id)}", f"Expected: {inline(before.expected)}", fenced(before.prompt)]
        sections += [f"Before ({before.verdict}):", fenced(readable(before.completion))]
        sections += [f"After ({after.verdict}):", fenced(readable(after.completion))]
    return [*sections, *_rest([after for _, after in pairs])]


def _unsound_items(items: list[ItemResult]) -> list[str]:
    if not items:
        return []
    sections = [f"## Right answer, wrong reasoning ({len(items)})"]
    for item in items[:SHOWN]:
        sections += [f"### {inline(item.id)}", f"First wrong: {inline(item.first_error)}"]
        sections += [fenced(readable(item.completion))]
    return [*sections, *_rest(items)]


def _rest(items: list[ItemResult]) -> list[str]:
    more = len(items) - SHOWN
    return [f"And {more} more, whole in the evaluation outputs beside this report."] if more > 0 else []


def templates() -> Environment:
    """The pages' templates: everything that is put into one is escaped."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"percent": percent, "interval": interval, "readable": readable, "steps": shown_steps}
    templates.filters |= {"rule": rule, "power": power, "constant": constant, "difference": difference}
    templates.filters |= {
        "p_value": p_value,
        "true_steps": true_steps,
        "step_errors": step_errors,
        "no_error": no_error,
        "first_errors": first_errors,
        "metrics": metrics,
        "checkable": checkable,
        "duration": duration,
    }
    return templates
