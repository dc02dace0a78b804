"""From a completion to a score: find the answer, compare it with the expected one, say why.

    completion = "Reasoning:\\n1. Queen is 12, seven is 7\\n2. 12 > 7\\nAnswer: **Win**."
    extract_answer(completion)                       # "Win."
    reasoning_steps(completion)                      # ["Queen is 12, seven is 7", "12 > 7"]
    score(completion, "win", truncated=False).value  # 1

The answer is the rest of the last line that starts with "Answer:" or "Final answer:" (bold or as a heading, too); if
that line is empty there is none. Where no line starts so, it is what the last \\boxed{} holds. Nothing else is taken
for an answer: not "The answer is 7", not the last number.

An expected answer may list alternatives, "CO2 | carbon dioxide"; all of the answer must match one of them, in one of
these ways, of which an item may name one as its `scorer`:

exact     The same text, once case, runs of whitespace, surrounding quotes, brackets, markdown and punctuation, LaTeX's
          wrapping (\\boxed, \\text, $…$) and a leading "the", "a" or "an" are set aside; the "a" of "a b c" and
          "a and b" is a letter. "1.0" is not "1".
number    The same number and unit, by the rule of lib.evaluation.numbers; within the item's `tolerance`, if it has one.
set       The same elements in any order, each once: what commas, semicolons, "and" and "&" separate, each compared as
          text or number. Every comma separates: in a set, 1234 is written without one.
""        No scorer named: the same text or the same number.

An item of reasoning-gym (scorer `reasoning_gym`) is judged by the verifier of the generator that made it: correct is
what it gives exactly 1, and any less, which some give to an answer that is half right, is wrong. Where the verifier
itself fails on an answer, that is no word on the answer: it is unscored, and the reason is kept.

An answer that cannot be found is unscored, and one cut off by the token limit is truncated: neither is wrong,
neither has a value, and reports count both. (Score with its explanation: UK AISI, inspect_ai.)
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal, NamedTuple

from lib.errors import RequestError
from lib.evaluation.evalsets import EvalItem
from lib.evaluation.numbers import same_number
from lib.tasks import reasoning_gym

SCORERS = ("", "exact", "number", "set")
ALTERNATIVES = " | "

REASONING = re.compile(r"^[ \t]*(?:\*\*)?reasoning(?:\*\*)?:(?:\*\*)?", re.IGNORECASE | re.MULTILINE)
ANSWER = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]+)?(?:\*\*)?(?:final[ \t]+)?answer(?:\*\*)?:(.*)$", re.IGNORECASE | re.MULTILINE
)
STEP = re.compile(r"[ \t]*(\d+)\.[ \t]+(\S.*)")
BOLD = re.compile(r"(?<!\w)\*\*(\S[^*]*)\*\*(?!\w)")
BOXED = "\\boxed{"

# What may surround an answer without being part of it. No leading dot: ".5" is a half. No currency: "$5" is not "€5".
LEADING = " \"'`*_“”‘’«»,;:!?()[]{}"
TRAILING = LEADING + "."
# No article is the first of several letters, as in "a b c" and "a and b".
ARTICLE = re.compile(r"^(?:the|an|a(?! (?:[^\W\d]|and|or)\b)) ")
SEPARATOR = re.compile(r"[,;&]|\band\b", re.IGNORECASE)

# LaTeX that says how to set an answer, not what it is; each replaced in this order.
LATEX = [(re.compile(pattern), text) for pattern, text in [
    (r"\\(?:text|textbf|mathrm|mathbf|boxed) ?\{([^{}]*)\}", r"\1"),
    (r"\\[dt]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r" \1/\2"),
    (r"\\(?:text|textbf|mathrm|mathbf|boxed) ?\{([^{}]*)\}", r"\1"),  # what held a fraction
    (r"^\$+([^$]*[^$\\])\$+(?=\.?$)", r"\1"),
    (r"\\[()\[\]]|\\left|\\right|\\[,;!]", ""),
    (r"\{,\}", ","), (r"\\ |~", " "), (r"\\([%$])", r"\1"),
    (r"\\times|\\cdot", "×"), (r"\^ ?\{? ?\\circ ?\}?", "°"), (r"\\pi\b", "π"),
]]  # fmt: skip
LONGEST_LATEX = 1000


class Score(NamedTuple):
    # 1 correct, 0 wrong, None where there is nothing to judge
    value: int | None
    verdict: Literal["correct", "wrong", "unscored", "truncated"]
    answer: str | None
    explanation: str


def extract_answer(completion: str) -> str | None:
    """The answer by the rule above, without markdown bold; None where there is none."""
    found = _last_answer(completion)
    if found is None:
        return _last_boxed(completion)
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


def check_scorers(items: Iterable[EvalItem]) -> None:
    """Raises RequestError where answers to these items could not be scored here: better before a model gives them."""
    item = next((item for item in items if item.scorer == reasoning_gym.NAME), None)
    if item is not None:
        reasoning_gym.check_entry(item.prompt, item.expected_answer, item.state)


def score_item(item: EvalItem, completion: str, truncated: bool) -> Score:
    """Judge one completion by the scorer of its item; see `score`."""
    if item.scorer != reasoning_gym.NAME:
        return score(completion, item.expected_answer, truncated, item.scorer, item.tolerance)
    answer = extract_answer(completion)
    if truncated or answer is None:
        return _not_judged(truncated)
    given, reason = reasoning_gym.verify(item.prompt, item.expected_answer, item.state, answer)
    if given is None:
        return Score(None, "unscored", answer, reason)
    said = f"the verifier of {item.state['generator']} gives {answer!r} {given:g}"
    return Score(1, "correct", answer, said) if given == 1 else Score(0, "wrong", answer, said)


def score(completion: str, expected: str, truncated: bool, scorer: str = "", tolerance: float = 0.0) -> Score:
    """Judge one completion; `truncated` says that it met the token limit before its end-of-turn token.

    `scorer` and `tolerance` are the item's. Raises RequestError for a scorer that is not known.
    """
    if scorer not in SCORERS:
        raise RequestError(f"scorer: expected one of {', '.join(map(repr, SCORERS))}, got {scorer!r}")
    answer = extract_answer(completion)
    if truncated or answer is None:
        return _not_judged(truncated)
    for alternative in expected.split(ALTERNATIVES):
        if how := _same(answer, alternative, scorer, tolerance):
            return Score(1, "correct", answer, f"{answer!r} is the expected {how} {alternative!r}")
    return Score(0, "wrong", answer, f"{answer!r} is not the expected {expected!r}")


def is_answer(text: str, expected: str, scorer: str, tolerance: float = 0.0) -> bool:
    """Whether this answer is one of the alternatives that are expected. What only a verifier can compare is compared as
    text."""
    how = "exact" if scorer == reasoning_gym.NAME else scorer
    return any(_same(text, alternative, how, tolerance) for alternative in expected.split(ALTERNATIVES))


def merged(answers: Iterable[str | None], scorer: str) -> list[str | None]:
    """Each of several answers to an item as the first of them that says the same, by the item's scorer; None stays.

    `["12", "13", "12.0", None]` → `["12", "13", "12", None]`. What only a verifier can compare is compared as text.
    """
    how = "exact" if scorer == reasoning_gym.NAME else scorer
    found: list[str | None] = []
    for answer in answers:
        text = None if answer is None else normalised(answer)
        same = [one for one in found if one and text and (one == text or _same(text, one, how, 0.0))]
        found.append(same[0] if same else text)
    return found


def _not_judged(truncated: bool) -> Score:
    if truncated:
        return Score(None, "truncated", None, "generation met its token limit before the turn ended")
    return Score(None, "unscored", None, "no line starts with 'Answer:' and goes on, and nothing is boxed")


def _same(answer: str, expected: str, scorer: str, tolerance: float) -> str:
    """How the two are the same: as a text, number or set; empty where they are not."""
    if scorer == "set":
        return "set" if _same_set(answer, expected, tolerance) else ""
    if scorer != "number" and normalised(answer) == normalised(expected):
        return "text"
    if scorer != "exact" and same_number(normalised(answer), normalised(expected), tolerance):
        return "number"
    return ""


def _same_set(answer: str, expected: str, tolerance: float) -> bool:
    """Each element of the answer takes the first expected one that is the same and not taken; none is left."""
    left = _elements(expected)
    for element in _elements(answer):
        same = next((other for other in left if _same(element, other, "", tolerance)), None)
        if same is None:
            return False
        left.remove(same)
    return not left


def _elements(text: str) -> list[str]:
    """`{red, blue, and green}` → [red, blue, green]."""
    return [part for part in map(normalised, SEPARATOR.split(_strip(_without_latex(text)))) if part]


def _last_answer(completion: str) -> re.Match[str] | None:
    found = list(ANSWER.finditer(completion))
    return found[-1] if found else None


def _last_boxed(completion: str) -> str | None:
    """What the last \\boxed{} holds, its braces balanced."""
    start = completion.rfind(BOXED)
    depth = 1
    for i in range(start + len(BOXED), len(completion) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(completion[i], 0)
        if depth == 0:
            return completion[start + len(BOXED) : i].strip() or None
    return None


def normalised(text: str) -> str:
    """As `exact` compares it: `' The  **Pacific**. '` becomes `'pacific'`."""
    text = unicodedata.normalize("NFC", _without_latex(text)).casefold().replace("\N{MINUS SIGN}", "-")
    whole = " ".join(text.split())
    bare = _strip(ARTICLE.sub("", _strip(whole), count=1))
    return bare or whole


def _without_latex(text: str) -> str:
    """`$\\boxed{\\frac{1}{2}}$` → ` 1/2`."""
    if len(text) <= LONGEST_LATEX and ("\\" in text or "$" in text):
        text = text.strip()
        for pattern, plain in LATEX:
            text = pattern.sub(plain, text)
    return text


def _strip(text: str) -> str:
    return text.lstrip(LEADING).rstrip(TRAILING)
