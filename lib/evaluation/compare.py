"""Before against after, item by item: what changed, how sure that is, and what was right for the wrong reasons.

    comparison = compare(read_results(run / "eval_before.jsonl"), read_results(run / "eval_after.jsonl"), config)
    comparison.verdict.sentence       # "Improved: accuracy rose from …"

Accuracy is correct items over all items: one without a readable answer, or cut off by the token limit, is not
correct, and is counted apart from a wrong one. Where an item's task is known, each step of the completion is
checked against the engine; a completion is sound when every step of it is true and none is missing.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from lib.config import VerdictConfig
from lib.errors import RequestError
from lib.evaluation.leaks import Leak
from lib.evaluation.scoring import reasoning_steps
from lib.evaluation.statistics import (
    Interval,
    PairedDifference,
    Verdict,
    paired_difference,
    verdict,
    wilson_interval,
)
from lib.tasks import TASKS
from lib.tasks.steps import StepCheck
from lib.trace import TRACE_VERSION

VERDICTS = ("correct", "wrong", "unscored", "truncated")


class ItemResult(NamedTuple):
    """One item as one model answered it; `checks` is empty where the item's task is not known."""

    id: str
    prompt: str
    expected: str
    category: str
    completion: str
    answer: str
    verdict: str
    steps: list[str]
    checks: list[StepCheck]
    num_tokens: int

    @property
    def correct(self) -> bool:
        return self.verdict == "correct"

    @property
    def sound(self) -> bool:
        return bool(self.checks) and all(check.correct for check in self.checks)

    @property
    def unsound(self) -> bool:
        """Some reasoning was written, and it is not true throughout; an answer alone is no wrong reasoning."""
        return bool(self.checks and self.steps) and not self.sound

    @property
    def first_error(self) -> str:
        """`step 4 (unseen): says lower 36, the engine says lower 40`, or empty."""
        for number, check in enumerate(self.checks, 1):
            if not check.correct:
                return f"step {number} ({check.kind}): {check.reason}"
        return ""


class Results(NamedTuple):
    """One evaluation output: whose, over which eval set, and every item."""

    model: str
    weights_sha256: str
    eval_set: str
    eval_set_sha256: str
    items: list[ItemResult]


class Summary(NamedTuple):
    """Figures of one model. `checked` items are of a known task; of these `sound` are true in every step, and
    `no_reasoning` have no step at all."""

    n: int
    counts: dict[str, int]
    accuracy: float
    interval: Interval
    checked: int
    sound: int
    sound_interval: Interval | None
    no_reasoning: int
    right_answer_wrong_reasoning: int
    wrong_answer_right_reasoning: int


class Category(NamedTuple):
    """One row of the table by category."""

    name: str
    before: Summary
    after: Summary


class Comparison(NamedTuple):
    """Everything that the delta report says."""

    before: Results
    after: Results
    before_summary: Summary
    after_summary: Summary
    paired: PairedDifference
    rule: VerdictConfig
    verdict: Verdict
    categories: list[Category]
    fixed: list[tuple[ItemResult, ItemResult]]
    broken: list[tuple[ItemResult, ItemResult]]
    unsound: list[ItemResult]
    step_errors: dict[str, int]
    # None where the training data was not looked at.
    leaks: list[Leak] | None = None

    @property
    def leaking_items(self) -> int:
        return len({leak.item for leak in self.leaks or ()})

    @property
    def headline(self) -> str:
        """The verdict, and what stands against it: wrong reasoning under correct answers, and leaks."""
        said = [self.verdict.sentence]
        if self.unsound:
            correct = self.after_summary.counts["correct"]
            said.append(f"But {len(self.unsound)} of {correct} correct answers rest on wrong reasoning.")
        if self.leaks:
            said.append(f"Warning: the training data asks {self.leaking_items} of the {self.paired.n} items, too.")
        return " ".join(said)


def read_results(path: Path) -> Results:
    """An evaluation output. Raises RequestError, naming the line, where it is none."""
    items, heads = [], set()
    try:
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")  # splitlines() would also split at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if (version := record["trace_version"]) != TRACE_VERSION:
                raise ValueError(f"trace_version {version!r} is not known, only {TRACE_VERSION!r}")
            meta = record["meta"]
            items.append(_item(record, meta))
            heads.add(tuple(_text(meta, name) for name in ("model", "weights_sha256", "eval_set", "eval_set_sha256")))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else error
            raise RequestError(f"{path}:{number}: not a line of an evaluation output: {reason}") from None
    if len(heads) != 1:
        raise RequestError(f"{path}: expected the answers of one model to one eval set, got {len(heads)}")
    return Results(*heads.pop(), items)


def compare(before: Results, after: Results, rule: VerdictConfig) -> Comparison:
    """The comparison of two models on the same items. Raises RequestError where the items differ."""
    if before.eval_set_sha256 != after.eval_set_sha256 or [i.id for i in before.items] != [i.id for i in after.items]:
        raise RequestError(
            f"before and after answered different items: {before.eval_set} ({len(before.items)}) and "
            f"{after.eval_set} ({len(after.items)}); evaluate both on the same eval set"
        )
    pairs = list(zip(before.items, after.items, strict=True))
    paired = paired_difference([b.correct for b, _ in pairs], [a.correct for _, a in pairs], 1 - rule.alpha)
    return Comparison(
        before=before,
        after=after,
        before_summary=summarise(before.items, rule),
        after_summary=summarise(after.items, rule),
        paired=paired,
        rule=rule,
        verdict=verdict(paired, rule.alpha, rule.min_effect),
        categories=[
            Category(
                name,
                *(summarise([item for item in side.items if item.category == name], rule) for side in (before, after)),
            )
            for name in sorted({item.category for item in before.items})
        ],
        fixed=[(b, a) for b, a in pairs if a.correct and not b.correct],
        broken=[(b, a) for b, a in pairs if b.correct and not a.correct],
        unsound=[item for item in after.items if item.correct and item.unsound],
        step_errors=dict(
            Counter(check.kind for item in after.items for check in item.checks if item.steps and not check.correct)
        ),
    )


def summarise(items: list[ItemResult], rule: VerdictConfig) -> Summary:
    """Figures of some items, the intervals at the confidence of the rule."""
    confidence = 1 - rule.alpha
    counts = Counter(item.verdict for item in items)
    checked = [item for item in items if item.checks]
    sound = sum(item.sound for item in checked)
    return Summary(
        n=len(items),
        counts={name: counts[name] for name in VERDICTS},
        accuracy=counts["correct"] / len(items),
        interval=wilson_interval(counts["correct"], len(items), confidence),
        checked=len(checked),
        sound=sound,
        sound_interval=wilson_interval(sound, len(checked), confidence) if checked else None,
        no_reasoning=sum(not item.steps for item in checked),
        right_answer_wrong_reasoning=sum(item.correct and item.unsound for item in checked),
        wrong_answer_right_reasoning=sum(item.sound and item.verdict == "wrong" for item in checked),
    )


def figures(comparison: Comparison) -> dict[str, Any]:
    """The numbers that a manifest keeps."""
    paired = comparison.paired

    def side(summary: Summary) -> dict[str, Any]:
        return {
            "accuracy": summary.accuracy, "interval": list(summary.interval), **summary.counts,
            "steps_checked": summary.checked, "all_steps_correct": summary.sound,
            "no_reasoning": summary.no_reasoning,
            "right_answer_wrong_reasoning": summary.right_answer_wrong_reasoning,
        }  # fmt: skip

    return {
        "eval_set": comparison.before.eval_set,
        "n": paired.n,
        "before": side(comparison.before_summary),
        "after": side(comparison.after_summary),
        "difference": paired.difference,
        "difference_interval": [paired.low, paired.high],
        "fixed": paired.fixed,
        "broken": paired.broken,
        "mcnemar_p": paired.p_value,
        "leaks": None if comparison.leaks is None else [leak._asdict() for leak in comparison.leaks],
        "rule": {"alpha": comparison.rule.alpha, "min_effect": comparison.rule.min_effect},
        "verdict": comparison.verdict.word,
        "sentence": comparison.headline,
    }


def _item(record: dict[str, Any], meta: dict[str, Any]) -> ItemResult:
    if record["verdict"] not in VERDICTS:
        raise ValueError(f"verdict: expected one of {', '.join(VERDICTS)}, got {record['verdict']!r}")
    steps = reasoning_steps(_text(record, "completion"))
    task = TASKS.get(meta.get("task", ""))
    return ItemResult(
        id=_text(meta, "eval_id"),
        prompt=_text(record, "prompt"),
        expected=_text(meta, "expected_answer"),
        category=_text(meta, "category"),
        completion=record["completion"],
        answer=_text(record, "final_answer"),
        verdict=record["verdict"],
        steps=steps,
        checks=task.check_steps(meta["state"], steps) if task else [],
        num_tokens=record["num_tokens"],
    )


def _text(record: dict[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise ValueError(f"{name}: expected a text, got {type(record[name]).__name__}")
    return record[name]
