"""Eval items from any generator of reasoning-gym, each proved before it is asked: the truth is correct, another is not.

    made = reasoning_gym_items("basic_arithmetic", {"max_terms": 3}, count=100, seed=42)
    made.items[0].prompt       # "Calculate …"
    made.left_out              # Counter({"its question was drawn before": 3})

An item whose own answer, written as a model would write it, is not found by our extractor or not accepted by the
generator's verifier would count a perfect model wrong; one whose verifier also accepts the answer to another question,
or "unknown", would count a poor model right. Both are left out, and counted with their reason.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from lib.errors import RequestError, RetraceError
from lib.evaluation.evalsets import EvalItem
from lib.evaluation.scoring import extract_answer, score, score_item
from lib.tasks import group_keys, gsm_symbolic, reasoning_gym
from lib.tasks.reasoning_gym import Drawn, NotDrawn

LONGEST = 50_000  # characters of a question or an answer, as in a trace
NONSENSE = "unknown"
DRAWS = 2  # for each item asked for: where more than half are left out, what is left is no fair sample of the generator


class Made(NamedTuple):
    """Items, from how many draws they come, and why the others make none."""

    items: list[EvalItem]
    draws: int
    left_out: Counter[str]


class Unsound(RetraceError):
    """Why an entry makes no item."""


def reasoning_gym_items(generator: str, options: Mapping[str, Any], count: int, seed: int) -> Made:
    """The first `count` sound items of a generator with a seed. Raises RequestError where fewer than half are."""
    reasoning_gym.check_options(generator, options)
    made = sound_items(
        [reasoning_gym.state_of(generator, options, seed, DRAWS * count, index) for index in range(DRAWS * count)],
        count,
    )
    if len(made.items) < count:
        reasons = "; ".join(f"{number} of them: {reason}" for reason, number in made.left_out.most_common())
        raise RequestError(
            f"{generator}: {made.draws} draws hold {len(made.items)} sound items, not {count} ({reasons}); "
            "take another generator or other options, or where questions repeat, fewer items"
        )
    if changed := not_again(made.items):
        raise RequestError(f"{changed[0]}: made again, it is another one; take another generator, seed or options")
    return made


def sound_items(states: Sequence[dict[str, str]], count: int) -> Made:
    """The first `count` sound items of these states, or as many as there are."""
    items: list[EvalItem] = []
    left_out: Counter[str] = Counter()
    asked: set[str] = set()
    for state, following in pairwise([*states, states[0]]):
        if len(items) == count:
            break
        try:
            items.append(sound_item(state, following, asked))
            asked |= group_keys(items[-1].prompt)
        except (NotDrawn, Unsound) as error:
            left_out[str(error)] += 1
    return Made(items, len(items) + left_out.total(), left_out)


def sound_item(state: dict[str, str], following: dict[str, str], asked: Collection[str]) -> EvalItem:
    """The item of a state, whose verifier is also given the answer to the `following` one.

    Raises Unsound where it is none, or its question is one of those `asked`; NotDrawn where the generator fails.
    """
    drawn = reasoning_gym.draw(state)
    if reason := _why_not(drawn):
        raise Unsound(reason)
    if group_keys(drawn.question) & set(asked):
        raise Unsound("its question was drawn before")
    item = _item(drawn, state)
    if not _accepts(item, drawn.answer):
        raise Unsound("its verifier refuses its answer")
    other = _answer(following)
    if other and score(f"Answer: {other}", drawn.answer, truncated=False).value == 0 and _accepts(item, other):
        raise Unsound("its verifier accepts the answer to another question")
    if _accepts(item, NONSENSE):
        raise Unsound(f"its verifier accepts {NONSENSE!r}")
    return item


def not_again(items: Sequence[EvalItem]) -> list[str]:
    """The items that another process, which makes them in reverse, makes otherwise."""
    reasoning_gym.worker(reasoning_gym.python()).stop()
    again = [(item, reasoning_gym.draw(item.state)) for item in reversed(items)]
    return [item.id for item, drawn in again if (drawn.question, drawn.answer) != (item.prompt, item.expected_answer)]


def _why_not(drawn: Drawn) -> str:
    """What is wrong with a question or its answer, whatever the verifier says; empty where nothing is."""
    if not drawn.question.strip() or not (drawn.answer or "").strip():
        return "it has no answer of its own" if drawn.question.strip() else "its question is empty"
    if max(len(drawn.question), len(drawn.answer)) > LONGEST:
        return f"it is longer than {LONGEST} characters"
    if "\n" in drawn.answer.strip():
        return "its answer has several lines"
    if drawn.worked and (reason := gsm_symbolic.why_not(drawn.worked, drawn.answer)):
        return f"its worked answer holds {reason}"
    return "" if extract_answer(f"Answer: {drawn.answer}") else "its answer is not found behind 'Answer:'"


def _answer(state: dict[str, str]) -> str:
    try:
        return reasoning_gym.draw(state).answer or ""
    except NotDrawn:
        return ""


def _accepts(item: EvalItem, answer: str) -> bool:
    return score_item(item, f"Answer: {answer}", truncated=False).value == 1


def _item(drawn: Drawn, state: dict[str, str]) -> EvalItem:
    generator = state["generator"]
    return EvalItem(
        id=f"{generator}-{int(state['index']):06}",
        prompt=drawn.question,
        expected_answer=drawn.answer,
        category=generator,
        difficulty="medium",  # reasoning-gym has no measure of it that its generators share
        scorer=reasoning_gym.NAME,
        group=f"{generator} {drawn.template}" if drawn.template else "",
        task=reasoning_gym.NAME,
        state=state,
    )
