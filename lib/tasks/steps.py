"""What a task says about the steps of a completion.

    patterns = {"sum": r"(?P<a>[0-9]+) plus (?P<b>[0-9]+) is (?P<total>[0-9]+)"}
    truth = {"sum": {"a": "2", "b": "3", "total": "5"}}
    check_claims(patterns, truth, ["2 plus 3 is 6"])
    # [StepCheck("sum", correct=False, reason="says total 6, the engine says 5", error="false")]

The claims of each step are read back out of its text and compared with the engine's.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lib.trace import Trace


class StepCheck(NamedTuple):
    """Whether a step is true; `kind` names what it should have said, `reason` what is wrong with it.

    `correct` is None of a step that says nothing that the task could check.
    `error` is the kind of process error, empty where the step is true:
    missing      the steps end before it
    unreadable   it is not written as a step of its kind
    false        it is, and claims what is not so
    extra        the true steps end before it
    """

    kind: str
    correct: bool | None
    reason: str
    error: str = ""


def check_claims(
    patterns: Mapping[str, str], truth: Mapping[str, Mapping[str, str]], contents: list[str]
) -> list[StepCheck]:
    """One check a step, in the order of `truth`; a step that is missing at the end counts as wrong.

    `patterns` are regular expressions whose named groups are the claims of a step of that kind.
    """
    checks = [
        _check(kind, patterns[kind], claims, contents[index] if index < len(contents) else None)
        for index, (kind, claims) in enumerate(truth.items())
    ]
    after = f"the game has no step after the {list(truth)[-1].replace('_', ' ')}"
    return checks + [StepCheck("extra", False, after, "extra") for _ in contents[len(truth) :]]


def verify_trace(
    trace: Trace,
    episode_of: Callable[[Any], Any],
    drawn: Callable[[int], Any],
    question: Callable[[Any], str],
    check_steps: Callable[[Any, list[str]], list[StepCheck]],
) -> str:
    """Why a trace is not what its engine would have written; empty where it is.

    `episode_of` makes an episode of `meta.state` and raises ValueError where it cannot, `drawn` that of a seed; an
    episode has a `result`.
    """
    meta = trace.meta
    try:
        episode = episode_of(meta.get("state", {}))
    except ValueError as error:
        return f"meta.state: {error}"
    if isinstance(meta.get("seed"), int) and isinstance(meta.get("episode_index"), int):
        if drawn(meta["seed"] + meta["episode_index"]) != episode:
            return f"meta.state: seed {meta['seed']} + episode {meta['episode_index']} gives another one"
    if trace.prompt != question(episode):
        return "prompt: is not the question of meta.state"
    for number, check in enumerate(check_steps(meta["state"], [step.content for step in trace.steps]), 1):
        if not check.correct:
            return f"step {number} ({check.kind}): {check.reason}"
    return "" if trace.final_answer == episode.result else f"final_answer: expected {episode.result}"


def _check(kind: str, pattern: str, expected: Mapping[str, str], content: str | None) -> StepCheck:
    if content is None:
        return StepCheck(kind, False, "the step is missing", "missing")
    match = re.fullmatch(pattern, content)
    if not match:
        return StepCheck(kind, False, f"does not read as a step of kind {kind}", "unreadable")
    for name, value in match.groupdict().items():
        if value != expected[name]:
            return StepCheck(kind, False, f"says {name} {value}, the engine says {expected[name]}", "false")
    return StepCheck(kind, True, "")
