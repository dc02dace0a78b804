"""Where the time of the quickstart goes: one line a stage, with its wall seconds and its rate; and what notebooks cost.

    python benchmarks/quickstart.py [CONFIG] [--turns N]

Each stage is called as the notebooks call it, in one process with their allocator and a temporary home, without pages;
what compiling adds to the first call is within the figure, as users wait for it too. Then the same configuration is
run as a user runs it, by the pipeline in a home of its own: what that takes longer are kernels that start, packages
that are imported again in each, programs that are traced again in each, figures, and pages that are rendered. Both take
turns, as a machine that is shared is not always as fast. The second ratio is of the pipeline alone, and so of one and
the same minute, and it is the milder: its wall to the time of its notebooks' cells, with their imports, what they trace
again and their figures.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

SECONDS: list[float] = []
ALL = "the work, in all"


def main(config: str, turns: int) -> None:
    ratios = []
    for turn in range(turns):
        printed, _, _ = alone([sys.executable, __file__, config, "--work"])
        work = float(re.search(rf"{ALL} +([\d.]+) s", printed)[1])
        _, pipeline, cells = alone([sys.executable, "-m", "lib", "run", config])
        ratios.append((pipeline / work, pipeline / cells))
        print(printed if turn == 0 else f"{ALL:<22} {work:8.2f} s\n", end="")
        print(f"{'the pipeline':<22} {pipeline:8.2f} s ", said(ratios[-1]), flush=True)
    print(f"{'median':<34}", said([statistics.median(both) for both in zip(*ratios, strict=True)]))


def said(ratios: Sequence[float]) -> str:
    return f"{ratios[0]:12.2f} times the work {ratios[1]:6.2f} times its cells"


def alone(command: list[str]) -> tuple[str, float, float]:
    """What a command prints in a home of its own, its wall seconds, and those of the cells of notebooks in there."""
    from lib.experiments.kernels import KERNEL_ENVIRONMENT

    with tempfile.TemporaryDirectory() as folder:
        environment = KERNEL_ENVIRONMENT | os.environ | {"RETRACE_HOME": folder}  # the allocator's is read at the start
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL)  # fmt: skip
        wall = time.perf_counter() - started
        notebooks = [json.loads(file.read_bytes()) for file in Path(folder).glob("*/*.ipynb")]
        timed = [cell["metadata"].get("papermill", {}) for notebook in notebooks for cell in notebook["cells"]]
        return done.stdout, wall, sum(about.get("duration") or 0 for about in timed)


def measure(config_path: str) -> None:
    from lib.config import load_config
    from lib.data.validation import encode_all
    from lib.experiments import stages
    from lib.experiments.run import create_run

    config = load_config(config_path)
    run = create_run(config)
    print(f"{config.name} on {os.cpu_count()} cores, NPROC {os.environ['NPROC']}, Python {platform.python_version()}")
    added = timed("generate and store", lambda: stages.make_traces(config), lambda made: (made.added, "traces"))
    timed(
        "verify each step", lambda: stages.verify_traces(stages.store().scan()), lambda made: (made.checked, "traces")
    )
    timed("build dataset", lambda: stages.make_dataset(config), lambda _: (added.added, "traces"))
    examples = timed("export and read back", lambda: stages.training_examples(run), lambda made: (len(made), "traces"))
    model = timed("base model made", lambda: stages.model_before(config), lambda _: (0, ""))
    encoded = encode_all(examples, model.tokenizer, config.model.max_length)
    each = sum(len(item.tokens) for item in encoded) / len(encoded)
    steps = config.training.num_steps * config.training.per_device_batch_size * config.training.grad_accum_steps
    timed("evaluate base", lambda: stages.evaluate_model(run, "before"), written)
    timed("train", lambda: stages.train_model(run, model), lambda _: (round(steps * each), "tokens"))
    timed("evaluate tuned", lambda: stages.evaluate_model(run, "after"), written)
    timed("compare and report", lambda: stages.write_report(run), lambda made: (made.paired.n, "items"))
    print(f"{ALL:<22} {sum(SECONDS):8.2f} s")


def timed(stage: str, work: Callable[[], Any], amount: Callable[[Any], tuple[int, str]]) -> Any:
    """Do the work, print its line, and return what it made."""
    started = time.perf_counter()
    made = work()
    seconds = time.perf_counter() - started
    SECONDS.append(seconds)
    number, unit = amount(made)
    rate = f"{number / seconds:12,.0f} {unit}/s" if number else ""
    print(f"{stage:<22} {seconds:8.2f} s {rate}", flush=True)
    return made


def written(results: Any) -> tuple[int, str]:
    return sum(item.num_tokens for item in results.items), "tokens"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--work", action="store_true", help="the stages alone, in this process")
    given = arguments.parse_args()
    if given.work:
        measure(given.config)
    else:
        main(given.config, given.turns)
