"""What changed between two datasets, told on a screen, in Markdown and as a page with figures.

diff = diff_datasets(load_dataset(folder, "duel-v1"), load_dataset(folder, "duel-v2"))
print("\\n".join(summary(diff)))                  # fits one screen
write_dataset_diff(Path("diff.html"), diff)       # or diff.md
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lib.data.diff import DatasetDiff, Row
from lib.data.validation import recorded_lengths
from lib.errors import RequestError
from lib.experiments.markdown import fenced, inline, table
from lib.experiments.report import write_diff
from lib.experiments.stages import command
from lib.files import atomic_write

WIDTH = 100
FEW = 4
CELL = 300  # characters of a cell


class Table(NamedTuple):
    """Rows under a title; the first cell of a row names it."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def sentence(diff: DatasetDiff) -> str:
    """What became of the rows."""
    if diff.reordered:
        return f"The same {diff.same:,} traces in another order."
    if not (diff.changed or diff.removed or diff.added):
        return f"The same {diff.same:,} traces in the same order."
    return (
        f"{diff.same:,} traces are the same, {diff.changed:,} changed, {diff.removed:,} removed, {diff.added:,} added."
    )


def tables(diff: DatasetDiff) -> list[Table]:
    """Everything but the rows that changed, for a page."""
    sides = ["", diff.before, diff.after]
    return [
        Table("What was asked for differently", "", sides, [[name, *map(_text, both)] for name, *both in diff.request]),
        Table(
            "Statistics",
            "Tokens are counted by the tokenizer that each dataset learned for itself.",
            sides,
            [[name, *map(_text, both)] for name, *both in diff.statistics],
        ),
        Table(
            "In which fields the rows changed",
            "A row changed where it has the same id with other content, or asks the same question: "
            + (", ".join(f"{count:,} by {by}" for by, count in diff.paired_by.items()) or "none")
            + ".",
            ["fields that differ", "rows"],
            [[names, f"{count:,}"] for names, count in diff.changed_in.items()],
        ),
        Table(
            "By values of meta",
            "Keys with many values, such as the number of an episode, are left out.",
            ["key", "value", diff.before, diff.after, "changed", "removed", "added"],
            [[_cell(row.key), _cell(row.value), *(f"{count:,}" for count in row[2:])] for row in diff.values],
        ),
        _rows("Removed", diff.removed_rows, diff.removed),
        _rows("Added", diff.added_rows, diff.added),
    ]


def summary(diff: DatasetDiff) -> Iterator[str]:
    """Lines for a terminal, few enough for one screen."""
    yield f"{diff.before} → {diff.after}: {sentence(diff)}"
    changed_in = ", ".join(f"{count:,} in {names}" for names, count in diff.changed_in.items())
    if changed_in:
        yield f"changed: {_short(changed_in, WIDTH - 9)}"
    if diff.request:
        yield f"asked for differently{_part(diff.request, FEW)}:"
    for name, before, after in diff.request[:FEW]:
        yield f"  {_short(name, 30)}: {_short(before, 36)} → {_short(after, 36)}"
    moved = [row for row in diff.statistics if row[1] != row[2]]
    if moved:
        yield f"{f'statistics that differ{_part(moved, 2 * FEW)}':<44} {diff.before[:18]:>18} {diff.after[:18]:>18}"
    for name, before, after in moved[: 2 * FEW]:
        yield f"  {_short(name, 42):<42} {_short(before, 18):>18} {_short(after, 18):>18}"
    values = [row for row in diff.values if row.changed or row.removed or row.added]
    if values:
        yield f"{f'by values of meta{_part(values, FEW)}':<44} {'changed':>9} {'removed':>9} {'added':>9}"
    for row in values[:FEW]:
        yield f"  {_short(f'{row.key} = {row.value}', 42):<42} {row.changed:>9,} {row.removed:>9,} {row.added:>9,}"
    for row in diff.changed_rows[:1]:
        yield f"such as: {_short(row.question, WIDTH - 9)}"
        for one in row.differences[:2]:
            yield f"  {_short(one.part, 14)}: {_short(one.before, 38)} → {_short(one.after, 38)}"


def as_json(diff: DatasetDiff) -> dict[str, Any]:
    """The same for a script."""
    found = diff._asdict() | {
        name: [row._asdict() for row in getattr(diff, name)] for name in ("removed_rows", "added_rows")
    }
    found["values"] = [row._asdict() for row in diff.values]
    found["changed_rows"] = [
        row._asdict() | {"differences": [one._asdict() for one in row.differences]} for row in diff.changed_rows
    ]
    return {name: value for name, value in found.items() if name != "lengths"}


def write_dataset_diff(path: Path, diff: DatasetDiff) -> None:
    """As a page or as Markdown, by the ending of the name. Raises RequestError for another ending."""
    if path.suffix == ".md":
        atomic_write(path, markdown(diff))
    elif path.suffix == ".html":
        again = command("dataset", "diff", diff.before, diff.after, "--output", path.name)
        write_diff(path, diff, sentence(diff), tables(diff), _pictures(diff), again)
    else:
        raise RequestError(f"{path}: expected a name that ends in .html or .md")


def markdown(diff: DatasetDiff) -> str:
    sections = [f"# {inline(diff.before)} → {inline(diff.after)}", f"**{inline(sentence(diff))}**"]
    for one in tables(diff):
        if one.rows:
            sections += [f"## {inline(one.title)}", *([inline(one.note)] if one.note else [])]
            sections.append(table([*map(inline, one.head)], [[*map(inline, row)] for row in one.rows]))
    if diff.changed_rows:
        sections.append(f"## Rows that changed ({len(diff.changed_rows)} of {diff.changed:,})")
    for row in diff.changed_rows:
        sections.append(f"### {inline(_cell(row.question))}")
        sections.append(f"Same {row.by}: {inline(row.before_id)} → {inline(row.after_id)}")
        for part in row.differences:
            sections += [f"{inline(part.part)}, before and after:", *map(_block, (part.before, part.after))]
    for key, content in zip((diff.before, diff.after), diff.contents, strict=True):
        sections.append(f"{inline(key)}: content sha256 {content}")
    return "\n\n".join(sections) + "\n"


def _rows(what: str, rows: list[Row], count: int) -> Table:
    told = [[*map(_cell, row)] for row in rows]
    return Table(f"{what}: the first {len(rows)} of {count:,}", "", ["id", "question"], told)


def _pictures(diff: DatasetDiff) -> list[tuple[str, str]]:
    """(text alternative, SVG) of what became of the rows, and of the lengths."""
    from lib.experiments.figures import lengths_figure, rows_figure, svg  # here, as matplotlib takes long to come up

    there, here = (recorded_lengths(record) for record in diff.lengths)
    said = [f"{found.percentile(0)} to {found.percentile(100)}, mean {found.mean:.1f}" for found in (there, here)]
    alt = f"Tokens of an example in {diff.before}: {said[0]}; in {diff.after}: {said[1]}"
    return [
        (sentence(diff), svg(rows_figure(diff))),
        (alt, svg(lengths_figure(there.counts, here.counts, (diff.before, diff.after)))),
    ]


def _part(rows: list[Any], shown: int) -> str:
    return f" ({shown} of {len(rows)})" if len(rows) > shown else ""


def _block(text: str | None) -> str:
    return "absent" if text is None else fenced(text)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return text if len(text) <= CELL else f"{text[:CELL]}…"


def _short(value: Any, width: int) -> str:
    """One line of at most so many characters."""
    line = " ".join(_text(value).split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
