"""Where the time of the quickstart goes: one line a stage, with its wall seconds and its rate.

    make benchmark        (or: python benchmarks/quickstart.py [CONFIG])

Each stage is called as the notebooks call it, in one process and a temporary home, without notebooks and pages;
what compiling adds to the first call is within the figure, as users wait for it too.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

# Read by the C library when the process starts; see lib/experiments/notebooks.py, which sets it for the kernels.
if "GLIBC_TUNABLES" not in os.environ:
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})


def main(config_path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RETRACE_HOME"] = folder
        measure(config_path)


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
    model = timed("make base model", lambda: stages.model_before(config), lambda _: (0, ""))
    encoded = encode_all(examples, model.tokenizer, config.model.max_length)
    each = sum(len(item.tokens) for item in encoded) / len(encoded)
    steps = config.training.num_steps * config.training.per_device_batch_size * config.training.grad_accum_steps
    timed("evaluate base", lambda: stages.evaluate_model(run, "before"), written)
    timed("train", lambda: stages.train_model(run), lambda _: (round(steps * each), "tokens"))
    timed("evaluate tuned", lambda: stages.evaluate_model(run, "after"), written)
    timed("compare and report", lambda: stages.write_report(run), lambda made: (made.paired.n, "items"))


def timed(stage: str, work: Callable[[], Any], amount: Callable[[Any], tuple[int, str]]) -> Any:
    """Do the work, print its line, and return what it made."""
    started = time.perf_counter()
    made = work()
    seconds = time.perf_counter() - started
    number, unit = amount(made)
    rate = f"{number / seconds:12,.0f} {unit}/s" if number else ""
    print(f"{stage:<22} {seconds:8.2f} s {rate}", flush=True)
    return made


def written(results: Any) -> tuple[int, str]:
    return sum(item.num_tokens for item in results.items), "tokens"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "configs/quickstart.yaml")
