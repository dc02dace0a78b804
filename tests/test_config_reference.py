"""docs/config.md and lib/config.py are in step: every key, with its type, its default, its bounds and its comment.

python tests/test_config_reference.py        # writes docs/config.md anew from the dataclasses
"""

import ast
import dataclasses
import json
import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import pytest

from lib import config
from lib.config import Config
from lib.files import atomic_write, repository_root

PAGE = repository_root() / "docs" / "config.md"
SOURCE = Path(config.__file__).read_text("utf-8")
HEAD = """\
# Every key of a configuration

<!-- Written by `python tests/test_config_reference.py` from lib/config.py: change the comments there. -->

A configuration is a YAML file; `configs/quickstart.yaml` is the one to copy. What it does not say has the default that
stands here. Any key can be changed for one command, by its path: `--set training.num_steps=50`; the value is read as
YAML. A misspelt key, a wrong type or a value out of bounds is refused before anything starts. YAML is read by the rules
of its version 1.2: `1e-5` is a number, and `no` is a word.
"""
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping", list: "list"}


class Section(NamedTuple):
    """A dataclass, and the path of its keys, such as `training.lora.`; empty for the configuration itself."""

    path: str
    kind: type


def sections(kind: type = Config, path: str = "") -> Iterator[Section]:
    """The configuration and, each after what it is part of, its parts."""
    yield Section(path, kind)
    for item in dataclasses.fields(kind):
        if part := part_of(kind, item.name):
            yield from sections(part, f"{path}{item.name}.")


def part_of(kind: type, name: str) -> type | None:
    """The dataclass that a field holds, where it holds one."""
    return next(filter(dataclasses.is_dataclass, kinds_of(kind, name)), None)


def kinds_of(kind: type, name: str) -> tuple[type, ...]:
    """`int | None` → (int, NoneType); `list[str]` → (list,)."""
    hint = get_type_hints(kind)[name]
    return get_args(hint) if isinstance(hint, types.UnionType) else (get_origin(hint) or hint,)


def comments(source: str, name: str) -> dict[str, str]:
    """Field → the comment right above it, of the class with this name in a source."""
    lines = source.splitlines()
    [found] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
    told = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            above = node.lineno - 1
            while lines[above - 1].strip().startswith("# "):
                above -= 1
            told[node.target.id] = " ".join(line.strip()[2:] for line in lines[above : node.lineno - 1])
    return told


def page() -> str:
    return "\n".join([HEAD, *(text for section in sections() for text in _section(section))])


def _section(section: Section) -> Iterator[str]:
    told = comments(SOURCE, section.kind.__name__)
    yield f"## {section.path.rstrip('.') or 'The file itself'}\n"
    yield f"{section.kind.__doc__}\n"
    yield "| key | value | default | |"
    yield "|---|---|---|---|"
    for item in dataclasses.fields(section.kind):
        part, path = part_of(section.kind, item.name), section.path + item.name
        key = f"[`{path}`](#{path.replace('.', '')})" if part else f"`{path}`"
        about = " ".join(filter(None, [part.__doc__ if part else "", told[item.name]]))
        yield f"| {key} | {_value(section.kind, item)} | {_default(item)} | {about} |"
    yield ""


def _value(kind: type, item: dataclasses.Field) -> str:
    """What a field takes, in words: its kind, its bounds or choices, and null where that is one."""
    kinds, bounds = kinds_of(kind, item.name), item.metadata
    if part_of(kind, item.name):
        words = "mapping"
    elif bounds and bounds["of"]:
        choices = ", ".join(f"`{choice}`" if choice else "empty" for choice in bounds["of"])
        words = f"some of {choices}" if kinds[0] is list else choices
    else:
        words = WORDS[kinds[0]] + _bounds(bounds)
    return f"{words}, or null" if types.NoneType in kinds else words


def _bounds(bounds: Any) -> str:
    if not bounds or bounds["low"] == -math.inf:
        return ""
    low, high = bounds["low"], bounds["high"]
    return f", at least {low:g}" if high == math.inf else f", {low:g} to {high:,}"


def _default(item: dataclasses.Field) -> str:
    if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
        return "required"
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    if dataclasses.is_dataclass(default):
        return "as there"
    return "empty" if default in ("", {}) else f"`{_yaml(default)}`"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def test_the_reference_is_what_the_dataclasses_say():
    assert PAGE.read_text("utf-8") == page(), "python tests/test_config_reference.py writes docs/config.md anew"


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.kind.__name__)
def test_every_part_and_every_field_says_what_it_is(section: Section):
    told = comments(SOURCE, section.kind.__name__)
    assert told.keys() == {item.name for item in dataclasses.fields(section.kind)}
    assert not section.kind.__doc__.startswith(f"{section.kind.__name__}("), "has no docstring"
    silent = [name for name, text in told.items() if not text and not part_of(section.kind, name)]
    assert not silent, f"no comment above {', '.join(silent)}"


def test_a_comment_is_that_of_its_field_alone():
    source = "class A:\n    # one,\n    # two\n    a: int = 1\n    b: int = 2\n\n    # three\n    c: int = 3\n"
    assert comments(source, "A") == {"a": "one, two", "b": "", "c": "three"}


def test_what_a_default_says_reads_back_as_the_default():
    """A configuration that gives every default of the page in so many words is the one that gives none."""
    given = ["dataset: {dataset_name: toy, dataset_version: v1}", "name: toy"]
    overrides = [
        f"{section.path}{item.name}={_default(item).strip('`')}"
        for section in sections()
        for item in dataclasses.fields(section.kind)
        if _default(item).startswith("`") and "lora" not in section.path
    ]
    assert len(overrides) > 40
    tree = config.parse_yaml("\n".join(given), "toy")
    plain = config.build(Config, tree, "toy")
    for override in overrides:
        config._apply(tree, override)
    assert config.build(Config, tree, "toy") == plain


if __name__ == "__main__":
    atomic_write(PAGE, page())
