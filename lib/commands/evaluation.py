"""Evaluation: make an eval set, answer one, and compare two evaluations."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.commands.manners import answer
from lib.commands.parser import (
    at_least,
    config_files,
    config_flags,
    eval_sets,
    flag,
    group,
    pairs,
    reasoning_gym_flag,
    use_reasoning_gym,
    verb,
)
from lib.commands.traces import say_left_out
from lib.errors import RequestError
from lib.files import check_writable, shown_path


def add(verbs: Any) -> None:
    evaluation = group(verbs, "eval", "Answer an eval set, and compare two evaluations.",
                       "eval generate --model runs/duel/checkpoint-final --eval-set high_card_duel_v1 --output a.jsonl",
                       "eval report --before b.jsonl --after a.jsonl --output delta_report.md")  # fmt: skip
    made = verb(evaluation, "make", eval_make, "Make an eval set from a generator of reasoning-gym.",
                "eval make --generator reasoning_gym:gcd --count 100 --seed 42 --output my_gcd_v1.jsonl")  # fmt: skip
    flag(made, "--generator", required=True, metavar="reasoning_gym:NAME", help="docs/reasoning_gym.md lists them")
    flag(made, "--count", type=at_least(1), required=True, metavar="N", help="items of it")
    flag(made, "--seed", type=at_least(0), required=True, metavar="N", help="what they are drawn by")
    flag(made, "--option", action="append", default=[], metavar="KEY=VALUE", help="of the generator; VALUE is YAML")
    flag(made, "--output", type=Path, required=True, metavar="E.jsonl", help="with E.manifest.json beside it")
    reasoning_gym_flag(made)
    made = verb(evaluation, "generate", eval_generate, "Answer an eval set with a model, and score the answers.",
                "eval generate --model runs/duel/checkpoint-final --eval-set high_card_duel_v1 --output O")  # fmt: skip
    flag(
        made, "--model", required=True, metavar="base|CHECKPOINT", help="a checkpoint's folder, or the base of --config"
    )
    flag(
        made, "--eval-set", required=True, metavar="E.jsonl", help="a file, or a name in evalsets/", complete=eval_sets
    )
    flag(made, "--output", type=Path, required=True, metavar="O.jsonl", help="one line a completion, with its score")
    config_flags(made, required=False)
    reasoning_gym_flag(made)
    flag(made, "--seed", type=at_least(0), metavar="N",
         help="of the initial weights of a base made from scratch (default: the configuration's)")  # fmt: skip
    made = verb(evaluation, "report", eval_report, "Compare two evaluation outputs: the delta report.",
                "eval report --before before.jsonl --after after.jsonl --output delta_report.md")  # fmt: skip
    flag(made, "--before", type=Path, required=True, metavar="B.jsonl", help="answers of the base")
    flag(made, "--after", type=Path, required=True, metavar="A.jsonl", help="answers of the tuned model")
    flag(made, "--output", type=Path, required=True, metavar="R.md", help="the report")
    flag(made, "--config", metavar="C.yaml", complete=config_files,
         help="states the rule of the verdict (default: p < 0.05 and at least 1 point)")  # fmt: skip


def eval_make(arguments: argparse.Namespace) -> None:
    from lib.evaluation.evalsets import write_eval_set
    from lib.evaluation.reasoning_gym_items import reasoning_gym_items
    from lib.tasks.reasoning_gym import NAME, VERSION
    from lib.trace import utc_now

    use_reasoning_gym(arguments)
    source, _, generator = arguments.generator.partition(":")
    if source != NAME or not generator:
        raise RequestError(f"--generator: expected {NAME}:NAME, got {arguments.generator!r}")
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
    say_left_out(made.left_out, made.draws, "draws")
    path = shown_path(arguments.output)
    answer(
        {"eval_set": eval_set.name, "items": len(made.items), "sha256": eval_set.sha256, "output": path},
        f"{eval_set.name}: {len(made.items)} items, sha256 {eval_set.sha256[:16]}: {path}",
    )


def _options(given: list[str]) -> dict[str, Any]:
    """`key=value` flags, each key once; the values are read as YAML."""
    options = pairs(given, "--option")
    for key in options:
        if sum(word.startswith(f"{key}=") for word in given) > 1:
            raise RequestError(f"--option {key}: given twice")
    return options


def eval_generate(arguments: argparse.Namespace) -> None:
    from lib.config import ONE_DEVICE, EvaluationConfig, load_config
    from lib.evaluation.evaluate import answer_eval_set, write_results
    from lib.evaluation.scoring import check_scorers
    from lib.experiments.stages import find_eval_set, model_before
    from lib.model.processes import by_first
    from lib.model.weights import load_model, read_about

    use_reasoning_gym(arguments)
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
        if arguments.seed is not None:
            raise RequestError("--seed: is that of the base's random weights; a checkpoint has its own")
        instruction = read_about(Path(arguments.model))["system_instruction"]
        model, label = load_model(Path(arguments.model), config.parallelism if config else ONE_DEVICE), "tuned"
    settings = config.evaluation if config else EvaluationConfig()
    records = answer_eval_set(model, eval_set, settings, f"{model.name} ({label})", instruction)
    by_first(lambda: write_results(arguments.output, records))
    correct = sum(record["score"] == 1 for record in records)
    samples = settings.sampling.samples
    each = f", {samples} times each" if samples > 1 else ""
    items, path = len(records) // samples, shown_path(arguments.output)
    answer(
        {"eval_set": eval_set.name, "items": items, "samples": samples, "correct": correct, "output": path},
        f"{items} items of {eval_set.name} answered{each}, {correct} correctly: {path}",
    )


def eval_report(arguments: argparse.Namespace) -> None:
    from lib.config import VerdictConfig, load_config
    from lib.evaluation.compare import compare, doubt, figures
    from lib.evaluation.results import read_results
    from lib.experiments.report import write_markdown

    rule = load_config(arguments.config, []).evaluation.verdict if arguments.config else VerdictConfig()
    before, after = read_results(arguments.before), read_results(arguments.after)
    comparison = compare(before, after, rule)._replace(doubt=doubt(before, after))
    write_markdown(arguments.output, comparison)
    path = shown_path(arguments.output)
    answer({"report": path} | figures(comparison), comparison.headline, f"Report: {path}")
