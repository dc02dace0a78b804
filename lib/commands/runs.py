"""Whole runs and sweeps: start them, go on with them, and list, verify, compare and reproduce them."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.commands.manners import (
    Coloured,
    answer,
    as_json,
    green,
    red,
    report,
    say,
    say_on,
    short,
    tell,
    tell_json,
    yellow,
)
from lib.commands.parser import Parser, at_least, config_files, flag, group, run_names, set_flag, verb
from lib.errors import RequestError, RetraceError
from lib.files import shown_path

COLOURS = {"done": green, "failed": red, "damaged": red, "running": yellow, "stale": yellow, "interrupted": yellow,
           "timed_out": yellow}  # fmt: skip


def add(verbs: Any) -> None:
    made = verb(verbs, "run", run, "The whole job: five notebooks into one run folder, and a report.",
                "run configs/quickstart.yaml", "run configs/quickstart.yaml --set training.num_steps=50")  # fmt: skip
    flag(made, "config", metavar="CONFIG", help="configuration file", complete=config_files)
    set_flag(made)
    flag(made, "--name", default="", help="names the run folder (default: the name in the configuration)")
    _limit_flag(made)

    made = verb(verbs, "resume", resume, "Go on with a run that was interrupted, failed or killed, to the same end.",
                "resume 20261122_101500_quickstart")  # fmt: skip
    flag(made, "run", metavar="RUN", help="a run folder or the folder of a sweep, or its name in the home",
         complete=run_names)  # fmt: skip
    _limit_flag(made)

    made = verb(verbs, "sweep", sweep, "Many runs that differ in some fields, and one page that compares them.",
                "sweep configs/sweeps/lr.yaml")  # fmt: skip
    flag(made, "sweep", metavar="SWEEP", help="a sweep's configuration file; begun before, it goes on")
    flag(
        made,
        "--trial",
        type=at_least(0),
        metavar="N",
        help="this one alone, of a sweep's folder: what the executors call",
    )
    flag(made, "--dry-run", action="store_true", help="check every trial's configuration, and list the trials")

    runs = group(verbs, "runs", "List, verify, compare and reproduce runs.",
                 "runs list", "runs show 20261122_101500_quickstart")  # fmt: skip
    made = verb(runs, "list", runs_list, "Every run, with its status and verdict.", "runs list")
    flag(made, "--html", action="store_true", help="write index.html, the same as a page")
    made = verb(runs, "show", runs_show, "What the manifest of a run says.", "runs show 20261122_101500_quickstart")
    _run_flag(made)
    made = verb(runs, "verify", runs_verify, "Compare every artefact of a run with its recorded hash.",
                "runs verify 20261122_101500_quickstart", "runs verify --all")  # fmt: skip
    _run_flag(made, nargs="?")
    flag(made, "--all", action="store_true", help="every run, the store and the datasets")
    made = verb(runs, "lineage", runs_lineage, "The training traces that an example or an eval item goes back to.",
                "runs lineage 20261122_101500_quickstart high_card_duel-001")  # fmt: skip
    _run_flag(made)
    flag(made, "id", metavar="ID", help="of an eval item, or of a training example, which is that of its trace")
    made = verb(runs, "compare", runs_compare, "Two runs: what they were made from, and which results are equal.",
                "runs compare 20261122_101500_quickstart 20261122_114500_quickstart")  # fmt: skip
    _run_flag(made)
    flag(made, "other", metavar="OTHER", complete=run_names)
    flag(made, "--output", type=Path, metavar="R.html", help="compare their tuned models item by item, as a page")
    made = verb(runs, "track", runs_track, "Tell TensorBoard or MLflow of a run, again or for the first time.",
                "runs track 20261122_101500_quickstart --to mlflow")  # fmt: skip
    _run_flag(made)
    flag(made, "--to", action="append", choices=("tensorboard", "mlflow"), required=True, help="may be given twice")
    made = verb(runs, "reproduce", runs_reproduce,
                "Execute a run again from its record, compare every result, and write a certificate.",
                "runs reproduce 20261122_101500_quickstart --prove")  # fmt: skip
    flag(made, "run", metavar="RUN", help="a run, or the report.html of one", complete=run_names)
    flag(made, "--prove", action="store_true", help="in a fresh virtual environment of the recorded packages")


def _run_flag(made: Parser, **options: Any) -> None:
    flag(made, "run", metavar="RUN", help="a run folder, or its name in the home", complete=run_names, **options)


def _limit_flag(made: Parser) -> None:
    flag(made, "--time-limit", type=_seconds, default=math.inf, metavar="SECONDS",
         help="stop after so long; what was made stays, and resume goes on")  # fmt: skip


def _seconds(text: str) -> float:
    try:
        if (seconds := float(text)) > 0:
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")


# ---- the whole job ------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> None:
    from lib.config import load_config
    from lib.experiments.kernels import use_forked_kernels

    config = load_config(arguments.config, arguments.set)
    use_forked_kernels()  # which imports what the kernels need, while we import what we do
    from lib.experiments.pipeline import run_pipeline

    _conclude(run_pipeline(config, arguments.name, say_on, arguments.time_limit))


def resume(arguments: argparse.Namespace) -> None:
    from lib.experiments.pipeline import resume_run
    from lib.experiments.trials import find_sweep

    if folder := find_sweep(arguments.run):
        if arguments.time_limit < math.inf:
            raise RequestError("--time-limit: is of a run; a trial of a sweep on Slurm has execution.slurm.minutes")
        from lib.experiments.sweep import resume_sweep

        _conclude_sweep(resume_sweep(folder, say_on))
        return
    _conclude(resume_run(arguments.run, say_on, arguments.time_limit))


def _conclude(done: Any) -> None:
    from lib.experiments.stages import reproduce_command

    page, again = shown_path(done.path("report.html")), reproduce_command(done)
    figures = json.loads(done.path("eval_summary.json").read_bytes()) if as_json() else {}
    answer(
        {"run": done.name, "folder": shown_path(done.folder), "report": page, "reproduce": again} | figures,
        done.conclusion("05_compare"),
        f"Report: {page}",
        f"Reproduce: {again}",
    )


def sweep(arguments: argparse.Namespace) -> None:
    from lib.experiments.trials import find_sweep

    folder = find_sweep(arguments.sweep)
    if arguments.trial is not None:
        from lib.experiments.sweep import run_trial

        if folder is None:
            raise RequestError(f"--trial: is one of a sweep that was begun, and {arguments.sweep} is none")
        run_trial(folder, arguments.trial, say_on)
        return
    from lib.experiments.sweep import plan, read_sweep, resume_sweep, run_sweep

    if arguments.dry_run:
        trials = (read_sweep(folder) if folder else plan(arguments.sweep)).trials
        report([{"trial": trial.name, "label": trial.label} for trial in trials],
               [f"{trial.name}  {trial.label}" for trial in trials])  # fmt: skip
        return
    _conclude_sweep(resume_sweep(folder, say_on) if folder else run_sweep(arguments.sweep, say_on))


def _conclude_sweep(made: Any) -> None:
    """Raises RetraceError where some trials are not done."""
    from lib.experiments.sweep_report import PAGE

    if as_json():
        tell((made.folder / "sweep.json").read_text("utf-8"), end="")
    say(made.headline)
    say(f"Comparison: {shown_path(made.folder / PAGE)}")
    if made.undone:
        raise RetraceError(f"{made.folder.name}: {'; '.join(_undone(made))}")


def _undone(made: Any) -> Iterator[str]:
    """What keeps a sweep from being whole; what is damaged is no better for going on."""
    from lib.experiments.stages import command

    damaged = [one for one in made.undone if one.status == "damaged"]
    waiting = [one for one in made.undone if one.status != "damaged"]
    if damaged:
        yield f"{len(damaged)} of {len(made.outcomes)} trials damaged: {_few(damaged, 'error')}"
    if waiting:
        yield (f"{len(waiting)} of {len(made.outcomes)} trials not done: {_few(waiting, 'status')}; "
               f"to go on: {command('resume', made.folder.name)}")  # fmt: skip


def _few(outcomes: list[Any], what: str) -> str:
    named = ", ".join(f"{one.trial.name} ({getattr(one, what)})" for one in outcomes[:5])
    return f"{named}{' …' if len(outcomes) > 5 else ''}"


# ---- looking at runs ----------------------------------------------------------------------------------------


def runs_list(arguments: argparse.Namespace) -> None:
    from lib.experiments.index import write_index
    from lib.experiments.run import list_runs
    from lib.files import home

    found = list_runs()
    if found and arguments.html:
        write_index(home() / "index.html")
    if as_json():
        tell_json(found)
        return
    for item in found:
        tell(f"{item['run']:<40} ", coloured_status(f"{item['status']:<12}"), f" {item['verdict']}")
    if not found:
        tell("no run yet; start one: python -m lib run configs/quickstart.yaml")
    elif arguments.html:
        tell(f"As a page: {shown_path(home() / 'index.html')}")


def coloured_status(text: str) -> Coloured | str:
    return COLOURS.get(text.strip(), str)(text)


def runs_show(arguments: argparse.Namespace) -> None:
    from lib.experiments.run import find_run, read_manifest, trained_on

    manifest = read_manifest(find_run(arguments.run))
    if as_json():
        tell(json.dumps(manifest, indent=1))
        return
    evaluation = manifest["metrics"].get("evaluation") or {}
    for name, value in {
        "run": manifest["artifacts_path"], "status": manifest["status"], "error": manifest.get("error"),
        "dataset": trained_on(manifest), "recipe": manifest["recipe"], "seed": manifest["seed"],
        "weights sha256": manifest["metrics"].get("weights_sha256"), "verdict": evaluation.get("sentence"),
        "seconds": ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in manifest["wall_s"].items()),
    }.items():  # fmt: skip
        if value:
            tell(f"{name:<15} ", coloured_status(str(value)) if name == "status" else value)


def runs_verify(arguments: argparse.Namespace) -> None:
    from lib.experiments.run import find_run, run_folders
    from lib.experiments.verify import verify_home, verify_run

    if bool(arguments.run) == arguments.all:
        raise RequestError("runs verify: give a RUN, or --all")
    folders = run_folders() if arguments.all else [find_run(arguments.run)]
    found = {folder.name: verify_run(folder) for folder in folders}
    shared = verify_home() if arguments.all else []
    lines = []
    for name, findings in found.items():
        lines.append(f"{name}: {f'{len(findings)} not as recorded' if findings else 'every artefact is as recorded'}")
        lines += [f"  {finding}" for finding in findings]
    report({"runs": found, "shared": shared}, [*lines, *map(str, shared)])
    if shared or any(found.values()):
        raise SystemExit(1)


def runs_lineage(arguments: argparse.Namespace) -> None:
    from lib.config import load_config
    from lib.experiments.run import CONFIG, Run, find_run
    from lib.experiments.stages import lineage

    folder = find_run(arguments.run)
    found, lines = lineage(Run(folder, load_config(folder / CONFIG)), arguments.id), []
    for source in found:
        trace = source.origin.trace
        lines.append(f"{trace.id}  {source.similarity:.0%}  from {source.origin}")
        lines.append(f"  {short(trace.prompt, 100)} → {short(trace.final_answer, 20)}")
    report(
        [
            {"trace": source.origin.trace.id, "similarity": source.similarity, "from": str(source.origin),
             "prompt": source.origin.trace.prompt, "final_answer": source.origin.trace.final_answer}
            for source in found
        ],
        lines,
    )  # fmt: skip


def runs_compare(arguments: argparse.Namespace) -> None:
    from lib.experiments.compare_runs import compare_runs, comparison_figures, write_page

    if as_json():
        tell_json(comparison_figures(arguments.run, arguments.other))
    else:
        for line in compare_runs(arguments.run, arguments.other):
            tell(line)
    if arguments.output:
        comparison = write_page(arguments.run, arguments.other, arguments.output)
        say(f"The tuned model of {arguments.other} against that of {arguments.run}: {comparison.headline}")
        say(f"Report: {shown_path(arguments.output)}")


def runs_track(arguments: argparse.Namespace) -> None:
    from lib.experiments.run import find_run
    from lib.experiments.tracking import track

    told = track(find_run(arguments.run), arguments.to, say)
    answer(told)


def runs_reproduce(arguments: argparse.Namespace) -> None:
    from lib.experiments.reproduce import reproduce

    certificate, page = reproduce(arguments.run, arguments.prove, say_on)
    if as_json():
        tell(page.with_suffix(".json").read_text("utf-8"), end="")
    apart = [row for row in certificate.rows if not row.equal]
    for row in apart:
        say(f"differs: {row.what}{f' ({row.note})' if row.note else ''}")
    for sentence in certificate.explanation:
        say(sentence)
    total = len(certificate.rows)
    say(f"Equal: all {total} results, bit for bit." if certificate.equal else f"Different: {len(apart)} of {total}.")
    say(f"Certificate: {shown_path(page)}")
    if not certificate.equal:
        raise SystemExit(1)
