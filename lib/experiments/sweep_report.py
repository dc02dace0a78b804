"""What came of a sweep: which trial is the best, how sure that is, and what picking the best of several does to it.

    report = make_report(folder, sweep, trials, settings)
    report.headline
    # "learning_rate=0.003 has the highest accuracy: 90.6 % of 32 items (69.6 to 97.6, an interval that holds for all 6
    #  trials together, …). No trial is detectably better than another (Holm over all 15 pairs, smallest p = 0.16). …"

The trials answer the same items, so each two are compared item by item, by the paired test of
`lib.evaluation.statistics`. The best is chosen by looking, so every pair is in the family that Holm's correction holds
for, not only those with the best; and the interval that is quoted for the best is one of N that hold together (each at
1 - alpha / N, Bonferroni's inequality), so that it holds for whichever was chosen.
"""

import json
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from lib.config import VerdictConfig
from lib.errors import RetraceError
from lib.evaluation.results import Results, read_results
from lib.evaluation.statistics import Interval, PairedDifference, holm, paired_difference, wilson_interval
from lib.experiments.evidence import EVIDENCE, Provenance, provenance, read_record
from lib.experiments.markdown import inline, table
from lib.experiments.report import write_sweep
from lib.experiments.run import read_manifest, status_of
from lib.experiments.stages import OUTPUTS, command
from lib.experiments.trials import SweepConfig, Trial, run_of, varied
from lib.files import atomic_write, home, sha256_file, write_json

PAGE = "sweep.html"
FEW = 12  # values of a field that are told


class Found(NamedTuple):
    """What a trial left: `answers` of its tuned model where it is done, and is as recorded."""

    trial: Trial
    run: str
    status: str
    error: str
    manifest: dict[str, Any]
    answers: Results | None


class Score(NamedTuple):
    """Of one trial's tuned model: its interval alone, and the one that holds together with those of all others."""

    correct: int
    n: int
    interval: Interval
    together: Interval
    before: float
    weights_sha256: str
    # What always giving the one best answer is worth, where the model is not detectably better than that.
    constant: float | None

    @property
    def accuracy(self) -> float:
        return self.correct / self.n


class Outcome(NamedTuple):
    """What became of a trial. `label` names the values by which it differs from others; `score` where it is done."""

    trial: Trial
    label: str
    run: str
    status: str
    error: str
    seconds: float
    score: Score | None


class Pair(NamedTuple):
    """The best trial against another: the change from that to the best, and p adjusted for all pairs (Holm)."""

    other: Outcome
    paired: PairedDifference
    p_value: float
    better: bool


class Report(NamedTuple):
    """Everything that the page says. `pairs` is empty, and `best` None, where there is nothing to compare."""

    folder: Path
    sweep: SweepConfig
    outcomes: list[Outcome]
    rule: VerdictConfig
    settings: dict[str, str]
    varied: dict[str, list[Any]]
    best: Outcome | None
    pairs: list[Pair]
    tests: int
    # Entries of the fingerprint → the values, where the runs do not have one: equal bits are promised within one alone.
    apart: dict[str, list[Any]]
    headline: str

    @property
    def scored(self) -> list[Outcome]:
        """Those that are done, the highest accuracy first."""
        done = [outcome for outcome in self.outcomes if outcome.score]
        return sorted(done, key=lambda outcome: -outcome.score.accuracy)

    @property
    def undone(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.score]


def make_report(
    folder: Path, sweep: SweepConfig, trials: list[Trial], settings: dict[str, str], errors: dict[int, str]
) -> Report:
    """The report of these trials, as far as they came; `errors` are what their commands said, by number."""
    return compare_trials(folder, sweep, [_find(trial, errors.get(trial.number, "")) for trial in trials], settings)


def compare_trials(folder: Path, sweep: SweepConfig, found: list[Found], settings: dict[str, str]) -> Report:
    """The report of what the trials of a sweep left, by the rule that its base states."""
    rule = found[0].trial.config.evaluation.verdict
    differing = {key: values for key, values in varied(one.trial for one in found).items() if len(values) > 1}
    answered = [one.answers for one in found if one.answers]
    outcomes = [_outcome(one, short_label(one.trial, differing), rule, len(answered)) for one in found]
    best, pairs, p_values = None, [], []
    if comparable := len({(one.eval_set_sha256, *(item.id for item in one.items)) for one in answered}) == 1:
        best = max((one for one in outcomes if one.score), key=lambda one: one.score.correct)  # of equals the first
        pairs, p_values = _pairs(best, outcomes, found, rule)
    return Report(
        folder=folder,
        sweep=sweep,
        outcomes=outcomes,
        rule=rule,
        settings=settings,
        varied=differing,
        best=best,
        pairs=pairs,
        tests=len(p_values),
        apart=_apart([one.manifest["fingerprint"] for one in found if one.answers]),
        headline=_headline(outcomes, best, pairs, p_values, rule, comparable),
    )


def short_label(trial: Trial, differing: dict[str, list[Any]]) -> str:
    """`learning_rate=0.003 seed=7`: the last word of each field that differs, or more where two end alike."""
    last = [key.rpartition(".")[2] for key in differing]
    words = {key: name if last.count(name) == 1 else key for key, name in zip(differing, last, strict=True)}
    return " ".join(f"{words[key]}={shown(trial.changes[key])}" for key in differing) or f"trial {trial.number}"


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_report(report: Report) -> None:
    """`sweep.json`, `sweep.md` and the page, into the folder of the sweep."""
    write_json(report.folder / "sweep.json", as_json(report))
    atomic_write(report.folder / "sweep.md", markdown(report))
    tables = {
        "varied": [(key, values_of(values)) for key, values in report.varied.items()],
        "head": TRIALS_HEAD,
        "trials": [(one, trial_row(one)) for one in (*report.scored, *report.undone)],
        "pairs_head": PAIRS_HEAD,
        "pairs": [pair_row(pair) for pair in report.pairs],
        "family": family(report),
        "settings": settings_of(report),
        "resume": command("resume", report.folder.name),
    }
    write_sweep(report.folder / PAGE, report, tables, _origin(report))


def _origin(report: Report) -> Provenance | None:
    """Where the trials come from, each thing said once; None where none is done."""
    found = []
    for one in report.scored:
        with suppress(RetraceError):  # a record that is damaged is found by `runs verify`, and takes no answers away
            found.append(provenance(read_record(home() / one.run / EVIDENCE), command("runs", "reproduce", one.run)))
    if not found:
        return None

    def every(name: str) -> str:
        return "; ".join(dict.fromkeys(getattr(one, name) for one in found))

    said = {name: every(name) for name in ("commit", "dataset", "fingerprint")}
    return found[0]._replace(run=report.folder.name, run_id=f"with {len(found)} trials", **said)


def as_json(report: Report) -> dict[str, Any]:
    """The same for a script."""
    scores = {
        one.trial.number: one.score._asdict() | {"accuracy": one.score.accuracy} for one in report.outcomes if one.score
    }
    return {
        "sweep": report.folder.name,
        "base": report.sweep.base,
        "headline": report.headline,
        "best": report.best.trial.number if report.best else None,
        "trials": [
            {
                "trial": one.trial.number, "run": one.run, "status": one.status, "error": one.error,
                "changes": one.trial.changes, "seconds": round(one.seconds, 1), "score": scores.get(one.trial.number),
            }
            for one in report.outcomes
        ],
        "pairs_tested": report.tests,
        "best_against": [
            {
                "trial": pair.other.trial.number, "difference": pair.paired.difference,
                "interval": [pair.paired.low, pair.paired.high], "adjusted_p": pair.p_value, "better": pair.better,
            }
            for pair in report.pairs
        ],
        "settings": report.settings,
        "fingerprints_differ_in": report.apart,
    }  # fmt: skip


def markdown(report: Report) -> str:
    """The same as the page, but for the figure."""
    sections = [
        f"# Sweep {inline(report.folder.name)}",
        "## What differs",
        table(["field", "values"], [[inline(key), inline(values_of(values))] for key, values in report.varied.items()]),
        "## Which is the best",
        f"**{inline(report.headline)}**",
        table(TRIALS_HEAD, [[inline(cell) for cell in trial_row(one)] for one in (*report.scored, *report.undone)]),
    ]
    if report.pairs:
        sections += ["## The best against each other trial", inline(family(report))]
        sections.append(table(PAIRS_HEAD, [[inline(cell) for cell in pair_row(pair)] for pair in report.pairs]))
    sections += ["## Settings", inline(settings_of(report))]
    return "\n\n".join(sections) + "\n"


# ---- in words -----------------------------------------------------------------------------------------------

TRIALS_HEAD = ["no.", "trial", "status", "correct", "accuracy", "alone", "all together", "before", "seconds", "run"]
PAIRS_HEAD = ["the best is better than", "by, points", "interval", "p, Holm", "detectably"]


def trial_row(one: Outcome) -> list[str]:
    """The cells of a row of the table of trials."""
    if one.score is None:
        return [str(one.trial.number), one.label, one.status, *[""] * 5, _seconds(one), one.run]
    score = one.score
    return [
        str(one.trial.number), one.label, one.status, f"{score.correct} of {score.n}", _percent(score.accuracy),
        _interval(score.interval), _interval(score.together), _percent(score.before), _seconds(one), one.run,
    ]  # fmt: skip


def pair_row(pair: Pair) -> list[str]:
    """The cells of a row of the table of pairs."""
    low, high = 100 * pair.paired.low, 100 * pair.paired.high
    return [
        pair.other.label, f"{100 * pair.paired.difference:+.1f}", f"{low:+.1f} to {high:+.1f}", _p(pair.p_value),
        "yes" if pair.better else "no",
    ]  # fmt: skip


def values_of(values: list[Any]) -> str:
    said = ", ".join(map(shown, values[:FEW]))
    return f"{said} … ({len(values)} values)" if len(values) > FEW else said


def family(report: Report) -> str:
    """What the p values of the pairs are adjusted for."""
    return (
        f"Items are compared one by one ({_test(report.pairs)}). As the best was chosen by looking, p is adjusted for "
        f"all {report.tests} pairs of trials (Holm); detectably better is p < {report.rule.alpha:g} and at least "
        f"{100 * report.rule.min_effect:.1f} points. The intervals of the differences are of one pair each."
    )


def settings_of(report: Report) -> str:
    given = ", ".join(f"{name}={value}" for name, value in report.settings.items())
    said = f"Every trial ran under the settings that the sweep began with: {given}."
    if report.apart:
        where = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in report.apart.items())
        return (
            f"{said} But the runs have different fingerprints ({where}), and equal bits are promised only within one."
        )
    return (
        f"{said} All runs have one fingerprint: beside each other or one after the other, they come to the same bits."
    )


def _headline(
    outcomes: list[Outcome],
    best: Outcome | None,
    pairs: list[Pair],
    p_values: list[float],
    rule: VerdictConfig,
    comparable: bool,
) -> str:
    scored, said = [one for one in outcomes if one.score], []
    if best and pairs:
        equals, everyone = sum(pair.paired.difference == 0 for pair in pairs), f"all {len(scored)}"
        figure = (
            f"{_percent(best.score.accuracy)} of {best.score.n} items ({_interval(best.score.together)}, an interval"
        )
        if equals == len(pairs):
            said.append(f"{everyone.capitalize() if equals > 1 else 'Both'} trials have the same accuracy: {figure} "
                        f"that holds for all of them together). {_standing(pairs, p_values, rule)}")  # fmt: skip
        else:
            also = f", as {'has' if equals == 1 else 'have'} {equals} other{'' if equals == 1 else 's'}"
            said.append(
                f"{best.label} has the highest accuracy{also if equals else ''}: {figure} that holds for {everyone} "
                "trials together, as the best was picked by these very items). "
                f"{_standing(pairs, p_values, rule)} Measure it on other items before its accuracy is quoted: the best "
                "of several is so by luck, too."
            )
        if best.score.constant is not None:
            said.append(f"It is not detectably better than always giving one and the same answer, which is correct for "
                        f"{_percent(best.score.constant)}.")  # fmt: skip
    elif scored and not comparable:
        said.append("The trials answered different items, so they are not compared, and none is called the best.")
    elif best:
        said.append(f"One trial is done, with {_percent(best.score.accuracy)}, so there is nothing to compare.")
    if undone := len(outcomes) - len(scored):
        said.append(f"{undone} of {len(outcomes)} trials {'is' if undone == 1 else 'are'} not done, and left out.")
    return " ".join(said)


def _test(pairs: list[Pair]) -> str:
    grouped = any(pair.paired.clustered for pair in pairs)
    return f"exact McNemar{' and, as items share groups, clustered t and sign flip, the largest p' if grouped else ''}"


def _standing(pairs: list[Pair], p_values: list[float], rule: VerdictConfig) -> str:
    """How the best stands to the others, by the tests."""
    beaten = sum(pair.better for pair in pairs)
    over = f"Holm over all {len(p_values)} pairs" if len(p_values) > 1 else _test(pairs)
    if beaten == len(pairs):
        largest = _p(max(pair.p_value for pair in pairs))
        return f"It is detectably better than {'the' if beaten == 1 else 'each'} other trial ({over}, p {largest})."
    if beaten:
        return f"It is detectably better than {beaten} of the {len(pairs)} others ({over}), and not than the rest."
    if min(p_values) < rule.alpha:
        return f"It is not detectably better than any other trial ({over})."
    return f"No trial is detectably better than another ({over}, smallest p {_p(min(p_values))})."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(found: Interval) -> str:
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def _p(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"= {p:.3g}"


def _seconds(one: Outcome) -> str:
    return f"{one.seconds:.0f}" if one.seconds else ""


# ---- what is found ------------------------------------------------------------------------------------------


def _find(trial: Trial, error: str) -> Found:
    run = run_of(trial)
    if run is None:
        return Found(trial, "", "not begun", error, {}, None)
    status, manifest, answers = status_of(run), {}, None
    try:
        manifest = read_manifest(run)
        error = error or manifest.get("error", "")  # the command's is of this time
        answers = _answers(run, manifest) if status == "done" else None
    except RetraceError as failure:  # no manifest, as it was killed, or files that are not what was written
        error = error or str(failure)
        if status in ("done", "damaged"):
            status, error = "damaged", f"{error}; {command('runs', 'verify', run.name)}"
    return Found(trial, run.name, status, error, manifest, answers)


def _answers(run: Path, manifest: dict[str, Any]) -> Results:
    file = run / OUTPUTS["after"]
    if not file.is_file() or sha256_file(file) != manifest["artifacts"][file.name]["sha256"]:
        raise RetraceError(f"{file.name}: not as recorded")
    return read_results(file)


def _outcome(found: Found, label: str, rule: VerdictConfig, trials: int) -> Outcome:
    seconds, score = sum(found.manifest.get("wall_s", {}).values()), None
    if found.answers:
        correct, n = sum(item.correct for item in found.answers.items), len(found.answers.items)
        evaluation = found.manifest["metrics"]["evaluation"]
        score = Score(
            correct,
            n,
            wilson_interval(correct, n, 1 - rule.alpha),
            wilson_interval(correct, n, 1 - rule.alpha / trials),
            evaluation["before"]["accuracy"],
            found.manifest["metrics"]["weights_sha256"],
            None if evaluation["constant"]["beaten"] else evaluation["constant"]["accuracy"],
        )
    return Outcome(found.trial, label, found.run, found.status, found.error, seconds, score)


def _pairs(
    best: Outcome, outcomes: list[Outcome], found: list[Found], rule: VerdictConfig
) -> tuple[list[Pair], list[float]]:
    """The best against each other trial, and the adjusted p values of all pairs."""
    answers = {one.trial.number: one.answers.items for one in found if one.answers}
    correct = {number: [item.correct for item in items] for number, items in answers.items()}
    groups = [item.group for item in answers[best.trial.number]]
    paired = {
        frozenset(two): paired_difference(correct[two[0]], correct[two[1]], 1 - rule.alpha, groups)
        for two in combinations(correct, 2)
    }
    adjusted = dict(zip(paired, holm([one.p_value for one in paired.values()]), strict=True))
    pairs = []
    for other in sorted((one for one in outcomes if one.score and one != best), key=lambda one: -one.score.correct):
        p = adjusted[frozenset((best.trial.number, other.trial.number))]
        change = paired_difference(correct[other.trial.number], correct[best.trial.number], 1 - rule.alpha, groups)
        pairs.append(Pair(other, change, p, p < rule.alpha and change.difference >= rule.min_effect))
    return pairs, list(adjusted.values())


def _apart(fingerprints: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = sorted({name for one in fingerprints for name in one})
    values = {name: list(dict.fromkeys(one.get(name, "absent") for one in fingerprints)) for name in names}
    return {name: found for name, found in values.items() if len(found) > 1}
