"""The figures of notebooks and report, in one house style: labelled, readable in greyscale, one message each."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
from IPython.display import Image, display
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from lib.data.diff import DatasetDiff
from lib.evaluation.compare import Comparison
from lib.evaluation.results import ItemResult
from lib.evaluation.statistics import Interval

BEFORE, AFTER = "#8a94a6", "#1f5fbf"
DOTS = 220  # a printed inch; a page shows it at half its size, so that it is sharp on any screen
STATES = ("true", "false", "unreadable", "missing", "extra")  # what can be said of a step
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "svg.hashsalt": "retrace", "svg.fonttype": "none",
    "text.parse_math": False,  # a label is what it says: `$` in it starts no formula
}  # fmt: skip


def loss_figure(lines: list[dict[str, float]]) -> Figure:
    """Loss and held-out loss by step (log scale), and the learning rate below."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        steps = [line["step"] for line in lines]
        losses = [line["loss"] for line in lines]
        alone = {"marker": "o"} if len(lines) == 1 else {}  # of one point there is no line
        top.plot(steps, losses, color=AFTER, label="training examples", **alone)
        held = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
        if held:
            top.plot(
                *zip(*held, strict=True), color="black", marker="o", markersize=4, linestyle="--", label="held out"
            )
        top.set_yscale("log")
        top.yaxis.set_major_formatter(_plain_number)
        top.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        top.yaxis.set_minor_formatter(_plain_number if max(losses) < 20 * min(losses) else NullFormatter())
        top.set_ylabel("loss (nats a trained token)")
        top.legend(frameon=False)
        bottom.plot(steps, [line["learning_rate"] for line in lines], color=BEFORE, **alone)
        bottom.set_ylabel("learning\nrate")
        bottom.set_xlabel("optimizer step")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return figure


def accuracy_figure(comparison: Comparison) -> Figure:
    """Accuracy before and after, over all and by category, with intervals."""
    rows = [("all items", comparison.before_summary, comparison.after_summary)]
    rows += [(row.name, row.before, row.after) for row in comparison.categories if len(comparison.categories) > 1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.55 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for shift, index, color, marker, label in [(0.14, 1, BEFORE, "o", "before"), (-0.14, 2, AFTER, "s", "after")]:
            for place, row in enumerate(reversed(rows)):
                side = row[index]
                low, high = side.accuracy - side.interval.low, side.interval.high - side.accuracy
                axes.errorbar(
                    100 * side.accuracy, place + shift, xerr=[[100 * max(low, 0)], [100 * max(high, 0)]], fmt=marker,
                    color=color, capsize=3, label=label if place == 0 else None,
                )  # fmt: skip
        axes.set_yticks(range(len(rows)), [f"{_label(name)} (n = {before.n})" for name, before, _ in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(-2, 102)
        axes.set_xlabel(f"accuracy (%), with {100 * (1 - comparison.rule.alpha):g} % interval")
        figure.legend(loc="outside upper right", frameon=False, ncols=2)
        return figure


def trials_figure(rows: Sequence[tuple[str, float, Interval, Interval]], confidence: float) -> Figure:
    """Accuracy of each trial of a sweep, the first on top and marked as the best: label, accuracy, interval alone
    (thick) and the one that holds for all of them together (thin)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 1.1 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (_, accuracy, alone, together) in enumerate(rows):
            best = place == 0
            color, marker = (AFTER, "s") if best else (BEFORE, "o")
            axes.plot([100 * end for end in together], [place, place], color=color, linewidth=1)
            axes.plot([100 * end for end in alone], [place, place], color=color, linewidth=4, alpha=0.5)
            axes.plot([100 * accuracy], [place], color=color, marker=marker, markersize=6)
        axes.set_yticks(range(len(rows)), [_label(row[0]) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-2, 102)
        told = f"accuracy (%) with {100 * confidence:g} % interval: thick alone, thin all together"
        figure.supxlabel(told, fontsize="medium")  # beside long labels the axis alone has no room for it
        return figure


def reliability_figure(comparison: Comparison) -> Figure:
    """Share of correct items by the probability that the model gave to its completion: on the diagonal, calibrated."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color="0.6", linestyle=":", label="calibrated")
        sides = [(comparison.before_summary, BEFORE, "o", "before"), (comparison.after_summary, AFTER, "s", "after")]
        for side, color, marker, label in sides:
            bins = side.calibration.bins
            axes.plot(
                [100 * row.confidence for row in bins], [100 * row.accuracy for row in bins], color=color,
                marker=marker, label=label,
            )  # fmt: skip
            for row in bins:
                axes.annotate(
                    f"{row.n}", (100 * row.confidence, 100 * row.accuracy), (4, 4), textcoords="offset points"
                )
        axes.set(xlim=(-2, 106), ylim=(-4, 108), xlabel="confidence (%), mean of a bin; beside it, its items")
        axes.set_ylabel("correct (%)")
        figure.legend(loc="outside upper right", frameon=False, ncols=3)
        return figure


def funnel_figure(matched: int, dropped: Mapping[str, int], split: Mapping[str, int]) -> Figure:
    """From the traces that match to those that are chosen: what is left out is hollow, where it falls away."""
    rows = [("match the filters", 0, matched, {"color": BEFORE})]
    left = matched
    for reason, count in dropped.items():
        left -= count
        rows.append((f"− {reason}", left, count, {"color": "white", "edgecolor": "black", "linestyle": "--"}))
    start = 0
    for side, count in split.items():
        rows.append((f"chosen, {side.replace('_', ' ')}", start, count, {"color": AFTER}))
        start += count
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.8 + 0.34 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (_, begin, count, look) in enumerate(rows):
            axes.barh(place, count, left=begin, height=0.65, **look)
            axes.annotate(f"{count:,}", (begin + count, place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [_label(row[0]) for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1 * matched)
        axes.set_xlabel("traces")
        return figure


def step_figure(sides: Mapping[str, Sequence[ItemResult]]) -> Figure | None:
    """Where reasoning goes wrong: for each step of a completion how often it is true, false, unreadable or missing.

    A panel for each side, the darker the more; None where no step of these items can be checked.
    """
    tables = {side: _step_states(items) for side, items in sides.items()}
    kinds = list(dict.fromkeys(kind for table in tables.values() for kind in table))
    if not kinds:
        return None
    states = [state for state in STATES if any(row.get(state) for table in tables.values() for row in table.values())]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.8 + 0.3 * len(kinds)), layout="constrained")
        panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
        for axes, (side, table) in zip(panels, tables.items(), strict=True):
            counts = [[table.get(kind, {}).get(state, 0) for state in states] for kind in kinds]
            shares = [[100 * count / (sum(row) or 1) for count in row] for row in counts]
            axes.imshow(shares, cmap="Greys", vmin=0, vmax=120, aspect="auto")
            for place, row in enumerate(shares):
                for column, share in enumerate(row):
                    color = "white" if share > 55 else "black"
                    axes.text(column, place, f"{share:.0f}", ha="center", va="center", color=color)
            axes.set_xticks(range(len(states)), states)
            axes.set_yticks(range(len(kinds)), [_label(kind.replace("_", " ")) for kind in kinds])
            axes.grid(False)
            axes.tick_params(length=0)
            axes.tick_params(axis="x", labelsize=8 if len(states) * len(tables) > 6 else 10)
            axes.set_title(f"{_label(side)} (% of steps)", fontsize=10)
        return figure


def _step_states(items: Sequence[ItemResult]) -> dict[str, dict[str, int]]:
    """Kind of step, in the order of the steps → what can be said of it → in how many items."""
    found: dict[str, dict[str, int]] = {}
    for item in sorted(items, key=lambda item: -len(item.checks)):
        for check in item.checks:
            if check.correct is None:  # nobody can check it
                continue
            row = found.setdefault(check.kind, {})
            state = "true" if check.correct else check.error
            row[state] = row.get(state, 0) + 1
    return found


def bars(labels: Sequence[str], values: Sequence[float], xlabel: str) -> Figure:
    """One horizontal bar a label, the first on top."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.8 + 0.3 * len(labels)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(labels)), list(values), color=AFTER)
        axes.set_yticks(range(len(labels)), map(_label, labels))
        axes.invert_yaxis()
        axes.set_xlabel(xlabel)
        return figure


def histogram(counts: Mapping[int, int], xlabel: str, ylabel: str, max_length: int | None = None) -> Figure:
    """How often each length or count occurs; what is over `max_length` is hollow, behind a line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.4), layout="constrained")
        axes = figure.subplots()
        lowest, highest = min(counts), max(counts)
        width = max(1, -(-(highest - lowest) // 30))
        start = lowest if max_length is None else lowest - (lowest - max_length - 1) % width  # no bar holds both kinds
        edges = [edge - 0.5 for edge in range(start, highest + width + 1, width)]
        for fits, look in [(True, {"color": AFTER}), (False, {"color": "white", "edgecolor": "black"})]:
            drawn = {
                length: count
                for length, count in counts.items()
                if (max_length is None or length <= max_length) == fits
            }
            if drawn:
                axes.hist(list(drawn), bins=edges, weights=list(drawn.values()), **look)
        if max_length is not None and max_length <= 2 * highest:
            axes.axvline(max_length + 0.5, color="black", linestyle="--")
            left = 2 * max_length > lowest + highest  # where there is room for the words
            axes.annotate(
                f"max_length {max_length}", (max_length + 0.5, 1), (-5 if left else 5, 0), va="top",
                xycoords=("data", "axes fraction"), textcoords="offset points", ha="right" if left else "left",
            )  # fmt: skip
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(
            xlabel if max_length is None or max_length <= 2 * highest else f"{xlabel}; max_length is {max_length}"
        )
        axes.set_ylabel(ylabel)
        return figure


def rows_figure(diff: DatasetDiff) -> Figure:
    """What became of the rows of two datasets: one bar each, what both have beside what only one of them has."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 1.9), layout="constrained")
        axes = figure.subplots()
        parts = [
            ("the same", diff.same, diff.same, {"color": BEFORE}),
            ("changed", diff.changed, diff.changed, {"color": AFTER}),
            ("removed", diff.removed, 0, {"color": "white", "edgecolor": "black", "linestyle": "--"}),
            ("added", 0, diff.added, {"color": "white", "edgecolor": "black"}),
        ]
        ends = [0, 0]
        for label, there, here, look in parts:
            axes.barh([0, 1], [there, here], left=ends, label=f"{label} ({max(there, here):,})", height=0.6, **look)
            ends = [ends[0] + there, ends[1] + here]
        axes.set_yticks([0, 1], [_label(diff.before), _label(diff.after)])
        axes.invert_yaxis()
        axes.set_xlabel("traces")
        figure.legend(loc="outside upper right", frameon=False, ncols=4)
        return figure


def lengths_figure(before: Mapping[int, int], after: Mapping[int, int], names: tuple[str, str]) -> Figure:
    """The lengths of two datasets in tokens, as shares, since one may be larger."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.subplots()
        lowest, highest = min(*before, *after), max(*before, *after)
        width = max(1, -(-(highest - lowest) // 30))
        edges = [edge - 0.5 for edge in range(lowest, highest + width + 1, width)]
        looks = [{"color": BEFORE, "alpha": 0.6}, {"color": AFTER, "histtype": "step", "linewidth": 1.8}]
        for counts, name, look in zip((before, after), names, looks, strict=True):
            shares = [100 * count / sum(counts.values()) for count in counts.values()]
            axes.hist(list(counts), bins=edges, weights=shares, label=_label(name), **look)
        axes.set_xlabel("tokens of an example, each by the tokenizer of its dataset")
        axes.set_ylabel("examples (%)")
        figure.legend(loc="outside upper right", frameon=False, ncols=2)
        return figure


def show(figure: Figure | None, alt: str) -> None:
    """Display in a notebook, with a text for who cannot see it; where there is no figure, the text alone."""
    if figure is None:
        print(alt)
        return
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="png", dpi=DOTS, metadata={"Software": None})
    display(Image(out.getvalue(), alt=alt, retina=True))


def _plain_number(value: float, place: int) -> str:
    """`0.001`: a log axis would write its ticks as formulas, and formulas are off, as labels hold any text."""
    return f"{value:g}"


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element; the same figure gives the same text."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _label(text: str) -> str:
    """What fits beside the axis: one line of at most 40 characters."""
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    return line if len(line) <= 40 else f"{line[:39]}…"
