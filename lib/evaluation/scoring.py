"""From a completion to a score: find the answer, compare it with the expected one, say why.

    completion = "Reasoning:\\n1. Queen is 12, seven is 7\\n2. 12 > 7\\nAnswer: **Win**."
    extract_answer(completion)                       # "Win."
    reasoning_steps(completion)                      # ["Queen is 12, seven is 7", "12 > 7"]
    score(completion, "win", truncated=False).value  # 1

The rule, whole. An expected answer may list alternatives, "CO2 | carbon dioxide"; one must be matched by
all of the answer, in one of two ways:

1. The same text, once case, runs of whitespace, surrounding quotes, brackets, markdown, currency signs and
   punctuation, and a leading "the", "a" or "an" are set aside.
2. The same number: an integer, decimal or simple fraction (3/4 equals 0.75), after removing thousands
   commas and a currency sign. Whole numbers must be equal; others within a relative 1e-6. One trailing unit
   ("cm", "square metres", "km/h") may be present or missing on either side; where both have one, it
   must be the same but for a plural s. Percent is no such unit: 75% equals 75 percent, never 75 or 0.75.
   "3 million", "2 thirds" and "4 pi" are not read as numbers.

An answer that cannot be found is unscored, and one cut off by the token limit is truncated: neither is wrong,
neither has a value, and reports count both. (Score with its explanation: UK AISI, inspect_ai.)
"""

import re
import unicodedata
from fractions import Fraction
from typing import Literal, NamedTuple

REASONING = re.compile(r"^[ \t]*(?:\*\*)?reasoning(?:\*\*)?:(?:\*\*)?", re.IGNORECASE | re.MULTILINE)
ANSWER = re.compile(r"^[ \t]*(?:\*\*)?answer(?:\*\*)?:(.*)$", re.IGNORECASE | re.MULTILINE)
STEP = re.compile(r"[ \t]*(\d+)\.[ \t]+(\S.*)")
BOLD = re.compile(r"(?<!\w)\*\*(\S[^*]*)\*\*(?!\w)")

# What may surround an answer without being part of it. No leading dot: ".5" is a half.
LEADING = " \"'`*_“”‘’«»,;:!?()[]{}$€£¥"
TRAILING = LEADING + "."
ARTICLE = re.compile(r"^(?:the|an?) ")

NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?[$€£¥]? ?"
    r"(?P<digits>[0-9]+ ?/ ?[0-9]+"  # 3/4
    r"|(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:e[-+]?[0-9]{1,2})?"  # 1,234.5 or 12 or 6e23
    r"|\.[0-9]+)"  # .5
    r" ?(?P<unit>%|°[cf]?|(?:(?:square|cubic|sq) )?[^\W\d_]+[²³]?(?:/[^\W\d_]+[²³]?)?|)"
)
LONGEST_NUMBER = 60
# Words that change a number's value: what precedes them is not the whole number.
MULTIPLIERS = {"hundred", "thousand", "million", "billion", "trillion", "dozen"}
MULTIPLIERS |= {"half", "halve", "third", "quarter", "fifth", "sixth", "eighth", "tenth", "hundredth", "thousandth"}
MULTIPLIERS |= {"ten", "k", "mn", "bn", "squared", "cubed", "x", "pi", "π"}
TOLERANCE = Fraction(1, 10**6)


class Score(NamedTuple):
    # 1 correct, 0 wrong, None where there is nothing to judge
    value: int | None
    verdict: Literal["correct", "wrong", "unscored", "truncated"]
    answer: str | None
    explanation: str


class Number(NamedTuple):
    value: Fraction
    unit: str


def extract_answer(completion: str) -> str | None:
    """What follows `Answer:` on the last line that starts so, without markdown bold; None where empty."""
    found = _last_answer(completion)
    if found is None:
        return None
    text = BOLD.sub(r"\1", found[1]).strip()
    return text.removeprefix("**").removesuffix("**").strip() or None


def reasoning_steps(completion: str) -> list[str]:
    """The steps numbered 1, 2, 3 … between `Reasoning:` and the last `Answer:`.

    Any other line continues the step above it, so a step of several lines comes back whole; what precedes
    step 1 is no step.
    """
    start, end = REASONING.search(completion), _last_answer(completion)
    if start is None:
        return []
    steps: list[str] = []
    for line in completion[start.end() : end.start() if end else None].split("\n"):
        match = STEP.fullmatch(line)
        if match and match[1] == str(len(steps) + 1):
            steps.append(match[2])
        elif steps:
            steps[-1] += "\n" + line
    return [step.strip() for step in steps]


def score(completion: str, expected: str, truncated: bool) -> Score:
    """Judge one completion; `truncated` says that it met the token limit before its end-of-turn token."""
    if truncated:
        return Score(None, "truncated", None, "generation met its token limit before the turn ended")
    answer = extract_answer(completion)
    if answer is None:
        return Score(None, "unscored", None, "no line starts with 'Answer:' and goes on")
    for alternative in expected.split(" | "):
        if _normalise(answer) == _normalise(alternative):
            return Score(1, "correct", answer, f"{answer!r} is the expected text {alternative!r}")
        if _same_number(answer, alternative):
            return Score(1, "correct", answer, f"{answer!r} is the expected number {alternative!r}")
    return Score(0, "wrong", answer, f"{answer!r} is not the expected {expected!r}")


def _last_answer(completion: str) -> re.Match[str] | None:
    found = list(ANSWER.finditer(completion))
    return found[-1] if found else None


def _normalise(text: str) -> str:
    """Rule 1: `' The  **Pacific**. '` becomes `'pacific'`."""
    text = unicodedata.normalize("NFC", text).casefold().replace("\N{MINUS SIGN}", "-")
    whole = " ".join(text.split())
    bare = _strip(ARTICLE.sub("", _strip(whole), count=1))
    return bare or whole


def _strip(text: str) -> str:
    return text.lstrip(LEADING).rstrip(TRAILING)


def _same_number(answer: str, expected: str) -> bool:
    """Rule 2."""
    got, want = _number(answer), _number(expected)
    if got is None or want is None:
        return False
    one_unit_may_be_missing = "%" not in (got.unit, want.unit) and "" in (got.unit, want.unit)
    if got.unit != want.unit and not one_unit_may_be_missing:
        return False
    if got.value.denominator == want.value.denominator == 1:
        return got.value == want.value
    return abs(got.value - want.value) <= TOLERANCE * max(abs(got.value), abs(want.value))


def _number(text: str) -> Number | None:
    text = _normalise(text)
    match = NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if match is None or _singular(match["unit"]) in MULTIPLIERS:
        return None
    try:
        value = Fraction(match["sign"] + match["digits"].replace(",", "").replace(" ", ""))
    except ZeroDivisionError:
        return None
    return Number(value, _singular(match["unit"]))


def _singular(unit: str) -> str:
    if unit in ("percent", "%"):
        return "%"
    return unit.removesuffix("s") if len(unit) > 1 else unit
