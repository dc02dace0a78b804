"""Datasets: choose traces, write them out, and look at what training would see."""

import argparse
from pathlib import Path
from typing import Any

from lib.commands.manners import answer, as_json, report, say, tell, tell_json, write_lines
from lib.commands.parser import at_least, config_files, dataset_keys, flag, group, pairs, share, verb
from lib.errors import RequestError, RetraceError
from lib.files import shown_path

# The rules of `dataset build` by which a trace is left out, as flags: how each is given, and what it says.
CURATION: dict[str, tuple[dict[str, Any], str]] = {
    "min-characters": ({"type": at_least(0), "metavar": "N"}, "of question, steps and answer together"),
    "max-characters": ({"type": at_least(0), "metavar": "N"}, "of question, steps and answer together"),
    "min-steps": ({"type": at_least(0), "metavar": "N"}, "of the reasoning"),
    "max-steps": ({"type": at_least(0), "metavar": "N"}, "of the reasoning"),
    "min-ascii": (
        {"type": share, "metavar": "SHARE"}, "share of the characters that are ASCII, to leave out other scripts"
    ),
    "scripts": (
        {"nargs": "+", "metavar": "SCRIPT"}, "writing systems that stay, by their names in Unicode: Latin Han"
    ),
    "min-in-scripts": (
        {"type": share, "metavar": "SHARE"}, "share of the letters that is of one of them (default: 0.9)"
    ),
    "verified": ({"action": "store_true"}, "only what an engine finds true in every step"),
    "unique": ({"action": "store_true"}, "of the same question, steps and answer only the first"),
    "near-duplicates": (
        {"type": share, "metavar": "SHARE"},
        "of traces whose words overlap by this share (such as 0.8) only the first",
    ),
}  # fmt: skip


def add(verbs: Any) -> None:
    dataset = group(verbs, "dataset", "Build, export, validate, describe, compare and list datasets.",
                    "dataset build --name duel --version v1", "dataset list")  # fmt: skip
    made = verb(dataset, "build", dataset_build, "Choose traces from the store, under a key that never changes.",
                "dataset build --name duel --version v1 --filter game=high_card_duel",
                "dataset build --request request.yaml")  # fmt: skip
    flag(made, "--request", type=Path, metavar="R.yaml", help="the whole request as a file")
    flag(made, "--name", help="with the version the key, NAME-VERSION")
    flag(made, "--version", help="another choice of traces needs another one")
    flag(made, "--filter", action="append", default=[], metavar="KEY=VALUE",
         help="a meta value; the same key again means either")  # fmt: skip
    for name, (how, what) in CURATION.items():
        flag(made, f"--{name}", help=what, **how)
    flag(made, "--limit", type=at_least(1), metavar="N", help="at most so many traces (default: all that match)")
    flag(made, "--strategy", choices=("latest", "random"), help="which of them come first (default: latest)")
    flag(made, "--seed", type=at_least(0), metavar="N", help="what the strategy random draws by")
    made = verb(dataset, "export", dataset_export, "Write a dataset as JSONL.",
                "dataset export duel-v1 --format messages", figures=False)  # fmt: skip
    flag(made, "key", metavar="KEY", complete=dataset_keys)
    flag(made, "--format", required=True, metavar="F", help="trace, tunix_sft, training_example or messages",
         complete=lambda **context: ["trace", "tunix_sft", "training_example", "messages"])  # fmt: skip
    flag(made, "--recipe",
         help="trace_sft_v1 (default), answer_sft_v1 (the answer alone) or shuffled_answers (of another trace)",
         complete=lambda **context: ["trace_sft_v1", "answer_sft_v1", "shuffled_answers"])  # fmt: skip
    flag(made, "--config", metavar="C.yaml", help="take the recipe and the system instruction from this configuration",
         complete=config_files)  # fmt: skip
    flag(made, "--system-instruction", metavar="TEXT", help="put before every prompt")
    flag(made, "--output", type=Path, metavar="F.jsonl", help="default: standard output")
    made = verb(dataset, "validate", dataset_validate, "What training would see: shape, lengths, trained tokens.",
                "dataset validate duel-v1 --max-length 512")  # fmt: skip
    flag(made, "name", metavar="KEY|FILE", help="a dataset, or a file in any of the export formats",
         complete=dataset_keys)  # fmt: skip
    flag(made, "--samples", type=at_least(0), default=0, metavar="N",
         help="examples to measure, spread evenly (default: all)")  # fmt: skip
    flag(made, "--max-length", type=at_least(1), default=512, metavar="N",
         help="tokens an example may have (default: 512)")  # fmt: skip
    flag(made, "--tokenizer", default="", metavar="PATH|HUB_NAME",
         help="of a released model: its tokenizer.json, folder or name (default: the one of the dataset)")  # fmt: skip
    verb(dataset, "list", dataset_list, "The datasets that are built.", "dataset list")
    made = verb(dataset, "card", dataset_card, "A README.md for the Hub: what a dataset holds, where from, how chosen.",
                "dataset card duel-v1 --output upload/README.md", figures=False)  # fmt: skip
    flag(made, "key", metavar="KEY", complete=dataset_keys)
    flag(made, "--output", type=Path, metavar="README.md",
         help="names the exports that lie beside it (default: standard output)")  # fmt: skip
    made = verb(dataset, "diff", dataset_diff, "Two datasets: which rows were added, removed and changed.",
                "dataset diff duel-v1 duel-v2 --output diff.html")  # fmt: skip
    flag(made, "before", metavar="A", complete=dataset_keys)
    flag(made, "after", metavar="B", complete=dataset_keys)
    flag(made, "--output", type=Path, metavar="R.html|R.md", help="the whole of it, as a page with figures or Markdown")


def dataset_build(arguments: argparse.Namespace) -> None:
    from lib.config import DatasetConfig, build, parse_yaml
    from lib.data.dataset import build_dataset
    from lib.experiments.stages import datasets, find_all_leaks, reserved_questions, store

    if arguments.request:
        if given := [name for name in ("name", "version", "filter", "limit", "strategy", "seed", *CURATION)
                     if _is_given(arguments, name)]:  # fmt: skip
            raise RequestError(f"--request holds the whole request; leave out --{given[0]}")
        tree = parse_yaml(_text(arguments.request), str(arguments.request))
        request = build(DatasetConfig, tree, str(arguments.request))
    elif arguments.name and arguments.version:
        tree = {
            "dataset_name": arguments.name,
            "dataset_version": arguments.version,
            "filters": pairs(arguments.filter, "--filter"),
            "selection_strategy": arguments.strategy or "latest",
            "curation": {_field(name): _given(arguments, name) for name in CURATION if _is_given(arguments, name)},
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
    leaks = {name: found for name, found in find_all_leaks(dataset).items() if found}
    answer(
        {
            "dataset_key": dataset.key, "folder": shown_path(dataset.folder), "trace_count": manifest["trace_count"],
            "content_sha256": manifest["content_sha256"], "dropped": manifest["dropped"],
            "leaks": {name: [leak._asdict() for leak in found] for name, found in leaks.items()},
        },
        f"{dataset.key}: {manifest['trace_count']} traces, content {manifest['content_sha256'][:16]}, "
        f"in {shown_path(dataset.folder)}",
        *(f"  left out: {count} {reason}" for reason, count in manifest["dropped"].items()),
    )  # fmt: skip
    for name, found in leaks.items():
        say(f"  warning: {len({leak.item for leak in found})} items of {name} are asked in other words")
        for leak in found[:5]:
            say(f"    {leak.item} by trace {leak.trace} ({leak.kind}, {leak.similarity})")


def _field(flag: str) -> str:
    return flag.replace("-", "_")


def _given(arguments: argparse.Namespace, flag: str) -> Any:
    return getattr(arguments, _field(flag))


def _is_given(arguments: argparse.Namespace, flag: str) -> bool:
    value = _given(arguments, flag)  # 0 is a value
    return value is not None and value is not False and value != []


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def dataset_export(arguments: argparse.Namespace) -> None:
    from lib.data.dataset import load_dataset
    from lib.data.export import export_lines
    from lib.experiments.stages import datasets

    rendering = _rendering(arguments)
    traces = load_dataset(datasets(), arguments.key).traces
    write_lines(arguments.output, export_lines(traces, arguments.format, **rendering))
    if arguments.output:
        say(f"{len(traces)} examples in {shown_path(arguments.output)}")


def _rendering(arguments: argparse.Namespace) -> dict[str, str]:
    """The recipe and the system instruction, as far as they are given: by flags, or whole by a configuration."""
    from lib.config import load_config

    given = [name for name in ("recipe", "system-instruction") if _is_given(arguments, name)]
    if not arguments.config:
        return {_field(name): _given(arguments, name) for name in given}
    if given:
        raise RequestError(f"--config holds the recipe and the system instruction; leave out --{given[0]}")
    config = load_config(arguments.config)
    return {"recipe": config.recipe, "system_instruction": config.system_instruction}


def dataset_validate(arguments: argparse.Namespace) -> None:
    from lib.data.validation import too_long
    from lib.experiments.lengths import measure

    examples, found, by = measure(arguments.name, arguments.tokenizer, arguments.samples)
    problem = too_long(found, arguments.max_length)
    report(
        {
            "name": arguments.name, "examples": examples, "measured": found.examples, "tokenizer": by,
            "tokens": {"min": found.percentile(0), "max": found.percentile(100), "mean": found.mean,
                       "p95": found.percentile(95), "total": found.tokens, "trained_on": found.trained_tokens},
            "max_length": arguments.max_length, "fits": not problem,
            "longest": {"id": found.longest[0].id, "tokens": found.longest[0].tokens},
        },
        [
            f"{arguments.name}: {examples} examples, each with a user's and a model's turn; {found.examples} measured",
            f"tokens ({by}): {found.percentile(0)} to {found.percentile(100)}, mean {found.mean:.1f}, "
            f"95 % have at most {found.percentile(95)}; max_length {arguments.max_length}",
            f"trained on: {found.trained_tokens} of {found.tokens} tokens ({found.trained_tokens / found.tokens:.1%})",
        ],
    )  # fmt: skip
    if problem:
        raise RetraceError(problem)
    fit = "all fit" if found.examples == examples else f"{found.examples} of {examples} measured: all fit"
    say(f"{fit}; the longest is {found.longest[0].id} ({found.longest[0].tokens} tokens)")


def dataset_list(arguments: argparse.Namespace) -> None:
    from lib.data.dataset import list_datasets, read_manifest
    from lib.experiments.stages import datasets

    manifests = [read_manifest(datasets(), key) for key in list_datasets(datasets())]
    if as_json():
        tell_json([{name: value for name, value in m.items() if name != "trace_ids"} for m in manifests])
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
    write_lines(arguments.output, [text.encode()])
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
    report(as_json(diff), summary(diff))
    if arguments.output:
        say(f"Diff: {shown_path(arguments.output)}")
