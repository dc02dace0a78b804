"""Models: fine-tune one on a file, and write one out for other libraries."""

import argparse
from pathlib import Path
from typing import Any

from lib.commands.manners import answer, report, say_on
from lib.commands.parser import config_flags, flag, run_names, verb
from lib.files import shown_path


def add(verbs: Any) -> None:
    made = verb(verbs, "train", train, "Fine-tune on a training file; goes on where an interrupted one stopped.",
                "train --config configs/quickstart.yaml --data duel.jsonl --output runs/duel")  # fmt: skip
    config_flags(made, required=True)
    flag(made, "--data", type=Path, required=True, metavar="D.jsonl", help="in any of the export formats")
    flag(made, "--output", type=Path, required=True, metavar="DIR", help="a folder, new or of this very training")
    flag(made, "--dry-run", action="store_true",
         help="check everything that needs no training, and write a manifest that says so")  # fmt: skip

    made = verb(verbs, "export", export, "Write a tuned model as the folder that Hugging Face libraries load.",
                "export 20261122_101500_quickstart --to exported")  # fmt: skip
    flag(made, "run", metavar="RUN", help="a run folder, its name in the home, or a checkpoint folder",
         complete=run_names)  # fmt: skip
    flag(made, "--to", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    flag(made, "--dtype", choices=("float32", "bfloat16"), default="", help="default: as the checkpoint has them")
    flag(made, "--adapters", action="store_true", help="LoRA's adapters alone, for peft; else they are merged")


def train(arguments: argparse.Namespace) -> None:
    from lib.config import load_config
    from lib.experiments.training import check_training, train_on_file

    config = load_config(arguments.config, arguments.set)
    if arguments.dry_run:
        lines = check_training(config, arguments.data, arguments.output)
        report({"dry_run": True, "checked": lines}, lines)
        return
    result = train_on_file(config, arguments.data, arguments.output, lambda line: say_on(_metrics(line)), say_on)
    checkpoint = shown_path(arguments.output / "checkpoint-final")
    answer(
        result._asdict() | {"checkpoint": checkpoint},
        f"{result.steps} steps, loss {result.loss:.4g}, {result.tokens_per_second:.0f} tokens/s, "
        f"{result.seconds:.0f} s{f', resumed from step {result.resumed_from}' if result.resumed_from else ''}",
        f"weights sha256 {result.weights_sha256}",
        f"Checkpoint: {checkpoint}",
    )


def _metrics(line: dict[str, float]) -> str:
    held_out = f"  held out {line['held_out_loss']:.4f}" if "held_out_loss" in line else ""
    return f"step {line['step']:>6}  loss {line['loss']:.4f}  {line['tokens_per_second']:.0f} tokens/s{held_out}"


def export(arguments: argparse.Namespace) -> None:
    from lib.experiments.export import export_model

    done = export_model(arguments.run, arguments.to, arguments.dtype, arguments.adapters)
    answer(
        done._asdict() | {"folder": shown_path(arguments.to)},
        f"{done.name}: {done.parameters:,} parameters in {done.dtype}, weights sha256 {done.weights_sha256[:16]}",
        f"Exported: {shown_path(arguments.to)}; its README.md says where the model is from",
    )
