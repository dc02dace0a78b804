"""The stages of a run, each made once: called again, a stage finds what it made and returns it.

    traces → dataset → evaluation before → training → evaluation after → comparison

The notebooks, the pipeline and the command line all call these, so a step done alone is the same step.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lib.config import Config
from lib.data.dataset import Dataset, build_dataset, dataset_key, load_dataset
from lib.data.export import export_lines, read_examples
from lib.data.renderer import Example
from lib.data.store import Added, Store
from lib.data.tokenizer import load_tokenizer
from lib.errors import RequestError, RetraceError
from lib.evaluation.compare import Comparison, compare, control, figures
from lib.evaluation.evalsets import EvalSet, load_eval_set
from lib.evaluation.leaks import Leak, audit, nearest
from lib.evaluation.results import Results, read_results
from lib.experiments.evidence import EVIDENCE, VERSION, results
from lib.experiments.manifest import code_of, environment, save_code
from lib.experiments.run import CONFIG, Run
from lib.files import atomic_open, home, repository_root, write_json
from lib.tasks import TASKS, group_keys
from lib.trace import Trace, utc_now

EXPORT = "train.tunix_sft.jsonl"
OUTPUTS = {"before": "eval_before.jsonl", "after": "eval_after.jsonl"}
CONTROLS = {"before": "control_before.jsonl", "after": "control_after.jsonl"}


def store() -> Store:
    """The trace store of this home."""
    return Store(home() / "store")


def datasets() -> Path:
    return home() / "datasets"


def make_traces(config: Config) -> Added:
    """Play the episodes that the configuration asks for, and keep their traces; those kept already add nothing."""
    if not config.traces.game:
        if not store().count():
            raise RequestError(
                f"store {store().folder}: holds no trace, and traces.game asks for none; generate or import some first"
            )
        return Added(0, 0)
    game = TASKS[config.traces.game]
    return store().add(game.generate(config.traces.count, config.traces.seed, created_at=utc_now()))


class Verification(NamedTuple):
    """How many traces an engine could check, how many are true in every step, and what is wrong with the others."""

    checked: int
    true: int
    unknown: int
    problems: list[str]


def verify_traces(traces: Iterable[Trace]) -> Verification:
    """Compare each step of each trace of a known game and state with the engine; `unknown` counts the others."""
    checked, unknown, problems = 0, 0, []
    for trace in traces:
        game = TASKS.get(str(trace.meta.get("game", "")))
        if game is None or "state" not in trace.meta:
            unknown += 1
            continue
        checked += 1
        if reason := game.verify(trace):
            problems.append(f"trace {trace.id}: {reason}")
    return Verification(checked, checked - len(problems), unknown, problems)


def make_dataset(config: Config) -> Dataset:
    """The dataset of the configuration, after its traces, without any question of an eval set."""
    make_traces(config)
    reserved = reserved_questions(config.evaluation.eval_set)
    generated = config.traces if config.traces.game else None
    return build_dataset(store(), config.dataset, reserved, datasets(), generated)


def reserved_questions(eval_set: str = "") -> dict[str, str]:
    """Group key → eval set, of every question of evalsets/ and of the one named: none of them is ever trained on."""
    return {
        key: eval_set.name
        for eval_set in [*published_eval_sets(), *([find_eval_set(eval_set)] if eval_set else [])]
        for item in eval_set.items
        for key in group_keys(item.prompt, item.task, item.state)
    }


def training_file(run: Run) -> Path:
    """The dataset as the file that training reads, in the recipe of the configuration."""
    file = run.path(EXPORT)
    if not file.is_file():
        traces = make_dataset(run.config).traces
        with atomic_open(file) as out:
            out.writelines(export_lines(traces, "tunix_sft", run.config.recipe, run.config.system_instruction))
    return file


def training_examples(run: Run) -> list[Example]:
    """What the run trains on, read back from that file."""
    return read_examples(training_file(run), run.config.recipe, run.config.system_instruction)


def train_model(run: Run, on_metrics: Callable[[dict], None] = lambda line: None) -> Any:
    """Train on the run's dataset; goes on where an interrupted training stopped. Returns a TrainingResult."""
    from lib.training.loop import train

    examples = training_examples(run)
    return train(model_before(run.config), examples, run.config, run.folder, on_metrics)


def model_before(config: Config) -> Any:
    """The base model of the configuration. Raises RequestError where its weights, or its dataset, are missing."""
    from lib.model.weights import configured_base

    return configured_base(config, tokenizer_file(config))


def tokenizer_file(config: Config) -> Path:
    """The `tokenizer.json` of the model: its release's, or, of one made from scratch, its dataset's."""
    from lib.model.released import find_released, is_from_scratch

    if not is_from_scratch(config.model.name):
        return find_released(config.model.name) / "tokenizer.json"
    return load_dataset(datasets(), dataset_key(config.dataset)).tokenizer_file


def evaluate_model(run: Run, model: str) -> Results:
    """Answers of the model `before` or `after` to the eval set; made, where they must be, after what they need."""
    from lib.evaluation.evaluate import answer_control, answer_eval_set, write_results
    from lib.model.weights import load_model

    if model not in OUTPUTS:
        raise RequestError(f"model: expected before or after, got {model!r}")
    file, control = run.path(OUTPUTS[model]), run.path(CONTROLS[model])
    if not (file.is_file() and control.is_file()):
        training_file(run)
        if model == "after":
            train_model(run)
        answering = model_before(run.config) if model == "before" else load_model(run.path("checkpoint-final"))
        label = f"{answering.name} ({'base' if model == 'before' else 'tuned'})"
        asked = (
            answering, find_eval_set(run.config.evaluation.eval_set), run.config.evaluation, label,
            run.config.system_instruction,
        )  # fmt: skip
        write_results(file, answer_eval_set(*asked))
        write_results(control, answer_control(*asked))
    return read_results(file)


def find_eval_set(name: str) -> EvalSet:
    """An eval set by its path, or by its name in evalsets/. Raises RequestError."""
    folder = repository_root() / "evalsets"
    for candidate in (Path(name), repository_root() / name, folder / f"{name}.jsonl"):
        if candidate.is_file():
            return load_eval_set(candidate)
    known = ", ".join(sorted(path.stem for path in folder.glob("*.jsonl")))
    raise RequestError(f"eval set {name}: no such file, and evalsets/ holds {known}")


def compare_models(run: Run) -> Comparison:
    """Before against after, and each against itself, by the rule that the configuration stated beforehand.

    Raises RetraceError where an evaluation found in the folder is of other weights than the run's.
    """
    before, after = evaluate_model(run, "before"), evaluate_model(run, "after")
    record = training_record(run)
    expected = {"before": record["inputs"]["base_weights_sha256"], "after": record["weights_sha256"]}
    again = {name: read_results(run.path(file)) for name, file in CONTROLS.items()}
    for files, found in [(OUTPUTS, {"before": before, "after": after}), (CONTROLS, again)]:
        for name, answers in found.items():
            if answers.weights_sha256 != expected[name]:
                file = run.path(files[name])
                raise RetraceError(f"{file}: answers of other weights than this run's; delete it and run again")
    rule = run.config.evaluation.verdict
    controls = [control(before, again["before"], rule), control(after, again["after"], rule)]
    return compare(before, after, rule)._replace(controls=controls)


def find_leaks(dataset: Dataset, config: Config) -> list[Leak]:
    """Every item that the configuration evaluates and a trace of the dataset asks, too."""
    return audit(dataset.traces, find_eval_set(config.evaluation.eval_set).items[: config.evaluation.limit])


def find_all_leaks(dataset: Dataset) -> dict[str, list[Leak]]:
    """The same for every eval set of evalsets/, by its name."""
    return {eval_set.name: audit(dataset.traces, eval_set.items) for eval_set in published_eval_sets()}


def published_eval_sets() -> list[EvalSet]:
    return [load_eval_set(path) for path in sorted((repository_root() / "evalsets").glob("*.jsonl"))]


def training_record(run: Run) -> dict[str, Any]:
    """What training left in the checkpoint: `training`, `weights_sha256`, `fingerprint`. Raises RequestError."""
    file = run.path("checkpoint-final", "model.json")
    if not file.is_file():
        raise RequestError(f"{run.folder}: not trained yet (no checkpoint-final); run the notebook 03_train first")
    return json.loads(file.read_bytes())


def metrics(run: Run) -> list[dict[str, float]]:
    """The logged lines of training."""
    return [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]


def write_report(run: Run) -> Comparison:
    """`delta_report.md`, `eval_summary.json`, `evidence.json` and `report.html` of a run whose models are evaluated."""
    # here, as matplotlib takes longer to come up than most of the stages before
    from lib.experiments.report import RunFacts, drawings, shown_prompts, write_markdown, write_page

    comparison = compare_models(run)  # which makes what is not there yet, the dataset too
    dataset = load_dataset(datasets(), dataset_key(run.config.dataset))
    comparison = comparison._replace(leaks=find_leaks(dataset, run.config))
    model = training_record(run)
    drawn = drawings(comparison, metrics(run))
    write_markdown(run.path("delta_report.md"), comparison)
    write_json(run.path("eval_summary.json"), figures(comparison))
    record = {
        "evidence_version": VERSION,
        "run": run.name,
        "run_id": run.state["run_id"],
        "created_at": run.state["created_at"],
        "config": run.path(CONFIG).read_text("utf-8"),
        "code": code_of(run.state["attempts"][-1]) if "attempts" in run.state else save_code(run.folder),
        "fingerprint": model["fingerprint"],
        "fingerprint_changed": model["fingerprint_changed"],
        "environment": environment(),
        "dataset": {name: dataset.manifest[name] for name in ("dataset_key", "created_at", "provenance")},
        "results": results(run.folder, dataset.manifest["content_sha256"], list(drawn.values())),
    }
    write_json(run.path(EVIDENCE), record)
    facts = RunFacts(
        config=run.config,
        dataset=dataset.manifest,
        example=training_examples(run)[0],
        tokenizer=load_tokenizer(run.path("checkpoint-final", "tokenizer.json")),
        metrics=metrics(run),
        training=model["training"],
        record=record,
        nearest=nearest(dataset.traces, shown_prompts(comparison)),
        reproduce=reproduce_command(run),
    )
    write_page(run.path("report.html"), comparison, facts, drawn)
    return comparison


def reproduce_command(run: Run) -> str:
    """What re-executes the run and compares every result; to be given in the repository."""
    root = repository_root()
    python = ".venv/bin/python" if Path(sys.prefix) == root / ".venv" else "python"
    place = "" if home() == root / "runs" else f" --home {home()}"
    return f"{python} -m lib{place} runs reproduce {run.name}"
