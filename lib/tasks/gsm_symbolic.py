"""The worked answers of reasoning-gym's `gsm_symbolic`, read as steps, and the arithmetic in each of them worked out.

    worked = "She has enough icing for 15 * 6 = 90 cupcakes.\\nShe needs 90 / 24 = 3 baking sheets.\\n#### 3"
    steps(worked)           # ["She has enough icing for 15 * 6 = 90 cupcakes.", "She needs 90 / 24 = 3 baking sheets."]
    check(steps(worked)[1]) # StepCheck("equation", False, "90 / 24 = 3: the left side is 15/4", "false")
    why_not(worked, "3")    # "a false equation"

Word problems after GSM-Symbolic (arXiv:2410.05229): templates whose numbers are drawn, so that a worked answer which
held for the original numbers need not hold for the drawn ones. An equation is what stands beside a "=": to its left the
longest expression that ends there, to its right the longest that begins there, units left aside. It is true where both
sides are the same number, or the right one is a lone number, the left one rounded to the decimals that it has, and no
two currencies are mixed. Where the left side multiplies by 100, 25% is read as 25. What has a variable in it, such as
2x = 116, is not checked, nor what is part of more than is read here: a power, a root, a share as in 20% of 50 + 5, a
number with letters as 3.5km, in two parts as 3 1/2 or in words as 2 dozen, a time, or an operation in words.

A step is true where it holds an equation and all that it holds are true. One without says nothing that can be worked
out: it is neither true nor false.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from lib.tasks.steps import StepCheck

NAME = "gsm_symbolic"
END = "####"
BULLET = re.compile(r"^\s*(?:\d+\.|[•*-])\s+")
ITEM = re.compile(r"\n(?=\s*[•*-]\s)")  # whose bullet is no minus
FILLER = "Let's solve this step by step:"

WORDS = r"[A-Za-z][A-Za-z'-]*(?:\s+[A-Za-z][A-Za-z'-]*)*"
NUMBER = r"[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?"
GROUP = rf"\(\s*{NUMBER}(?:\s*[-+*/]\s*{NUMBER})*\s*\)"
EXPRESSION = rf"(?:{NUMBER}|{GROUP})(?:\s*[-+*/]\s*(?:{NUMBER}|{GROUP}))*"

# What is no unit, but changes the number before it: 3 million, 3 squared, 10 minus 2. Nor is 2 dozen one, where it is
# reckoned with; a result is often counted in dozens, as in 24 / 12 = 2 dozen.
CHANGE = r"(?i:(?:hundred|thousand|million|billion)s?|percent|squared|cubed|doubled|halved|plus|minus"
CHANGE += r"|(?:divided|multiplied) by|times(?=\s+[$€£\d(]))\b"
UNIT = rf"\s+(?!{CHANGE}|[Dd]ozens?\b){WORDS}"
ENDING = re.compile(rf"(?<![\w.,$€£)])({EXPRESSION})(?:{UNIT})?\s*$")

# What an expression is only a part of: before it, as in 2^3 + 1, 20% of 50 + 5, 1 1/2 + 1, 8:30 + 2, twice 4 + 1 and
# 10 + tax of 10 * 2; and after it, as in 3.5km, 3 1/2, 7 + T, 10:30 and 1/5 of 50. No part is 9 (left), nor 9 - so
# nine, nor 8 of the 10.
OF = r" of (?:[A-Za-z]+ ){0,2}"
OPERATION = r"\b(?i:times|plus|minus|by|twice|thrice|double|half|triple|quadruple)\s+"
PART = rf"[-+*/^√]\s*|[\d%] *|\d:|(?:[\d%]|\b(?:half|thirds?|quarters?|percent)){OF}|{OPERATION}"
BEFORE = re.compile(rf"(?:{PART}|(?:[\d%)]\s*|[A-Za-z]\s+)[-+*/]\s*{WORDS}\s*)$")
OPERAND = r"-?(?:[$€£]?\.?\d|\(|√|[A-Za-z]\b)"
AFTER = rf"[\w$€£]|[.,:]\d| *%| +\.?\d|\s*[-+*/^]+\s*{OPERAND}|\s*[+*/^]\s*[A-Za-z]|\s*\(\s*{OPERAND}"
AFTER += rf"|(?:(?<=%)|(?<=/\d)|(?<=/\d\d)){OF}[$€£]?\d| +{CHANGE}"
BEGINNING = re.compile(rf"\s*(-?(?>{EXPRESSION}))(?!{AFTER})")

# Each replaced in this order: a unit as in 5 kg/cow, signs of multiplication, division and subtraction, 2(3) and
# (2)(3), and what is counted, as in 5 large eggs + 3 and 5 eggs)
PLAIN = [(re.compile(pattern), text) for pattern, text in [
    (r"/\s*[A-Za-z]{2,}", ""), (r"\sx\s*(?=[$€£\d(])|\s?(?:[×·⋅]|\\times|\\cdot)\s*", " * "), (r"÷|\\div", "/"),
    ("\N{MINUS SIGN}", "-"), (rf"(?<=[\d%)])({UNIT})?\s*\N{{EN DASH}}\s*(?=[$€£\d(])", r"\1 - "),
    (r"(?<=\d)\(|(?<=\))\s*\(", " * ("), (rf"(?<=[\d%)]){UNIT}\s*(?=[-+*/]\s*[$€£\d(]|\))", " "),
]]  # fmt: skip


class Equation(NamedTuple):
    """Its two sides as they are written, without units."""

    left: str
    right: str

    def __str__(self) -> str:
        return f"{self.left} = {self.right}"


def steps(worked: str) -> list[str]:
    """The lines before `#### 7`, without numbers and bullets; a heading that ends in a colon goes to the next line."""
    found, heading = [], ""
    for line in worked.partition(END)[0].split("\n"):
        text = BULLET.sub("", line).strip()
        if text.endswith(":"):
            heading = "" if text == FILLER else f"{text} "
        elif text:
            found.append(heading + text)
            heading = ""
    return found


def check(step: str) -> StepCheck | None:
    """Whether every equation of a step is true; None where it holds none."""
    found = equations(step)
    wrong = [f"{equation}: {reason}" for equation in found if (reason := problem(equation))]
    if wrong:
        return StepCheck("equation", False, wrong[0], "false")
    return StepCheck("equation", True, "") if found else None


def check_steps(contents: list[str]) -> list[StepCheck]:
    """One check a step of a completion, which says nothing of those without an equation; none where none has any."""
    checks = [check(step) or StepCheck("words", None, "") for step in contents]
    return checks if any(check.correct is not None for check in checks) else []


def why_not(worked: str, answer: str) -> str:
    """Why a worked answer makes no trace; empty where it does.

    No equation may be false, and the answer must be what `####` says, and the result of one of the equations; where
    that is 25%, the answer may be 25.
    """
    found = [equation for step in steps(worked) for equation in equations(step)]
    if any(map(problem, found)):
        return "a false equation"
    told, final = (_number(text.strip()) for text in (worked.partition(END)[2], answer))
    if told is None or told != final:
        return "another answer at the end"
    results = {value(equation.right.replace("%", "")) for equation in found}
    return "" if final in results else "an answer that no equation gives"


def equations(step: str) -> list[Equation]:
    """Every equation of a step, in order, but those in which there is a variable, or no operation."""
    return [equation for item in ITEM.split(step) for equation in _equations(item)]


def _equations(text: str) -> list[Equation]:
    sides = [_plain(side) for side in text.split("=")]
    pairs = [(_ending(left), BEGINNING.match(right)) for left, right in zip(sides, sides[1:], strict=False)]
    found = [Equation(left, _result(left, right[1])) for left, right in pairs if left and right]
    return [equation for equation in found if re.search(r"[\d%)]\s*[-+*/]", str(equation))]


def problem(equation: Equation) -> str:
    """What is wrong with an equation; empty where it is true."""
    signs = sorted(set(re.findall("[$€£]", str(equation))))
    if len(signs) > 1:
        return f"mixes {' and '.join(signs)}"
    try:
        left, right = value(equation.left), value(equation.right)
    except ZeroDivisionError:
        return "divides by zero"
    decimals = re.fullmatch(r"-?[$€£]?[\d,]+\.(\d+)(%?)", equation.right)
    slack = Fraction(1, 2 * 10 ** len(decimals[1] + "00" * len(decimals[2]))) if decimals else 0
    return "" if abs(left - right) <= slack else f"the left side is {left}"


def value(expression: str) -> Fraction:
    """What an expression comes to: products before sums, and both from the left; it may begin with a minus."""
    return _sum(re.findall(rf"{NUMBER}|[-+*/()]", expression))


def _sum(tokens: list[str]) -> Fraction:
    total = Fraction() if tokens[0] == "-" else _product(tokens)
    while tokens and tokens[0] in "+-":
        total += _product(tokens) if tokens.pop(0) == "+" else -_product(tokens)
    return total


def _product(tokens: list[str]) -> Fraction:
    total = _operand(tokens)
    while tokens and tokens[0] in "*/":
        total *= _operand(tokens) if tokens.pop(0) == "*" else 1 / _operand(tokens)
    return total


def _operand(tokens: list[str]) -> Fraction:
    token = tokens.pop(0)
    if token != "(":
        return _number(token)
    total = _sum(tokens)
    tokens.pop(0)
    return total


def _number(text: str) -> Fraction | None:
    """`$1,250.50` → 2501/2, `25%` → 1/4; None where it is none."""
    if not re.fullmatch(rf"-?{NUMBER}", text):
        return None
    number = Fraction(text.strip("$€£%").replace(",", ""))
    return number / 100 if text.endswith("%") else number


def _plain(text: str) -> str:
    """`25 girls x 4 boys/girl` → `25 * 4 boys`."""
    for pattern, plain in PLAIN:
        text = pattern.sub(plain, text)
    return text


def _result(left: str, right: str) -> str:
    """`25%` → `25` where the left side, as (10 / 40) * 100, has made it a percentage; any other right side as it is."""
    hundredfold = "%" not in left and re.search(r"\*\s*100(?![\d.,])|(?<![\d.,$€£])100\s*\*", left)
    return right.removesuffix("%") if hundredfold and re.fullmatch(rf"-?{NUMBER}", right) else right


def _ending(text: str) -> str:
    """The longest expression that ends the text, a unit aside; empty where what stands before it belongs to it."""
    found = ENDING.search(text)
    return found[1] if found and not BEFORE.search(text[: found.start()]) else ""
