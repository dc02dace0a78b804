r"""Where the reasoning of a free text ends and its answer begins: the one place that says so.

    split_completion("48/2 = <<48/2=24>>24 clips\n48+24 = 72 clips\n#### 72")
    # Reasoning(steps=["48/2 = 24 clips", "48+24 = 72 clips"], answer="72")

The answer is looked for in the last line that is not blank, by these rules, of which the first that fits counts:

    Answer: 72               also `Final answer: 72`, and with ** around it; after our own `Reasoning:` and `1. …`
                             it may run over several lines
    #### 72                  as in GSM8K (arXiv 2110.14168), whose calculator marks such as <<48/2=24>> are left out
    The answer is 72.        also after `So`, `Thus`, `Hence`, `Therefore`, and at the end of a paragraph
    … is \boxed{72}.         as in MATH (arXiv 2103.03874); a line that says more than the box is a step, too
    <think>…</think> 72      what comes after the thinking, where that is one line and none of the above

Steps are the lines before, blanks at their ends and blank lines left out: a paragraph is one step. Where they are
numbered throughout (`1.`, `2)`, `Step 3:`), the numbers are left out, as rendering writes them anew. A text with no
answer by these rules, or with no step before it, is refused: nothing is guessed.
"""

import re
from typing import NamedTuple

from lib.data.renderer import parse_response, render_response

ANSWER_EXPECTED = r"the answer on the last line, as `#### 72`, `Answer: 72`, `The answer is 72.` or `\boxed{72}`"
STEPS_EXPECTED = "at least one line of reasoning before the answer"


class Reasoning(NamedTuple):
    """The steps of a text, and the answer that they lead to."""

    steps: list[str]
    answer: str


def split_completion(text: str) -> Reasoning:
    """The steps and the answer of what a model or a person wrote. Raises ValueError with what was expected."""
    steps, answer = parse_response(text)
    if steps and answer and render_response(steps, answer) == text:
        return Reasoning(steps, answer)
    thinking = _THINKING.fullmatch(text)
    said = _lines(thinking["rest"] if thinking else text)
    if not said:
        raise ValueError(ANSWER_EXPECTED)
    before, answer = _split_last(said[-1], alone=bool(thinking) and len(said) == 1)
    steps = [*_lines(thinking["thought"] if thinking else ""), *said[:-1], *before]
    if _HASHES.fullmatch(said[-1]):
        steps = [_CALCULATED.sub("", step).strip() for step in steps]
    steps = _without_numbers([step for step in steps if step])
    if not steps:
        raise ValueError(STEPS_EXPECTED)
    return Reasoning(steps, answer)


def split_steps(text: str) -> list[str]:
    """The steps of a text that holds nothing else: its lines, without their numbers."""
    return _without_numbers(_lines(text))


_THINKING = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<rest>.*)", re.DOTALL)
_HASHES = re.compile(r"####\s*(?P<answer>[^#\s].*)")
_CALCULATED = re.compile(r"<<[^<>]*=[^<>]*>>")
_LABELLED = re.compile(r"(?:\*\*|__)?(?:final )?answer(?:\*\*|__)?:(?:\*\*|__)?\s*(?P<answer>.+)", re.IGNORECASE)
_SENTENCE = re.compile(
    r"(?P<before>(?:.*[.!?;,])?)(?:^|\s+)(?:(?:so|thus|hence|therefore),?\s+)?"
    r"the (?:final )?answer is:?\s+(?P<answer>.+)",
    re.IGNORECASE,
)
_CONNECTIVES = ("so,", "thus,", "hence,", "therefore,")
_MORE = re.compile(r"[.!?]\s")
_NUMBERED = re.compile(r"(?:step\s+)?(?P<number>\d{1,4})[.):]\s+(?P<step>.+)", re.IGNORECASE)


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if line]


def _split_last(line: str, alone: bool) -> tuple[list[str], str]:
    """What the last line says before the answer, and the answer; all of it where it stands `alone` after thinking."""
    if match := _LABELLED.fullmatch(line) or _HASHES.fullmatch(line):
        return [], _bare(match["answer"])
    if (match := _SENTENCE.fullmatch(line)) and not _MORE.search(match["answer"]):
        before = "" if match["before"].lower() in _CONNECTIVES else match["before"]
        return [before], _bare(match["answer"].removesuffix("."))
    if answer := _boxed(line):
        return ([] if line.strip("$. ") == f"\\boxed{{{answer}}}" else [line]), answer
    if alone:
        return [], line
    raise ValueError(ANSWER_EXPECTED)


def _bare(answer: str) -> str:
    """The answer without what only sets it off: asterisks, of which the first may stand before a label, or a box."""
    for mark in ("**", "__"):
        if answer.count(mark) == 1:
            answer = answer.removesuffix(mark)
        if answer.startswith(mark) and answer.endswith(mark) and len(answer) > 2 * len(mark):
            answer = answer.removeprefix(mark).removesuffix(mark)
    boxed = _boxed(answer)
    return boxed if boxed and answer.strip("$. ") == f"\\boxed{{{boxed}}}" else answer.strip()


def _boxed(line: str) -> str:
    r"""What stands in the last `\boxed{…}` of the line, braces in pairs; empty where there is none."""
    _, found, rest = line.rpartition("\\boxed{")
    depth = 1
    for at, letter in enumerate(rest if found else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:at].strip()
    return ""


def _without_numbers(steps: list[str]) -> list[str]:
    if len(steps) > 1 and steps[0] == "Reasoning:":
        steps = steps[1:]
    matches = [_NUMBERED.fullmatch(step) for step in steps]
    if all(match and int(match["number"]) == place for place, match in enumerate(matches, 1)):
        return [match["step"] for match in matches]
    return steps
