"""An evaluation output read back: what one model answered to each item, and figures of all of it.

    results = read_results(run / "eval_after.jsonl")
    results.items[0].answer, results.items[0].first_error      # "win", "step 4 (unseen): says lower 36, …"
    summarise(results.items, rule).accuracy                    # 0.96

Accuracy is correct items over all items: one without a readable answer, or cut off by the token limit, is not
correct, and is counted apart from a wrong one. Where an item's task is known, each step of the completion is checked
against its engine; a completion is sound when every step of it that can be checked is true and none is missing.

Of several samples of an item, the answer is the one that most of them give, and the completion that is shown, judged
and checked is the first with that answer. Confidence is the probability that the model gives to that completion.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lib.cards import brief, card
from lib.config import VerdictConfig
from lib.errors import RequestError
from lib.evaluation.metrics import (
    Calibration,
    Estimate,
    Vote,
    calibration,
    majority_answer,
    mean_majority_at_k,
    mean_pass_at_k,
)
from lib.evaluation.scoring import merged, reasoning_steps
from lib.evaluation.statistics import Interval, wilson_interval
from lib.tasks import check_steps, checkable
from lib.tasks.steps import StepCheck
from lib.trace import TRACE_VERSION

VERDICTS = ("correct", "wrong", "unscored", "truncated")


class ItemResult(NamedTuple):
    """One item as one model answered it; `checks` is empty where the item's task is not known, and where no step of it
    says what could be checked, though the task is `checkable`."""

    id: str
    prompt: str
    expected: str
    category: str
    group: str
    completion: str
    answer: str
    verdict: str
    steps: list[str]
    checks: list[StepCheck]
    num_tokens: int
    logprob: float
    scorer: str = ""
    tolerance: float = 0.0
    votes: tuple[Vote, ...] = ()
    checkable: bool = False

    @property
    def correct(self) -> bool:
        return self.verdict == "correct"

    @property
    def sound(self) -> bool:
        told = [check.correct for check in self.checks if check.correct is not None]
        return bool(told) and all(told)

    @property
    def unsound(self) -> bool:
        """Some reasoning was written, and it is not true throughout; an answer alone is no wrong reasoning."""
        return bool(self.checks and self.steps) and not self.sound

    @property
    def first_wrong(self) -> int | None:
        """The number of the first step that is wrong or missing, from 1."""
        return next((number for number, check in enumerate(self.checks, 1) if check.correct is False), None)

    @property
    def first_error(self) -> str:
        """`step 4 (unseen): says lower 36, the engine says lower 40`, or empty."""
        if self.first_wrong is None:
            return ""
        check = self.checks[self.first_wrong - 1]
        return f"step {self.first_wrong} ({check.kind}): {check.reason}"

    @property
    def marked_steps(self) -> list[str]:
        """Each step with what its check says: `My card: queen, value 12. ✓ true`, ` ✗ the step is missing`."""
        return [f"{step or ''}{_mark(check)}".strip() for step, check in zip_longest(self.steps, self.checks)]

    def __repr__(self) -> str:
        return f"ItemResult({brief(self.id)!r}, {self.verdict}, answer {brief(self.answer, 30)!r})"

    def _repr_html_(self) -> str:
        facts = {
            "question": self.prompt,
            "steps": self.marked_steps,
            "answer": f"{self.answer} ({self.verdict}; expected {self.expected})",
            "probability": f"{math.exp(self.logprob):.3g} of the whole completion",
        }
        return card(f"Item {self.id}", facts)


class Results(NamedTuple):
    """One evaluation output: whose, over which eval set, decoded how, and every item.

    results = read_results(run.path("eval_after.jsonl"))
    results               # Results('tiny (tuned)', 'high_card_duel_v1', 519 of 520 correct)
    results.items[0]      # ItemResult('duel-0001', correct, answer 'win')

    In a notebook it shows itself as a card, and so does each item, with its steps and their checks.

    `tuned_from` is the digest of the base's weights; empty of a base, and where it was not recorded.
    """

    model: str
    weights_sha256: str
    eval_set: str
    eval_set_sha256: str
    decoding: dict[str, Any]
    items: list[ItemResult]
    tuned_from: str = ""

    def __repr__(self) -> str:
        correct = sum(item.correct for item in self.items)
        return f"Results({brief(self.model)!r}, {brief(self.eval_set)!r}, {correct} of {len(self.items)} correct)"

    def _repr_html_(self) -> str:
        counts = Counter(item.verdict for item in self.items)
        n, correct, checked = len(self.items), counts["correct"], [item for item in self.items if item.checks]
        low, high = wilson_interval(correct, n)
        facts = {
            "eval set": self.eval_set,
            "accuracy": f"{100 * correct / n:.1f} % of {n} (95 % interval {100 * low:.1f} to {100 * high:.1f})",
            "verdicts": {name: counts[name] for name in VERDICTS},
            "every step true": f"{sum(item.sound for item in checked)} of {len(checked)}" if checked else "",
            "decoding": self.decoding,
            "weights": f"sha256 {self.weights_sha256[:16]}",
        }
        return card(self.model, facts)


class Summary(NamedTuple):
    """Figures of one model.

    `checkable` items are of a known task; of these `no_reasoning` have no step at all, and `words_only` have steps of
    which none could be checked. `checked` are those with a check, of which `sound` are true in every step. `steps`
    counts the steps of those with reasoning that can be checked, those that are missing among them, and `true_steps`
    the true ones; `first_errors` has how many went wrong first at step 1, 2 …, `errors` how many steps are wrong, by
    kind of step and of error.
    """

    n: int
    counts: dict[str, int]
    accuracy: float
    interval: Interval
    checkable: int
    checked: int
    sound: int
    sound_interval: Interval | None
    no_reasoning: int
    words_only: int
    right_answer_wrong_reasoning: int
    wrong_answer_right_reasoning: int
    steps: int
    true_steps: int
    first_errors: dict[int, int]
    errors: dict[tuple[str, str], int]
    samples: int
    # one sample alone being correct, at least one of all, and the answer that most of all give
    pass_at_1: Estimate
    pass_at_all: Estimate
    majority: Estimate
    calibration: Calibration


def read_results(path: Path) -> Results:
    """An evaluation output. Raises RequestError, naming the line, where it is none."""
    samples: dict[str, list[ItemResult]] = {}
    heads = []
    try:
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")  # splitlines() would also split at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if (version := record["trace_version"]) != TRACE_VERSION:
                raise ValueError(f"trace_version {version!r} is not known, only {TRACE_VERSION!r}")
            item, head = _item(record, record["meta"]), _head(record["meta"])
            if record["meta"]["sample"] != len(samples.setdefault(item.id, [])):
                raise ValueError(f"sample {record['meta']['sample']!r} of item {item.id} is not the next one")
            samples[item.id].append(item)
            if head not in heads:
                heads.append(head)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else error
            raise RequestError(f"{path}:{number}: not a line of an evaluation output: {reason}") from None
    if len(heads) != 1:
        raise RequestError(f"{path}: expected the answers of one model to one eval set, got {len(heads)}")
    return Results(items=[_voted(answers) for answers in samples.values()], **heads[0])


def summarise(items: list[ItemResult], rule: VerdictConfig) -> Summary:
    """Figures of some items, the intervals at the confidence of the rule."""
    confidence = 1 - rule.alpha
    counts = Counter(item.verdict for item in items)
    checked = [item for item in items if item.checks]
    reasoned = [item for item in checked if item.steps]
    known = [item for item in items if item.checkable]
    sound = sum(item.sound for item in checked)
    samples = min(len(item.votes) for item in items)
    votes = [[vote.correct for vote in item.votes] for item in items]
    return Summary(
        n=len(items),
        counts={name: counts[name] for name in VERDICTS},
        accuracy=counts["correct"] / len(items),
        interval=wilson_interval(counts["correct"], len(items), confidence),
        checkable=len(known),
        checked=len(checked),
        sound=sound,
        sound_interval=wilson_interval(sound, len(checked), confidence) if checked else None,
        no_reasoning=sum(not item.steps for item in known),
        words_only=sum(bool(item.steps) and not item.checks for item in known),
        right_answer_wrong_reasoning=sum(item.correct and item.unsound for item in checked),
        wrong_answer_right_reasoning=sum(item.sound and item.verdict == "wrong" for item in checked),
        steps=sum(check.correct is not None for item in reasoned for check in item.checks),
        true_steps=sum(check.correct is True for item in reasoned for check in item.checks),
        first_errors=_counted(item.first_wrong for item in reasoned if item.first_wrong),
        errors=_counted((c.kind, c.error) for item in reasoned for c in item.checks if c.correct is False),
        samples=samples,
        pass_at_1=mean_pass_at_k(votes, 1),
        pass_at_all=mean_pass_at_k(votes, samples),
        majority=mean_majority_at_k([item.votes for item in items], samples),
        calibration=calibration([(min(1.0, math.exp(item.logprob)), item.correct) for item in items]),
    )


def _mark(check: StepCheck | None) -> str:
    """What is said beside a step; nothing of one that nobody can check."""
    if check is None or check.correct is None:
        return ""
    return " ✓ true" if check.correct else f" ✗ {check.reason}"


def _counted(found: Iterable[Any]) -> dict[Any, int]:
    counts = Counter(found)
    return {key: counts[key] for key in sorted(counts)}


def _voted(samples: list[ItemResult]) -> ItemResult:
    """Of an item's samples the one that speaks for it, with the votes of all."""
    given = [item.answer if item.verdict in ("correct", "wrong") else None for item in samples]
    answers = merged(given, samples[0].scorer)
    winner = majority_answer(answers)
    chosen = samples[answers.index(winner) if winner is not None else 0]
    votes = tuple(Vote(answer, item.correct) for answer, item in zip(answers, samples, strict=True))
    return chosen._replace(votes=votes)


def _head(meta: dict[str, Any]) -> dict[str, Any]:
    names = ("model", "weights_sha256", "eval_set", "eval_set_sha256")
    if not isinstance(meta["decoding"], dict):
        raise ValueError(f"decoding: expected an object, got {type(meta['decoding']).__name__}")
    tuned_from = _text(meta, "tuned_from") if "tuned_from" in meta else ""
    return {name: _text(meta, name) for name in names} | {"decoding": meta["decoding"], "tuned_from": tuned_from}


def _item(record: dict[str, Any], meta: dict[str, Any]) -> ItemResult:
    if record["verdict"] not in VERDICTS:
        raise ValueError(f"verdict: expected one of {', '.join(VERDICTS)}, got {record['verdict']!r}")
    if not _number(record, "logprob") <= 0:
        raise ValueError(f"logprob: expected a number of at most 0, got {record['logprob']!r}")
    steps, task = reasoning_steps(_text(record, "completion")), (meta.get("task", ""), meta.get("state"))
    return ItemResult(
        id=_text(meta, "eval_id"),
        prompt=_text(record, "prompt"),
        expected=_text(meta, "expected_answer"),
        category=_text(meta, "category"),
        group=_text(meta, "group") if "group" in meta else "",
        completion=record["completion"],
        answer=_text(record, "final_answer"),
        verdict=record["verdict"],
        steps=steps,
        checks=check_steps(*task, steps),
        checkable=checkable(*task),
        num_tokens=record["num_tokens"],
        logprob=record["logprob"],
        scorer=_text(meta, "scorer") if "scorer" in meta else "",
        tolerance=_tolerance(meta) if "tolerance" in meta else 0.0,
    )


def _text(record: dict[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise ValueError(f"{name}: expected a text, got {type(record[name]).__name__}")
    return record[name]


def _tolerance(meta: dict[str, Any]) -> float:
    if not 0 <= (found := _number(meta, "tolerance")) < math.inf:
        raise ValueError(f"tolerance: expected a number of at least 0, got {found!r}")
    return found


def _number(record: dict[str, Any], name: str) -> float:
    if type(record[name]) not in (int, float):
        raise ValueError(f"{name}: expected a number, got {record[name]!r}")
    return record[name]
