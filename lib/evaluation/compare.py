"""Before against after, item by item: what changed, how sure that is, and what was right for the wrong reasons.

    comparison = compare(read_results(run / "eval_before.jsonl"), read_results(run / "eval_after.jsonl"), config)
    comparison.verdict.sentence       # "Improved: accuracy rose from …"

The verdict is that of `lib.evaluation.verdict`, with one condition more: improved is only what is detectably better
than always giving the one answer that is right most often, as how often each answer comes is learned without a thought.
Tried as that answer are the commonest expected ones, the tuned model's own commonest, and, where items have a
tolerance, the expected number that lies within it for the most of them.

Two controls stand beside it, in which nothing changed: each model's answers against its own answers to the same
items, asked in another order and in batches of another size. A rule that finds a change there is not to be believed.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from lib.cards import brief, card
from lib.config import VerdictConfig
from lib.errors import RequestError
from lib.evaluation.leaks import Leak
from lib.evaluation.numbers import read_number
from lib.evaluation.results import ItemResult, Results, Summary, summarise
from lib.evaluation.scoring import ALTERNATIVES, is_answer, normalised
from lib.evaluation.statistics import Interval, PairedDifference, holm, paired_bootstrap, paired_difference
from lib.evaluation.verdict import (
    Verdict,
    could_have_found,
    items_needed,
    minimum_detectable_effect,
    smallest_found,
    tells_items_needed,
    verdict,
    wanted_effect,
)

CHANGES = ("improved", "regressed")
CONSTANTS = 10  # so many expected answers, and so many of the model's own, are tried as constant ones, commonest first


class Category(NamedTuple):
    """One row of the table by category; `p_value` is adjusted for there being several (Holm)."""

    name: str
    before: Summary
    after: Summary
    paired: PairedDifference
    p_value: float
    word: str


class Constant(NamedTuple):
    """What giving one answer every time is worth: the one right most often, and how the tuned model stands to it."""

    answer: str
    paired: PairedDifference
    beaten: bool


class Outlook(NamedTuple):
    """The smallest change that the rule finds with its power on these items, and how many tell `target` from none.

    `items_needed` is None where they cannot tell, as their groups are too few.
    """

    detectable_effect: float
    target: float
    items_needed: int | None


class Control(NamedTuple):
    """One model against itself: how many completions are the same text, and the change that the rule finds.

    `word` is improved or regressed, or empty: the rule finds nothing, as it must.
    """

    model: str
    same_text: int
    paired: PairedDifference
    word: str


class Comparison(NamedTuple):
    """Everything that the delta report says.

    comparison = compare(before, after, config.evaluation.verdict)
    comparison                       # Comparison('Improved: accuracy rose from …')
    comparison.paired.p_value        # 3.1e-12
    comparison.broken[:3]            # (before, after) of items that were correct and no longer are

    In a notebook it shows itself as a card.
    """

    before: Results
    after: Results
    before_summary: Summary
    after_summary: Summary
    paired: PairedDifference
    bootstrap: Interval
    rule: VerdictConfig
    verdict: Verdict
    outlook: Outlook
    constant: Constant
    categories: list[Category]
    fixed: list[tuple[ItemResult, ItemResult]]
    broken: list[tuple[ItemResult, ItemResult]]
    both_wrong: list[tuple[ItemResult, ItemResult]]
    unsound: list[ItemResult]
    # None where they were not run, as where two evaluation outputs are compared by hand.
    controls: list[Control] | None = None
    # None where the training data was not looked at.
    leaks: list[Leak] | None = None
    # Why this is no comparison of a base with what was tuned from it; empty where it is, or is not meant to be.
    doubt: str = ""

    def __repr__(self) -> str:
        return f"Comparison({brief(self.verdict.sentence, 100)!r})"

    def _repr_html_(self) -> str:
        sides = {"before": (self.before, self.before_summary), "after": (self.after, self.after_summary)}
        facts = {
            name: f"{results.model}: {100 * side.accuracy:.1f} % "
            f"({100 * side.interval.low:.1f} to {100 * side.interval.high:.1f})"
            for name, (results, side) in sides.items()
        }
        facts |= {"fixed": self.paired.fixed, "broken": self.paired.broken, "p": f"{self.paired.p_value:.3g}"}
        return card(self.verdict.word.capitalize(), facts | {"verdict": self.headline})

    @property
    def leaking_items(self) -> int:
        return len({leak.item for leak in self.leaks or ()})

    @property
    def failed_controls(self) -> list[Control]:
        return [control for control in self.controls or () if control.word]

    @property
    def headline(self) -> str:
        """The verdict, and what stands against it: wrong reasoning under correct answers, leaks, a failed control."""
        said = [self.verdict.sentence]
        if self.unsound:
            correct = self.after_summary.counts["correct"]
            said.append(f"But {len(self.unsound)} of {correct} correct answers rest on wrong reasoning.")
        if self.leaks:
            said.append(f"Warning: the training data asks {self.leaking_items} of the {self.paired.n} items, too.")
        for control in self.failed_controls:
            said.append(
                f"Warning: {control.model} against itself is {control.word}, so the rule finds what is not there."
            )
        if self.doubt:
            said.append(f"Warning: {self.doubt}.")
        return " ".join(said)


def compare(before: Results, after: Results, rule: VerdictConfig) -> Comparison:
    """The comparison of two models on the same items. Raises RequestError where items or decoding differ."""
    _check_comparable(before, after)
    pairs = list(zip(before.items, after.items, strict=True))
    paired = _paired(before.items, after.items, rule)
    constant = _constant(after.items, rule)
    correct = [[item.correct for item in side.items] for side in (before, after)]
    groups = [item.group for item in after.items]
    return Comparison(
        before=before,
        after=after,
        before_summary=summarise(before.items, rule),
        after_summary=summarise(after.items, rule),
        paired=paired,
        bootstrap=paired_bootstrap(*correct, np.random.default_rng(0), 1 - rule.alpha, groups),
        rule=rule,
        verdict=_beyond(constant, verdict(paired, rule), paired, rule),
        outlook=_outlook(paired, rule),
        constant=constant,
        categories=_categories(before.items, after.items, rule),
        fixed=[(b, a) for b, a in pairs if a.correct and not b.correct],
        broken=[(b, a) for b, a in pairs if b.correct and not a.correct],
        both_wrong=[(b, a) for b, a in pairs if not (b.correct or a.correct)],
        unsound=[item for item in after.items if item.correct and item.unsound],
    )


def doubt(before: Results, after: Results) -> str:
    """Why `after` is not known to be what was tuned from `before`; empty where the weights are recorded as that."""
    if after.tuned_from == before.weights_sha256:
        return ""
    if after.weights_sha256 == before.weights_sha256:
        return "before and after are answers of the same weights"
    if not after.tuned_from:
        return (
            "whether the model after was tuned from the model before is not recorded; answer again with the tuned "
            "model's checkpoint"
        )
    return (
        f"the model after was tuned from other weights ({after.tuned_from[:16]}) than the model before has "
        f"({before.weights_sha256[:16]}), so the change is not what training did"
    )


def control(answers: Results, again: Results, rule: VerdictConfig) -> Control:
    """What the rule says of one model's answers, and of the same items answered again. Raises RequestError."""
    wanted = {item.id for item in again.items}
    first = answers._replace(items=[item for item in answers.items if item.id in wanted])
    _check_comparable(first, again)
    paired = _paired(first.items, again.items, rule)
    same = sum(there.completion == here.completion for there, here in zip(first.items, again.items, strict=True))
    found = verdict(paired, rule).word
    return Control(answers.model, same, paired, found if found in CHANGES else "")


def figures(comparison: Comparison) -> dict[str, Any]:
    """The numbers that a manifest and `eval_summary.json` keep.

    `before` and `after` are laid out as lm-evaluation-harness writes its results, and hold more beside that.
    """
    paired, constant = comparison.paired, comparison.constant
    return {
        "eval_set": comparison.before.eval_set,
        "n": paired.n,
        "before": _side(comparison.before, comparison.before_summary),
        "after": _side(comparison.after, comparison.after_summary),
        "difference": paired.difference,
        "difference_stderr": paired.standard_error,
        "difference_interval": [paired.low, paired.high],
        "bootstrap_interval": list(comparison.bootstrap),
        "clusters": paired.clusters,
        "fixed": paired.fixed,
        "broken": paired.broken,
        "p_value": paired.p_value,
        **comparison.outlook._asdict(),
        "constant": {"answer": constant.answer, "accuracy": constant.paired.before, "beaten": constant.beaten},
        "categories": [
            {
                "category": row.name, "n": row.before.n, "before": row.before.accuracy, "after": row.after.accuracy,
                "difference_interval": [row.paired.low, row.paired.high], "adjusted_p": row.p_value, "word": row.word,
            }
            for row in comparison.categories
        ],
        "controls": None if comparison.controls is None else [
            {
                "model": found.model, "n": found.paired.n, "same_text": found.same_text, "fixed": found.paired.fixed,
                "broken": found.paired.broken, "word": found.word,
            }
            for found in comparison.controls
        ],
        "leaks": None if comparison.leaks is None else [leak._asdict() for leak in comparison.leaks],
        "rule": comparison.rule.__dict__,
        "verdict": comparison.verdict.word,
        "sentence": comparison.headline,
    }  # fmt: skip


def _side(results: Results, summary: Summary) -> dict[str, Any]:
    name = results.eval_set
    return {
        "results": {
            name: {
                "alias": name, "exact_match,none": summary.accuracy,
                "exact_match_stderr,none": summary.majority.standard_error,
            }
        },
        "higher_is_better": {name: {"exact_match": True}},
        "n-shot": {name: 0},
        "n-samples": {name: {"original": summary.n, "effective": summary.n}},
        "config": {"model": results.model, "gen_kwargs": results.decoding},
        "task_hashes": {name: results.eval_set_sha256},
        "weights_sha256": results.weights_sha256,
        "accuracy": summary.accuracy,
        "interval": list(summary.interval),
        **summary.counts,
        "checkable": summary.checkable,
        "steps_checked": summary.checked,
        "all_steps_correct": summary.sound,
        "no_reasoning": summary.no_reasoning,
        "words_only": summary.words_only,
        "right_answer_wrong_reasoning": summary.right_answer_wrong_reasoning,
        "wrong_answer_right_reasoning": summary.wrong_answer_right_reasoning,
        "steps": summary.steps,
        "true_steps": summary.true_steps,
        "first_errors": {str(step): count for step, count in summary.first_errors.items()},
        "step_errors": [
            {"step": kind, "error": error, "count": count} for (kind, error), count in summary.errors.items()
        ],
        "samples": summary.samples,
        "pass@1": summary.pass_at_1.mean,
        f"pass@{summary.samples}": summary.pass_at_all.mean,
        f"majority@{summary.samples}": summary.majority.mean,
        "ece": summary.calibration.ece,
        "brier": summary.calibration.brier,
    }  # fmt: skip


def _check_comparable(before: Results, after: Results) -> None:
    if before.eval_set_sha256 != after.eval_set_sha256 or [i.id for i in before.items] != [i.id for i in after.items]:
        raise RequestError(
            f"before and after answered different items: {before.eval_set} ({len(before.items)}) and "
            f"{after.eval_set} ({len(after.items)}); evaluate both on the same eval set"
        )
    for name in before.decoding | after.decoding:
        there, here = (side.decoding.get(name) for side in (before, after))
        if there != here:
            raise RequestError(
                f"before and after were decoded differently: {name} {there!r} and {here!r}; evaluate both alike"
            )


def _paired(before: list[ItemResult], after: list[ItemResult], rule: VerdictConfig) -> PairedDifference:
    correct = [[item.correct for item in side] for side in (before, after)]
    return paired_difference(*correct, 1 - rule.alpha, [item.group for item in after])


def _outlook(paired: PairedDifference, rule: VerdictConfig) -> Outlook:
    target = rule.min_effect or rule.detectable_effect
    told = tells_items_needed(paired, rule.alpha)
    return Outlook(
        detectable_effect=smallest_found(paired, rule),
        target=target,
        items_needed=items_needed(paired, target, rule.alpha, rule.power) if told else None,
    )


def _constant(after: list[ItemResult], rule: VerdictConfig) -> Constant:
    expected = Counter(text for item in after for text in item.expected.split(ALTERNATIVES))
    given = Counter(item.answer for item in after if item.answer)
    common = [text for texts in (expected, given) for text, _ in texts.most_common(CONSTANTS)]
    tried = {text: _correct_of(text, after) for text in dict.fromkeys(common + _central(after))}
    answer = max(tried, key=lambda text: sum(tried[text]))
    correct, groups = [item.correct for item in after], [item.group for item in after]
    paired = paired_difference(tried[answer], correct, 1 - rule.alpha, groups)
    return Constant(answer, paired, paired.p_value < rule.alpha and paired.difference > 0)


def _central(items: list[ItemResult]) -> list[str]:
    """The expected number that lies within the tolerance of most items, units aside; none where no item has one."""
    numbers = [
        (text, number.value, Fraction(str(item.tolerance)))
        for item in items
        for text in item.expected.split(ALTERNATIVES)
        if item.tolerance and (number := read_number(normalised(text)))
    ]
    lows = sorted(value - tolerance for _, value, tolerance in numbers)
    highs = sorted(value + tolerance for _, value, tolerance in numbers)
    near = {text: bisect_right(lows, value) - bisect_left(highs, value) for text, value, _ in numbers}
    return [max(near, key=near.__getitem__)] if near else []


def _correct_of(answer: str, items: list[ItemResult]) -> list[bool]:
    """Whether this one answer is correct, of each item by its own scorer."""
    return [is_answer(answer, item.expected, item.scorer, item.tolerance) for item in items]


def _beyond(constant: Constant, found: Verdict, paired: PairedDifference, rule: VerdictConfig) -> Verdict:
    """The verdict, with no gain called one that a constant answer has, too."""
    if found.word != "improved" or constant.beaten:
        return found
    findable = minimum_detectable_effect(constant.paired, rule.alpha, rule.power)
    wanted = wanted_effect(rule)
    word, said = "underpowered", "Underpowered to tell it from a constant answer"
    if findable <= wanted:
        word, said = "no detectable change", "No detectable change beyond a constant answer"
    return Verdict(
        word,
        f"{said}: accuracy {100 * paired.before:.1f} % before, "
        f"{100 * paired.after:.1f} % after on {paired.n} items, and always answering {constant.answer!r} gets "
        f"{100 * constant.paired.before:.1f} %. {could_have_found(constant.paired, rule, findable, wanted)}",
    )


def _categories(before: list[ItemResult], after: list[ItemResult], rule: VerdictConfig) -> list[Category]:
    names = sorted({item.category for item in before})
    sides = [([i for i in before if i.category == name], [i for i in after if i.category == name]) for name in names]
    paired = [_paired(*side, rule) for side in sides]
    adjusted = holm([found.p_value for found in paired])
    return [
        Category(name, summarise(old, rule), summarise(new, rule), found, p, _word(found, p, rule))
        for name, (old, new), found, p in zip(names, sides, paired, adjusted, strict=True)
    ]


def _word(paired: PairedDifference, adjusted: float, rule: VerdictConfig) -> str:
    if adjusted >= rule.alpha or abs(paired.difference) < rule.min_effect:
        return ""
    return "improved" if paired.difference > 0 else "regressed"
