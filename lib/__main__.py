"""The command line: `python -m lib VERB …`. Each verb is one function; the work is done in the package.

Exit status: 0 done, 1 it failed, 2 the request was wrong. An error is one line: what, where, what to do.
"""

import argparse
import difflib
import errno
import json
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from lib.errors import RequestError, RetraceError
from lib.experiments.markdown import printable
from lib.files import check_writable, shown_path

# Modules that take long to import (jax, papermill, polars) are imported by the verb that needs them.


def run(arguments: argparse.Namespace) -> None:
    from lib.config import load_config
    from lib.experiments.pipeline import run_pipeline

    config = load_config(arguments.config, arguments.set)
    _conclude(run_pipeline(config, arguments.name, time_limit=arguments.time_limit))


def resume(arguments: argparse.Namespace) -> None:
    from lib.experiments.pipeline import resume_run
    from lib.experiments.trials import find_sweep

    if folder := find_sweep(arguments.run):
        if arguments.time_limit < math.inf:
            raise RequestError("--time-limit: is of a run; a trial of a sweep on Slurm has execution.slurm.minutes")
        from lib.experiments.sweep import resume_sweep

        _conclude_sweep(resume_sweep(folder, say))
        return
    _conclude(resume_run(arguments.run, time_limit=arguments.time_limit))


def _conclude(done: Any) -> None:
    from lib.experiments.stages import reproduce_command

    tell(done.conclusion("05_compare"))
    tell(f"Report: {shown_path(done.path('report.html'))}")
    tell(f"Reproduce: {reproduce_command(done)}")


def sweep(arguments: argparse.Namespace) -> None:
    from lib.experiments.trials import find_sweep

    folder = find_sweep(arguments.sweep)
    if arguments.trial is not None:
        from lib.experiments.sweep import run_trial

        if folder is None:
            raise RequestError(f"--trial: is one of a sweep that was begun, and {arguments.sweep} is none")
        run_trial(folder, arguments.trial)
        return
    from lib.experiments.sweep import plan, resume_sweep, run_sweep

    if arguments.dry_run:
        for trial in plan(arguments.sweep).trials:
            tell(f"{trial.name}  {trial.label}")
        return
    report = resume_sweep(folder, say) if folder else run_sweep(arguments.sweep, say)
    _conclude_sweep(report, arguments.json)


def _conclude_sweep(report: Any, as_json: bool = False) -> None:
    """Raises RetraceError where some trials are not done."""
    from lib.experiments.sweep_report import PAGE

    if as_json:
        tell((report.folder / "sweep.json").read_text("utf-8"), end="")
    say(report.headline)
    say(f"Comparison: {shown_path(report.folder / PAGE)}")
    if report.undone:
        undone = ", ".join(f"{one.trial.name} ({one.status})" for one in report.undone[:5])
        raise RetraceError(
            f"{report.folder.name}: {len(report.undone)} of {len(report.outcomes)} trials not done: {undone}"
            f"{' …' if len(report.undone) > 5 else ''}; to go on: python -m lib resume {report.folder.name}"
        )


def traces_generate(arguments: argparse.Namespace) -> None:
    from lib.config import TracesConfig
    from lib.experiments.stages import play, store
    from lib.tasks import TASKS
    from lib.trace import to_json

    if arguments.count < 1:
        raise RequestError(f"--count: expected at least 1, got {arguments.count}")
    if arguments.seed < 0:
        raise RequestError(f"--seed: expected at least 0, got {arguments.seed}")
    if arguments.engine == "reasoning-gym":
        traces = _reasoning_gym_traces(arguments)
    elif arguments.game not in TASKS:
        raise RequestError(f"--game: expected one of {', '.join(TASKS)}, got {arguments.game!r}")
    elif arguments.engine == "ungar" and arguments.game != "high_card_duel":
        raise RequestError(f"--engine ungar: plays high_card_duel alone, not {arguments.game}")
    else:
        asked = TracesConfig(arguments.game, arguments.count, arguments.seed, arguments.engine, arguments.ungar_python)
        traces = list(play(asked))
    if arguments.output or arguments.no_persist:
        _write_lines(arguments.output, (to_json(trace) + b"\n" for trace in traces))
    if not arguments.no_persist:
        added = store().add(traces)
        say(f"{added.added} traces added, {added.duplicates} were there already; the store holds {store().count()}")


def traces_engines(arguments: argparse.Namespace) -> None:
    from lib.experiments.stages import engines

    _use_reasoning_gym(arguments)
    found = engines(arguments.ungar_python)
    if arguments.json:
        tell(json.dumps([engine._asdict() for engine in found]))
        return
    for engine in found:
        tell(f"{engine.name:<13} {engine.version or 'absent':<8} {', '.join(engine.games)}  {engine.note}".rstrip())


def _reasoning_gym_traces(arguments: argparse.Namespace) -> list[Any]:
    from lib.tasks import gsm_symbolic, reasoning_gym
    from lib.trace import utc_now

    if arguments.game != gsm_symbolic.NAME:
        raise RequestError(f"--game: with --engine reasoning-gym expected {gsm_symbolic.NAME}, got {arguments.game!r}")
    _use_reasoning_gym(arguments)
    made = reasoning_gym.generate(arguments.count, arguments.seed, created_at=utc_now())
    _say_left_out(made.left_out, len(made.traces) + made.left_out.total(), "worked answers")
    return made.traces


def _use_reasoning_gym(arguments: argparse.Namespace) -> None:
    from lib.tasks import reasoning_gym

    if arguments.reasoning_gym_python:
        os.environ[reasoning_gym.VARIABLE] = arguments.reasoning_gym_python


def _say_left_out(left_out: dict[str, int], drawn: int, what: str) -> None:
    for reason, count in left_out.items():
        say(f"left out: {count} of {drawn} {what}: {reason}")


def traces_import(arguments: argparse.Namespace) -> None:
    from lib.data.importing import import_files
    from lib.data.mapping import load_mapping
    from lib.experiments.stages import store

    mapping = load_mapping(arguments.mapping) if arguments.mapping else None
    report = import_files(store(), arguments.files, arguments.on_bad_record, mapping=mapping)
    say(
        f"{report.lines} lines: {report.accepted} accepted, {report.rejected} rejected, {report.blank} blank; "
        f"{report.added} traces added, {report.duplicates} were there already"
    )
    if report.rejects_file:
        say(f"Rejected records and the reasons: {shown_path(report.rejects_file)}")


def traces_list(arguments: argparse.Namespace) -> None:
    from lib.experiments.stages import store

    traces = sorted(store().scan(), key=lambda trace: (trace.created_at, trace.id), reverse=True)
    values = store().meta_values()
    if arguments.json:
        shown = [{"id": t.id, "created_at": t.created_at, "prompt": t.prompt, "final_answer": t.final_answer}
                 for t in traces[: arguments.limit]]  # fmt: skip
        tell(json.dumps({"count": len(traces), "traces": shown, "meta": values}, default=str))
        return
    tell(f"{len(traces)} traces in {shown_path(store().folder)}")
    for trace in traces[: arguments.limit]:
        tell(
            f"  {trace.id[:8]}  {trace.created_at[:19]}  {_short(trace.prompt, 70)}  → {_short(trace.final_answer, 20)}"
        )
    if values:
        tell("meta, with the number of traces:")
    for key, found in values.items():
        tell(f"  {key}: {', '.join(f'{_short(str(value), 30)} ({count})' for value, count in list(found.items())[:8])}")


def traces_show(arguments: argparse.Namespace) -> None:
    from lib.experiments.stages import find_traces
    from lib.trace import to_json

    found = find_traces(arguments.id)
    if arguments.json:
        for origin in found:
            tell(json.dumps({"trace": json.loads(to_json(origin.trace)), "file": origin.file, "line": origin.line}))
        return
    if len(found) > 1:
        raise RequestError(f"trace {arguments.id}: {len(found)} ids begin so; give more of it, or --json for all")
    [origin] = found
    trace = origin.trace
    tell(f"{trace.id}  {trace.created_at}  from {origin}")
    tell(trace.prompt)
    for number, step in enumerate(trace.steps, 1):
        tell(f"{number}. {step.content}")
    tell(f"Answer: {trace.final_answer}")


def traces_verify(arguments: argparse.Namespace) -> None:
    from lib.experiments.stages import store, verify_traces

    found = verify_traces(store().scan())
    for problem in found.problems[:20]:
        tell(problem)
    tell(f"{found.checked} traces checked against their engine: {found.true} true in every step, "
          f"{len(found.problems)} not; {found.unknown} of no known game")  # fmt: skip
    if found.problems:
        raise SystemExit(1)


# The rules of `dataset build` by which a trace is left out, as flags: how each is given, and what it says.
CURATION: dict[str, tuple[dict[str, Any], str]] = {
    "min-characters": ({"type": int}, "of question, steps and answer together"),
    "max-characters": ({"type": int}, "of question, steps and answer together"),
    "min-steps": ({"type": int}, "of the reasoning"),
    "max-steps": ({"type": int}, "of the reasoning"),
    "min-ascii": ({"type": float}, "share of the characters that are ASCII, to leave out other scripts"),
    "verified": ({"action": "store_true"}, "only what an engine finds true in every step"),
    "unique": ({"action": "store_true"}, "of the same question, steps and answer only the first"),
    "near-duplicates": ({"type": float}, "of traces whose words overlap by this share (such as 0.8) only the first"),
}


def dataset_build(arguments: argparse.Namespace) -> None:
    from lib.config import DatasetConfig, build, parse_yaml
    from lib.data.dataset import build_dataset
    from lib.experiments.stages import datasets, find_all_leaks, reserved_questions, store

    if arguments.request:
        given = [
            flag
            for flag in ("name", "version", "filter", "limit", "strategy", "seed", *CURATION)
            if (value := getattr(arguments, flag.replace("-", "_"))) is not None and value is not False and value != []
        ]
        if given:
            raise RequestError(f"--request holds the whole request; leave out --{given[0]}")
        request = build(
            DatasetConfig, parse_yaml(_text(arguments.request), str(arguments.request)), str(arguments.request)
        )
    elif arguments.name and arguments.version:
        tree = {
            "dataset_name": arguments.name,
            "dataset_version": arguments.version,
            "filters": _filters(arguments.filter),
            "selection_strategy": arguments.strategy or "latest",
            "curation": {
                name: value
                for name in (flag.replace("-", "_") for flag in CURATION)
                if (value := getattr(arguments, name)) is not None and value is not False
            },
            "limit": arguments.limit,
            "seed": arguments.seed,
        }
        request = build(DatasetConfig, tree, "dataset build")
    else:
        raise RequestError("dataset build: give --name and --version, or --request FILE")
    if request.selection_strategy == "random" and request.seed is None:
        raise RequestError("dataset build: the strategy random requires --seed")
    dataset = build_dataset(store(), request, reserved_questions(), datasets())
    manifest = dataset.manifest
    say(f"{dataset.key}: {manifest['trace_count']} traces, content {manifest['content_sha256'][:16]}, "
        f"in {shown_path(dataset.folder)}")  # fmt: skip
    for reason, count in manifest["dropped"].items():
        say(f"  left out: {count} {reason}")
    for name, leaks in find_all_leaks(dataset).items():
        if leaks:
            say(f"  warning: {len({leak.item for leak in leaks})} items of {name} are asked in other words")
        for leak in leaks[:5]:
            say(f"    {leak.item} by trace {leak.trace} ({leak.kind}, {leak.similarity})")


def dataset_export(arguments: argparse.Namespace) -> None:
    from lib.config import load_config
    from lib.data.dataset import load_dataset
    from lib.data.export import export_lines
    from lib.experiments.stages import datasets

    traces = load_dataset(datasets(), arguments.key).traces
    config = load_config(arguments.config) if arguments.config else arguments
    _write_lines(arguments.output, export_lines(traces, arguments.format, config.recipe, config.system_instruction))
    if arguments.output:
        say(f"{len(traces)} examples in {shown_path(arguments.output)}")


def dataset_validate(arguments: argparse.Namespace) -> None:
    from lib.data.validation import too_long
    from lib.experiments.lengths import measure

    examples, found, by = measure(arguments.name, arguments.tokenizer, arguments.samples)
    tell(f"{arguments.name}: {examples} examples, each with a user's and a model's turn; {found.examples} measured")
    tell(
        f"tokens ({by}): {found.percentile(0)} to {found.percentile(100)}, mean {found.mean:.1f}, "
        f"95 % have at most {found.percentile(95)}; max_length {arguments.max_length}"
    )
    tell(f"trained on: {found.trained_tokens} of {found.tokens} tokens ({found.trained_tokens / found.tokens:.1%})")
    if problem := too_long(found, arguments.max_length):
        raise RetraceError(problem)
    tell(f"all fit; the longest is {found.longest[0].id} ({found.longest[0].tokens} tokens)")


def dataset_list(arguments: argparse.Namespace) -> None:
    from lib.data.dataset import list_datasets, read_manifest
    from lib.experiments.stages import datasets

    manifests = [read_manifest(datasets(), key) for key in list_datasets(datasets())]
    if arguments.json:
        tell(json.dumps([{name: value for name, value in m.items() if name != "trace_ids"} for m in manifests]))
        return
    for manifest in manifests:
        lengths = manifest["lengths"]
        tell(f"{manifest['dataset_key']:<28} {manifest['trace_count']:>9} traces  {manifest['created_at']}  "
             f"{manifest['content_sha256'][:16]}  {lengths['min']} to {lengths['max']} tokens")  # fmt: skip
    if not manifests:
        tell(f"no dataset in {shown_path(datasets())}; build one: python -m lib dataset build --help")


def dataset_card(arguments: argparse.Namespace) -> None:
    from lib.data.dataset import load_dataset
    from lib.experiments.dataset_card import dataset_card, exports_in
    from lib.experiments.stages import datasets

    dataset = load_dataset(datasets(), arguments.key)
    beside = arguments.output.parent if arguments.output else dataset.folder
    text = dataset_card(dataset.manifest, exports_in(beside, dataset))
    _write_lines(arguments.output, [text.encode()])
    if arguments.output:
        say(f"Card: {shown_path(arguments.output)}")


def dataset_diff(arguments: argparse.Namespace) -> None:
    from lib.data.dataset import load_dataset
    from lib.data.diff import diff_datasets
    from lib.experiments.dataset_diff import as_json, summary, write_dataset_diff
    from lib.experiments.stages import datasets

    diff = diff_datasets(*(load_dataset(datasets(), key) for key in (arguments.before, arguments.after)))
    if arguments.output:
        write_dataset_diff(arguments.output, diff)
    if arguments.json:
        tell(json.dumps(as_json(diff)))
        return
    for line in summary(diff):
        tell(line)
    if arguments.output:
        tell(f"Diff: {shown_path(arguments.output)}")


def train(arguments: argparse.Namespace) -> None:
    from lib.config import load_config
    from lib.experiments.training import check_training, train_on_file

    config = load_config(arguments.config, arguments.set)
    if arguments.dry_run:
        for line in check_training(config, arguments.data, arguments.output):
            tell(line)
        return
    result = train_on_file(config, arguments.data, arguments.output, lambda line: tell(_metrics(line)))
    say(f"{result.steps} steps, loss {result.loss:.4g}, {result.tokens_per_second:.0f} tokens/s, {result.seconds:.0f} s"
        + (f", resumed from step {result.resumed_from}" if result.resumed_from else ""))  # fmt: skip
    say(f"weights sha256 {result.weights_sha256}")
    say(f"Checkpoint: {shown_path(arguments.output / 'checkpoint-final')}")


def eval_make(arguments: argparse.Namespace) -> None:
    from lib.evaluation.evalsets import write_eval_set
    from lib.evaluation.reasoning_gym_items import reasoning_gym_items
    from lib.tasks.reasoning_gym import NAME, VERSION
    from lib.trace import utc_now

    _use_reasoning_gym(arguments)
    source, _, generator = arguments.generator.partition(":")
    if source != NAME or not generator:
        raise RequestError(f"--generator: expected {NAME}:NAME, got {arguments.generator!r}")
    if arguments.count < 1:
        raise RequestError(f"--count: expected at least 1, got {arguments.count}")
    if arguments.seed < 0:
        raise RequestError(f"--seed: expected at least 0, got {arguments.seed}")
    if arguments.output.suffix != ".jsonl":
        raise RequestError(f"--output: expected a name that ends in .jsonl, got {arguments.output}")
    check_writable(arguments.output)
    options = _options(arguments.option)
    made = reasoning_gym_items(generator, options, arguments.count, arguments.seed)
    words = [f"--generator {arguments.generator} --count {arguments.count} --seed {arguments.seed}"]
    words += [f"--option {shlex.quote(word)}" for word in arguments.option]
    origin = {
        "command": f"python -m lib eval make {' '.join(words)} --output {arguments.output.name}",
        "generator": arguments.generator, "version": VERSION, "options": options, "seed": arguments.seed,
        "draws": made.draws, "left_out": dict(made.left_out),
    }  # fmt: skip
    description = f"{len(made.items)} items of {generator} of reasoning-gym {VERSION}, scored by its verifier."
    eval_set = write_eval_set(arguments.output, made.items, description, utc_now(), origin)
    _say_left_out(made.left_out, made.draws, "draws")
    say(f"{eval_set.name}: {len(made.items)} items, sha256 {eval_set.sha256[:16]}: {shown_path(arguments.output)}")


def eval_generate(arguments: argparse.Namespace) -> None:
    from lib.config import EvaluationConfig, load_config
    from lib.evaluation.evaluate import answer_eval_set, write_results
    from lib.evaluation.scoring import check_scorers
    from lib.experiments.stages import find_eval_set, model_before
    from lib.model.weights import load_model, read_about

    _use_reasoning_gym(arguments)
    eval_set = find_eval_set(str(arguments.eval_set))
    check_scorers(eval_set.items)
    check_writable(arguments.output)
    config = load_config(arguments.config, arguments.set) if arguments.config else None
    if config is None and arguments.set:
        raise RequestError("--set: changes a configuration; give --config too")
    if arguments.model == "base":
        if config is None:
            raise RequestError("--model base: give --config, which names the model")
        if arguments.seed is not None:
            config = replace(config, training=replace(config.training, seed=arguments.seed))
        model, label, instruction = model_before(config), "base", config.system_instruction
    else:
        instruction = read_about(Path(arguments.model))["system_instruction"]
        model, label = load_model(Path(arguments.model)), "tuned"
    settings = config.evaluation if config else EvaluationConfig()
    records = answer_eval_set(model, eval_set, settings, f"{model.name} ({label})", instruction)
    write_results(arguments.output, records)
    correct = sum(record["score"] == 1 for record in records)
    samples = settings.sampling.samples
    each = f", {samples} times each" if samples > 1 else ""
    items = f"{len(records) // samples} items of {eval_set.name}"
    say(f"{items} answered{each}, {correct} correctly: {shown_path(arguments.output)}")


def eval_report(arguments: argparse.Namespace) -> None:
    from lib.config import VerdictConfig, load_config
    from lib.evaluation.compare import compare
    from lib.evaluation.results import read_results
    from lib.experiments.report import write_markdown

    rule = load_config(arguments.config, []).evaluation.verdict if arguments.config else VerdictConfig()
    comparison = compare(read_results(arguments.before), read_results(arguments.after), rule)
    write_markdown(arguments.output, comparison)
    say(comparison.headline)
    say(f"Report: {shown_path(arguments.output)}")


def export(arguments: argparse.Namespace) -> None:
    from lib.experiments.export import export_model

    done = export_model(arguments.run, arguments.to, arguments.dtype, arguments.adapters)
    say(f"{done.name}: {done.parameters:,} parameters in {done.dtype}, weights sha256 {done.weights_sha256[:16]}")
    say(f"Exported: {shown_path(arguments.to)}; its README.md says where the model is from")


def runs_list(arguments: argparse.Namespace) -> None:
    from lib.experiments.report import write_index
    from lib.experiments.run import list_runs
    from lib.files import home

    found = list_runs()
    if arguments.json:
        tell(json.dumps(found))
        return
    for item in found:
        tell(f"{item['run']:<40} {item['status']:<12} {item['verdict']}")
    if not found:
        tell("no run yet; start one: python -m lib run configs/quickstart.yaml")
    elif arguments.html:
        write_index(home() / "index.html", found)
        tell(f"As a page: {shown_path(home() / 'index.html')}")


def runs_verify(arguments: argparse.Namespace) -> None:
    from lib.experiments.run import find_run, run_folders
    from lib.experiments.verify import verify_home, verify_run

    if bool(arguments.run) == arguments.all:
        raise RequestError("runs verify: give a RUN, or --all")
    folders = run_folders() if arguments.all else [find_run(arguments.run)]
    found = {folder.name: verify_run(folder) for folder in folders}
    shared = verify_home() if arguments.all else []
    if arguments.json:
        tell(json.dumps({"runs": found, "shared": shared}))
    else:
        for name, findings in found.items():
            tell(f"{name}: {'every artefact is as recorded' if not findings else f'{len(findings)} not as recorded'}")
            for finding in findings:
                tell(f"  {finding}")
        for finding in shared:
            tell(finding)
    if shared or any(found.values()):
        raise SystemExit(1)


def runs_lineage(arguments: argparse.Namespace) -> None:
    from lib.config import load_config
    from lib.experiments.run import CONFIG, Run, find_run
    from lib.experiments.stages import lineage

    folder = find_run(arguments.run)
    for source in lineage(Run(folder, load_config(folder / CONFIG)), arguments.id):
        tell(f"{source.origin.trace.id}  {source.similarity:.0%}  from {source.origin}")
        tell(f"  {_short(source.origin.trace.prompt, 100)} → {_short(source.origin.trace.final_answer, 20)}")


def runs_compare(arguments: argparse.Namespace) -> None:
    from lib.experiments.compare_runs import compare_runs, compare_tuned, differences

    for line in compare_runs(arguments.run, arguments.other):
        tell(line)
    if arguments.output:
        from lib.experiments.report import write_comparison

        comparison = compare_tuned(arguments.run, arguments.other)
        title = f"{arguments.run} against {arguments.other}"
        write_comparison(arguments.output, comparison, title, differences(arguments.run, arguments.other))
        tell(f"The tuned model of {arguments.other} against that of {arguments.run}: {comparison.headline}")
        tell(f"Report: {shown_path(arguments.output)}")


def runs_reproduce(arguments: argparse.Namespace) -> None:
    from lib.experiments.reproduce import reproduce

    certificate, page = reproduce(arguments.run, arguments.prove, say)
    if arguments.json:
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


def runs_show(arguments: argparse.Namespace) -> None:
    from lib.experiments.run import find_run, read_manifest

    manifest = read_manifest(find_run(arguments.run))
    if arguments.json:
        tell(json.dumps(manifest, indent=1))
        return
    evaluation = manifest["metrics"].get("evaluation") or {}
    for name, value in {
        "run": manifest["artifacts_path"], "status": manifest["status"], "error": manifest.get("error"),
        "dataset": manifest["dataset_key"], "recipe": manifest["recipe"], "seed": manifest["seed"],
        "weights sha256": manifest["metrics"].get("weights_sha256"), "verdict": evaluation.get("sentence"),
        "seconds": ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in manifest["wall_s"].items()),
    }.items():  # fmt: skip
        if value:
            tell(f"{name:<15} {value}")


class Parser(argparse.ArgumentParser):
    """argparse, with an error in one line that says what was probably meant."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"unrecognized arguments: (\S+)", message) or re.search(r"invalid choice: '([^']*)'", message)
        known = [flag for action in self._actions for flag in action.option_strings]
        known += [str(choice) for action in self._actions for choice in action.choices or ()]
        close = difflib.get_close_matches(wrong[1].split("=")[0], known, n=1) if wrong else []
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
        tell(f"error: {message}; {hint}", file=sys.stderr)
        raise SystemExit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """What a verb does not know is told by that verb, and before what it misses: the hint is the flag meant."""
        known = {flag for action in self._actions for flag in action.option_strings}
        words = [word.split("=")[0] for word in (sys.argv[1:] if args is None else args)]
        strange = [word for word in words if word.startswith("--") and word not in known]
        if strange and not self._subparsers:
            self.error(f"unrecognized arguments: {' '.join(strange)}")
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def parser() -> Parser:
    """Every verb with its flags."""
    top = Parser(
        prog="python -m lib", description="Reasoning traces in, a fine-tuned model and a before/after report out."
    )
    top.add_argument("--home", type=Path, metavar="DIR", help="where everything produced is kept (default: runs/)")
    verbs = top.add_subparsers(metavar="VERB", required=True)

    def verb(group: Any, name: str, action: Callable, help: str, example: str) -> Parser:
        made = group.add_parser(name, help=help, description=help, epilog=f"example: python -m lib {example}")
        made.set_defaults(action=action)
        return made

    def group(name: str, help: str) -> Any:
        return verbs.add_parser(name, help=help, description=help).add_subparsers(metavar="VERB", required=True)

    def flag(made: Parser, *names: str, **options: Any) -> None:
        made.add_argument(*names, **options)

    def limit_flag(made: Parser) -> None:
        flag(made, "--time-limit", type=_seconds, default=math.inf, metavar="SECONDS",
             help="stop after so long; what was made stays, and resume goes on")  # fmt: skip

    def set_flag(made: Parser) -> None:
        flag(
            made,
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change a key of it, such as training.seed=1",
        )

    def reasoning_gym_flag(made: Parser) -> None:
        flag(made, "--reasoning-gym-python", default="", metavar="PATH",
             help="the one that has reasoning-gym (default: RETRACE_REASONING_GYM_PYTHON, or this one)")  # fmt: skip

    def config_flags(made: Parser, required: bool) -> None:
        flag(made, "--config", required=required, metavar="C.yaml", help="configuration file")
        set_flag(made)

    made = verb(
        verbs,
        "run",
        run,
        "The whole job: five notebooks into one run folder, and a report.",
        "run configs/quickstart.yaml",
    )
    flag(made, "config", metavar="CONFIG", help="configuration file")
    set_flag(made)
    flag(made, "--name", default="", help="names the run folder (default: the name in the configuration)")
    limit_flag(made)

    made = verb(verbs, "resume", resume, "Go on with a run that was interrupted, failed or killed, to the same end.",
                "resume 20261122_101500_quickstart")  # fmt: skip
    flag(made, "run", metavar="RUN", help="a run folder or the folder of a sweep, or its name in the home")
    limit_flag(made)

    made = verb(verbs, "sweep", sweep, "Many runs that differ in some fields, and one page that compares them.",
                "sweep configs/sweeps/lr.yaml")  # fmt: skip
    flag(made, "sweep", metavar="SWEEP", help="a sweep's configuration file; begun before, it goes on")
    flag(made, "--trial", type=int, metavar="N", help="this one alone, of a sweep's folder: what the executors call")
    flag(made, "--dry-run", action="store_true", help="check every trial's configuration, and list the trials")
    flag(made, "--json", action="store_true")

    def ungar_flag(made: Parser) -> None:
        flag(made, "--ungar-python", default="", metavar="PYTHON",
             help="the interpreter that has UNGAR installed (default: this one)")  # fmt: skip

    traces = group("traces", "Generate, import, list and verify traces.")
    made = verb(traces, "generate", traces_generate, "Play a game and keep what was reasoned.",
                "traces generate --game high_card_duel --count 100 --seed 42")  # fmt: skip
    flag(made, "--game", required=True)
    flag(made, "--count", type=int, required=True)
    flag(made, "--engine", choices=("builtin", "ungar", "reasoning-gym"), default="builtin",
         help="who plays it (default: builtin); gsm_symbolic is reasoning-gym's")  # fmt: skip
    ungar_flag(made)
    reasoning_gym_flag(made)
    flag(made, "--seed", type=int, default=42, help="episode i is dealt with seed + i (default: 42)")
    flag(
        made, "--no-persist", action="store_true", help="do not keep the traces; print them, or write them to --output"
    )
    flag(made, "--output", type=Path, metavar="F.jsonl", help="write the traces to this file too")
    made = verb(traces, "engines", traces_engines, "What can play, in which version.", "traces engines")
    ungar_flag(made)
    reasoning_gym_flag(made)
    flag(made, "--json", action="store_true")
    made = verb(traces, "import", traces_import, "Import traces from JSONL, JSON, CSV or Parquet.",
                "traces import mine.jsonl")  # fmt: skip
    flag(made, "files", nargs="+", metavar="FILE", help="a file, a pattern such as 'data/*.jsonl', or s3://BUCKET/KEY")
    flag(made, "--mapping", type=Path, metavar="M.yaml", help="which columns a trace is made of (docs/importing.md)")
    flag(made, "--on-bad-record", choices=("refuse", "quarantine"), default="refuse",
         help="refuse: one bad record and nothing goes in; quarantine: the good go in, the bad to a file")  # fmt: skip
    made = verb(
        traces,
        "list",
        traces_list,
        "What the store holds, newest first, and which meta values.",
        "traces list --limit 5",
    )
    flag(made, "--limit", type=int, default=5)
    flag(made, "--json", action="store_true")
    made = verb(traces, "show", traces_show, "One trace, and the file and line, or the game and seed, it is from.",
                "traces show 7c2f")  # fmt: skip
    flag(made, "id", metavar="ID", help="or the beginning of it")
    flag(made, "--json", action="store_true")
    verb(
        traces,
        "verify",
        traces_verify,
        "Check every step of every trace of a known game against its engine.",
        "traces verify",
    )

    dataset = group("dataset", "Build, export, validate, describe, compare and list datasets.")
    made = verb(dataset, "build", dataset_build, "Choose traces from the store, under a key that never changes.",
                "dataset build --name duel --version v1 --filter game=high_card_duel")  # fmt: skip
    flag(made, "--request", type=Path, metavar="R.yaml", help="the whole request as a file")
    flag(made, "--name")
    flag(made, "--version")
    flag(
        made,
        "--filter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a meta value; the same key again means either",
    )
    for name, (how, what) in CURATION.items():
        flag(made, f"--{name}", help=what, **how)
    flag(made, "--limit", type=int)
    flag(made, "--strategy", choices=("latest", "random"))
    flag(made, "--seed", type=int)
    made = verb(
        dataset, "export", dataset_export, "Write a dataset as JSONL.", "dataset export duel-v1 --format messages"
    )
    flag(made, "key", metavar="KEY")
    flag(made, "--format", required=True, metavar="F", help="trace, tunix_sft, training_example or messages")
    flag(
        made,
        "--recipe",
        default="trace_sft_v1",
        help="trace_sft_v1 (default), answer_sft_v1 (the answer alone) or shuffled_answers (of another question)",
    )
    flag(made, "--config", metavar="C.yaml", help="take the recipe and the system instruction from this configuration")
    flag(made, "--system-instruction", default="", metavar="TEXT", help="put before every prompt")
    flag(made, "--output", type=Path, metavar="F.jsonl", help="default: standard output")
    made = verb(dataset, "validate", dataset_validate, "What training would see: shape, lengths, trained tokens.",
                "dataset validate duel-v1 --max-length 512")  # fmt: skip
    flag(made, "name", metavar="KEY|FILE", help="a dataset, or a file in any of the export formats")
    flag(made, "--samples", type=int, default=0, help="examples to measure, spread evenly (default: all)")
    flag(made, "--max-length", type=int, default=512, help="tokens an example may have (default: 512)")
    flag(made, "--tokenizer", default="", metavar="PATH|HUB_NAME",
         help="of a released model: its tokenizer.json, folder or name (default: the one of the dataset)")  # fmt: skip
    made = verb(dataset, "list", dataset_list, "The datasets that are built.", "dataset list")
    flag(made, "--json", action="store_true")
    made = verb(dataset, "card", dataset_card, "A README.md for the Hub: what a dataset holds, where from, how chosen.",
                "dataset card duel-v1 --output upload/README.md")  # fmt: skip
    flag(made, "key", metavar="KEY")
    flag(made, "--output", type=Path, metavar="README.md",
         help="names the exports that lie beside it (default: standard output)")  # fmt: skip
    made = verb(dataset, "diff", dataset_diff, "Two datasets: which rows were added, removed and changed.",
                "dataset diff duel-v1 duel-v2 --output diff.html")  # fmt: skip
    flag(made, "before", metavar="A")
    flag(made, "after", metavar="B")
    flag(made, "--output", type=Path, metavar="R.html|R.md", help="the whole of it, as a page with figures or Markdown")
    flag(made, "--json", action="store_true")

    made = verb(verbs, "train", train, "Fine-tune on a training file; goes on where an interrupted one stopped.",
                "train --config configs/quickstart.yaml --data duel.jsonl --output runs/duel")  # fmt: skip
    config_flags(made, required=True)
    flag(made, "--data", type=Path, required=True, metavar="D.jsonl", help="in any of the export formats")
    flag(made, "--output", type=Path, required=True, metavar="DIR")
    flag(
        made,
        "--dry-run",
        action="store_true",
        help="check everything that needs no training, and write a manifest that says so",
    )

    evaluation = group("eval", "Answer an eval set, and compare two evaluations.")
    made = verb(evaluation, "make", eval_make, "Make an eval set from a generator of reasoning-gym.",
                "eval make --generator reasoning_gym:gcd --count 100 --seed 42 --output my_gcd_v1.jsonl")  # fmt: skip
    flag(made, "--generator", required=True, metavar="reasoning_gym:NAME")
    flag(made, "--count", type=int, required=True)
    flag(made, "--seed", type=int, required=True)
    flag(made, "--option", action="append", default=[], metavar="KEY=VALUE", help="of the generator; VALUE is YAML")
    flag(made, "--output", type=Path, required=True, metavar="E.jsonl", help="with E.manifest.json beside it")
    reasoning_gym_flag(made)
    made = verb(evaluation, "generate", eval_generate, "Answer an eval set with a model, and score the answers.",
                "eval generate --model runs/duel/checkpoint-final --eval-set high_card_duel_v1 --output O")  # fmt: skip
    flag(made, "--model", required=True, metavar="base|CHECKPOINT")
    flag(made, "--eval-set", required=True, metavar="E.jsonl", help="a file, or a name in evalsets/")
    flag(made, "--output", type=Path, required=True, metavar="O.jsonl")
    config_flags(made, required=False)
    reasoning_gym_flag(made)
    flag(
        made,
        "--seed",
        type=int,
        help="of the initial weights of a base made from scratch (default: the configuration's)",
    )
    made = verb(evaluation, "report", eval_report, "Compare two evaluation outputs: the delta report.",
                "eval report --before before.jsonl --after after.jsonl --output delta_report.md")  # fmt: skip
    flag(made, "--before", type=Path, required=True, metavar="B.jsonl")
    flag(made, "--after", type=Path, required=True, metavar="A.jsonl")
    flag(made, "--output", type=Path, required=True, metavar="R.md")
    flag(
        made,
        "--config",
        metavar="C.yaml",
        help="states the rule of the verdict (default: p < 0.05 and at least 1 point)",
    )

    made = verb(verbs, "export", export, "Write a tuned model as the folder that Hugging Face libraries load.",
                "export 20261122_101500_quickstart --to exported")  # fmt: skip
    flag(made, "run", metavar="RUN", help="a run folder, its name in the home, or a checkpoint folder")
    flag(made, "--to", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    flag(made, "--dtype", choices=("float32", "bfloat16"), default="", help="default: as the checkpoint has them")
    flag(made, "--adapters", action="store_true", help="LoRA's adapters alone, for peft; else they are merged")

    runs = group("runs", "List, verify, compare and reproduce runs.")
    made = verb(runs, "list", runs_list, "Every run, with its status and verdict.", "runs list")
    flag(made, "--json", action="store_true")
    flag(made, "--html", action="store_true", help="write index.html, the same as a page")
    made = verb(runs, "show", runs_show, "What the manifest of a run says.", "runs show 20261122_101500_quickstart")
    flag(made, "run", metavar="RUN")
    flag(made, "--json", action="store_true")
    made = verb(runs, "verify", runs_verify, "Compare every artefact of a run with its recorded hash.",
                "runs verify 20261122_101500_quickstart")  # fmt: skip
    flag(made, "run", metavar="RUN", nargs="?")
    flag(made, "--all", action="store_true", help="every run, the store and the datasets")
    flag(made, "--json", action="store_true")
    made = verb(runs, "lineage", runs_lineage, "The training traces that an example or an eval item goes back to.",
                "runs lineage 20261122_101500_quickstart high_card_duel-001")  # fmt: skip
    flag(made, "run", metavar="RUN")
    flag(made, "id", metavar="ID", help="of an eval item, or of a training example, which is that of its trace")
    made = verb(runs, "compare", runs_compare, "Two runs: what they were made from, and which results are equal.",
                "runs compare 20261122_101500_quickstart 20261122_114500_quickstart")  # fmt: skip
    flag(made, "run", metavar="RUN")
    flag(made, "other", metavar="OTHER")
    flag(made, "--output", type=Path, metavar="R.html", help="compare their tuned models item by item, as a page")
    made = verb(runs, "reproduce", runs_reproduce,
                "Execute a run again from its record, compare every result, and write a certificate.",
                "runs reproduce 20261122_101500_quickstart --prove")  # fmt: skip
    flag(made, "run", metavar="RUN", help="a run, or the report.html of one")
    flag(made, "--prove", action="store_true", help="in a fresh virtual environment of the recorded packages")
    flag(made, "--json", action="store_true")
    return top


class Terminated(KeyboardInterrupt):
    """The process was asked to end."""


def _seconds(text: str) -> float:
    if not (seconds := float(text)) > 0:
        raise ValueError
    return seconds


def tell(text: object, **options: Any) -> None:
    """Print, without a character that a terminal would obey, or that turns the direction of what follows."""
    print(printable(str(text)), **options)


def say(text: str) -> None:
    """Tell a person; standard output stays free for what a script reads."""
    tell(text, file=sys.stderr if not sys.stdout.isatty() and "--json" in sys.argv else sys.stdout)


def main(words: list[str] | None = None) -> int:
    """Do what the words ask. Returns the exit status."""
    arguments = parser().parse_args(words)
    if arguments.home:
        os.environ["RETRACE_HOME"] = str(arguments.home)
    try:
        arguments.action(arguments)
    except RequestError as error:
        return _fail(error, 2)
    except RetraceError as error:
        return _fail(error, 1)
    except Terminated:
        return _fail("terminated; python -m lib runs list shows what can be resumed", 143)
    except KeyboardInterrupt:
        return _fail("interrupted; python -m lib runs list shows what can be resumed", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has what it wanted
        return 0
    except OSError as error:
        status = 2 if error.filename and error.errno not in _NOT_THE_REQUEST else 1
        return _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), status)
    except MemoryError:
        return _fail("out of memory; give it more, or ask for less at once", 1)
    except ImportError as error:  # of a library that is not there, or that memory is not enough for
        return _fail(f"{error.__cause__ or error}; is there memory enough, and is requirements.txt installed?", 1)
    return 0


_NOT_THE_REQUEST = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE}


def _fail(error: object, status: int) -> int:
    tell(f"error: {error}", file=sys.stderr)
    return status


def _write_lines(path: Path | None, lines: Iterable[bytes]) -> None:
    """To a file, whole or not at all, or to standard output."""
    from lib.files import atomic_open

    if path is None:
        sys.stdout.buffer.writelines(lines)
        sys.stdout.buffer.flush()
    else:
        with atomic_open(path) as file:
            file.writelines(lines)


def _filters(given: list[str], flag: str = "--filter") -> dict[str, Any]:
    """`key=value` flags as a request holds them; the values are read as YAML, so 42 is a number."""
    from lib.config import parse_yaml

    filters: dict[str, list] = {}
    for item in given:
        key, found, text = item.partition("=")
        if not found or not key:
            raise RequestError(f"{flag} {item!r}: expected KEY=VALUE, such as game=high_card_duel")
        filters.setdefault(key, []).append(parse_yaml(f"value: {text}", f"{flag} {item}")["value"])
    return {key: values[0] if len(values) == 1 else values for key, values in filters.items()}


def _options(given: list[str]) -> dict[str, Any]:
    """`key=value` flags, each key once; the values are read as YAML."""
    options = _filters(given, "--option")
    for key in options:
        if sum(word.startswith(f"{key}=") for word in given) > 1:
            raise RequestError(f"--option {key}: given twice")
    return options


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def _metrics(line: dict[str, float]) -> str:
    held_out = f"  held out {line['held_out_loss']:.4f}" if "held_out_loss" in line else ""
    return f"step {line['step']:>6}  loss {line['loss']:.4f}  {line['tokens_per_second']:.0f} tokens/s{held_out}"


def _short(text: str, width: int) -> str:
    """One line of at most `width` characters, none of which a terminal would obey."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _terminate(signal: int, frame: Any) -> NoReturn:
    raise Terminated


if __name__ == "__main__":
    for name in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what is at work is stopped, and recorded as interrupted
        signal.signal(name, _terminate)
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is spelt out
        stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
