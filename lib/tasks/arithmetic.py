"""Arithmetic: sums, and products with one digit, column by column. Our own engine, and the truth of every step.

Episode i of seed s is drawn by `random.Random(s + i)`: first one of `CATEGORIES`, then its two numbers. The digits of
a number are written apart, so that each is a token of its own and a column can be copied. A trace of it reads:

    Arithmetic: what is 3 4 7 plus 1 8 5?
    1. First: hundreds 3 tens 4 units 7.
    2. Second: hundreds 1 tens 8 units 5.
    3. units: 7 plus 5 plus 0 is 12, carry 1, result 2.
    4. tens: 4 plus 8 plus 1 is 13, carry 1, result 3 2.
    5. hundreds: 3 plus 1 plus 1 is 5, carry 0, result 5 3 2.
    6. Last carry 0, result 5 3 2.
    Answer: 5 3 2

and a column of 3 4 7 times 6 reads `tens: 4 times 6 is 24, plus 4 is 28, carry 2, result 8 2.` Each step makes claims,
which `check_steps` reads back out of its text and compares with the engine's, which knows nothing but the state.
"""

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from lib.tasks.steps import StepCheck, check_claims, verify_trace
from lib.trace import Trace, make_trace

NAME = "arithmetic"
PLACES = ["units", "tens", "hundreds", "thousands"]
WORDS = {"+": "plus", "*": "times"}


class Category(NamedTuple):
    """Problems of one kind: numbers of so many digits, to add two of, or to multiply by 2 to 9."""

    operator: str
    digits: int

    def __str__(self) -> str:
        return f"{self.digits}-digit " + ("addition" if self.operator == "+" else "by 1-digit multiplication")


class Problem(NamedTuple):
    """Everything there is to know about an episode."""

    a: int
    operator: str
    b: int

    @property
    def result(self) -> str:
        """The answer, its digits apart."""
        return apart(self.a + self.b if self.operator == "+" else self.a * self.b)


CATEGORIES = [Category("+", 2), Category("+", 3), Category("+", 4), Category("*", 3), Category("*", 4)]

# Each kind of step: how it is written, and what it claims; a column's kind is its place.
_PLACE = f"(?:{'|'.join(PLACES)}) [0-9]+"
_DIGITS = f"(?P<digits>{_PLACE}(?: {_PLACE})*)"
_WRITTEN = r"carry (?P<carry>[0-9]+), result (?P<result>[0-9]+(?: [0-9]+)*)\."
_ADDED = "(?P<a>[0-9]+) plus (?P<b>[0-9]+) plus (?P<carried>[0-9]+) is (?P<total>[0-9]+), "
_MULTIPLIED = (
    "(?P<a>[0-9]+) times (?P<b>[0-9]+) is (?P<product>[0-9]+), plus (?P<carried>[0-9]+) is (?P<total>[0-9]+), "
)
_AROUND = {"first": rf"First: {_DIGITS}\.", "second": rf"Second: {_DIGITS}\.", "last_carry": f"Last {_WRITTEN}"}
_STEPS = {
    operator: _AROUND | {place: f"{place}: {column}{_WRITTEN}" for place in PLACES}
    for operator, column in [("+", _ADDED), ("*", _MULTIPLIED)]
}


def apart(number: int) -> str:
    """347 → `3 4 7`."""
    return " ".join(str(number))


def problem(seed: int) -> Problem:
    """The problem of the episode with this seed."""
    source = random.Random(seed)
    return draw(source.choice(CATEGORIES), source)


def draw(category: Category, source: random.Random) -> Problem:
    """A problem of this category."""
    low, high = 10 ** (category.digits - 1), 10**category.digits - 1
    a, b = source.randint(low, high), source.randint(*((low, high) if category.operator == "+" else (2, 9)))
    return Problem(a, category.operator, b)


def generate(count: int, seed: int, created_at: str = "") -> Iterator[Trace]:
    """`count` traces: episode i is drawn with seed `seed + i`."""
    for index in range(count):
        episode = problem(seed + index)
        meta = {"source": "builtin", "game": NAME, "seed": seed, "episode_index": index, "state": state_of(episode)}
        yield make_trace(question(episode), steps(episode), episode.result, meta, created_at=created_at)


def question(episode: Problem) -> str:
    return f"Arithmetic: what is {apart(episode.a)} {WORDS[episode.operator]} {apart(episode.b)}?"


def steps(episode: Problem) -> list[tuple[str, str]]:
    """(type, content) of each step of the true reasoning."""
    return [_step(kind, claims) for kind, claims in truth(episode).items()]


def _step(kind: str, claims: dict[str, str]) -> tuple[str, str]:
    if kind in ("first", "second"):
        return "digits", f"{kind.title()}: {claims['digits']}."
    written = f"carry {claims['carry']}, result {claims['result']}."
    if kind == "last_carry":
        return "carry", f"Last {written}"
    a, b, carried, total = (claims[name] for name in ("a", "b", "carried", "total"))
    if "product" in claims:
        return "column", f"{kind}: {a} times {b} is {claims['product']}, plus {carried} is {total}, {written}"
    return "column", f"{kind}: {a} plus {b} plus {carried} is {total}, {written}"


def truth(episode: Problem) -> dict[str, dict[str, str]]:
    """What each kind of step must claim, worked out digit by digit; the shorter number of an addition begins with 0."""
    adds = episode.operator == "+"
    width = max(len(str(episode.a)), len(str(episode.b)))
    a = _digits(episode.a, width)
    b = _digits(episode.b, width) if adds else [episode.b] * width
    claims = {"first": {"digits": _placed(a)}}
    if adds:
        claims["second"] = {"digits": _placed(b)}
    carry, result = 0, ""
    for place, x, y in zip(PLACES, a, b, strict=False):
        column = {"a": str(x), "b": str(y), "carried": str(carry)}
        if not adds:
            column["product"] = str(x * y)
        total = (x + y if adds else x * y) + carry
        carry, result = total // 10, f"{total % 10} {result}".strip()
        claims[place] = column | {"total": str(total), "carry": str(carry), "result": result}
    claims["last_carry"] = {"carry": str(carry), "result": f"{carry} {result}" if carry else result}
    return claims


def state_of(episode: Problem) -> dict[str, str]:
    """The state from which every step can be checked, as kept in `meta` and in an eval set."""
    return {"a": str(episode.a), "operator": episode.operator, "b": str(episode.b)}


def episode_of(state: dict[str, str]) -> Problem:
    """The problem of a state. Raises ValueError where it is not one of this task."""
    values = [state.get(name) if isinstance(state, dict) else None for name in ("a", "operator", "b")]
    written = " ".join(values) if all(isinstance(value, str) for value in values) else ""
    if not re.fullmatch(r"[1-9][0-9]{0,3} (\+ [1-9][0-9]{0,3}|\* [1-9])", written) or len(state) != 3:
        raise ValueError(
            "expected numbers of up to four digits (to multiply by: of one) such as "
            f"{{'a': '347', 'operator': '+', 'b': '85'}}, got {str(state)[:80]}"
        )
    return Problem(int(values[0]), values[1], int(values[2]))


def canonical(state: dict[str, str]) -> dict[str, str]:
    """What two states of the same question have in common: a + b is b + a, so the larger number goes first.

    What stands beside it in a state is left aside; a state that is none of this task is what it is.
    """
    try:
        a, operator, b = episode_of({name: state[name] for name in ("a", "operator", "b")})
    except (KeyError, TypeError, ValueError):
        return state
    return {"a": str(max(a, b)), "operator": operator, "b": str(min(a, b))}


def check_steps(state: dict[str, str], contents: list[str]) -> list[StepCheck]:
    """One check a step, in order; a step that is missing at the end counts as wrong."""
    episode = episode_of(state)
    return check_claims(_STEPS[episode.operator], truth(episode), contents)


def verify(trace: Trace) -> str:
    """Why this trace is not what the engine would have written; empty where it is."""
    return verify_trace(trace, episode_of, problem, question, check_steps)


def _digits(number: int, width: int) -> list[int]:
    """The digits, units first: (85, 3) → [5, 8, 0]."""
    return [number // 10**place % 10 for place in range(width)]


def _placed(digits: list[int]) -> str:
    """[7, 4, 3] → `hundreds 3 tens 4 units 7`."""
    return " ".join(f"{place} {digit}" for place, digit in reversed(list(zip(PLACES, digits, strict=False))))
