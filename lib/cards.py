"""How the main objects show themselves in a notebook: a title over a few facts, in one look, on light and on dark.

    card("Trace 7c2f1a09", {"question": "2+2?", "steps": ["2+2=4"], "answer": "4"})    # '<div …><strong>Trace …'

Whatever stands in a fact is text: escaped, and with a sign for each character that would be obeyed and not seen.
A list is shown as numbered lines, an object as `key value` pairs. Nothing but the standard library is needed, so that
a trace can show itself wherever it is.
"""

import unicodedata
from collections.abc import Mapping
from html import escape
from typing import Any

LONGEST = 600  # characters of a text that are shown; a card is for a glance
LINES = 12  # lines of a list

_BOX = "border: 1px solid #8a94a6; border-radius: 6px; padding: 8px 12px; display: inline-block; max-width: 60em"
_BOX += "; line-height: 1.5"
_NAME = "text-align: left; vertical-align: top; font-weight: normal; opacity: 0.75; padding: 2px 16px 2px 0"
_NAME += "; white-space: nowrap"
_VALUE = "text-align: left; vertical-align: top; padding: 2px 0; white-space: pre-wrap"


def card(title: str, facts: Mapping[str, Any], lines: int = LINES) -> str:
    """The HTML of a card, of a list at most so many `lines`; what is empty or None is left out."""
    rows = "".join(
        f'<tr><th scope="row" style="{_NAME}">{_text(name)}</th><td style="{_VALUE}">{_value(fact, lines)}</td></tr>'
        for name, fact in facts.items()
        if fact not in (None, "", [], {}, ())
    )
    table = f'<table style="border-collapse: collapse; margin: 4px 0"><tbody>{rows}</tbody></table>'
    return f'<div style="{_BOX}"><strong>{_text(title)}</strong>{table}</div>'


def brief(text: str, length: int = 60) -> str:
    """One line of at most `length` characters, none of them obeyed: what stands in a `repr`."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= length else f"{line[: length - 1]}…"


def visible(text: str) -> str:
    """The text with a sign for each character that a terminal or a reader's eye obeys: `\\x1b[2J` is read as `␛[2J`."""
    return "".join(_sign(letter) if unicodedata.category(letter) in ("Cc", "Cf", "Cs") else letter for letter in text)


def _sign(letter: str) -> str:
    if letter in "\t\n":
        return letter
    return chr(0x2400 + ord(letter)) if ord(letter) < 0x20 else "\N{REPLACEMENT CHARACTER}"


def _value(fact: Any, most: int) -> str:
    if isinstance(fact, Mapping):
        pairs = [f"{_text(str(key))} {_text(str(value))}" for key, value in fact.items() if value not in (None, "")]
        return ", ".join(pairs[:most])
    if isinstance(fact, list | tuple):
        lines = [f"{number}. {_text(_indented(str(line)))}" for number, line in enumerate(fact[:most], 1)]
        return "\n".join([*lines, f"… and {len(fact) - most} more"] if len(fact) > most else lines)
    return _text(f"{fact:,}" if type(fact) is int else str(fact))


def _indented(line: str) -> str:
    """What goes on after the first line, behind it."""
    return line.replace("\n", "\n    ")


def _text(text: str) -> str:
    return escape(visible(text if len(text) <= LONGEST else f"{text[:LONGEST]}…"))
