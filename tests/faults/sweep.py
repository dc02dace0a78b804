"""The kill sweep: killed at every point where it could be, and resumed, a run must come to one and the same end.

    .venv/bin/python tests/faults/sweep.py              a toy training, at every step and inside every save
    .venv/bin/python tests/faults/sweep.py records      what the runner writes, at every write; notebooks are stubs
    .venv/bin/python tests/faults/sweep.py pipeline     the whole job, at every step, save and stage boundary
    .venv/bin/python tests/faults/sweep.py moments      a toy training, at random moments of its saves

Each prints, as its last line, `N kills, M distinct hashes`, and ends with status 0 where M is 1; `--few` takes some of
the points. What is hashed is all that a run came to: weights, the digest of weights and optimizer state at each
checkpoint, every logged number, what each stage is recorded to have made, and which files are there, so that
leftovers of a kill count as a difference.

A point is where the code passes on its way, found out by a first run that notes down each of them. What is killed
of the first two is a fork of this process, which has imported everything and started nothing.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import subject

sys.path.insert(0, str(subject.INJECT))

# Around each write of a file: before anything is written, before it is flushed and its folder, around the rename.
WRITES = [
    ("lib.files:os.fdopen", "before"),
    ("lib.files:os.fsync", "before"),
    ("lib.files:os.replace", "before"),
    ("lib.files:os.replace", "after"),
]
# Where a training passes: around each step, inside each save, and while old checkpoints are removed.
REMOVAL = "shutil:os.unlink"
TRAINING = [
    ("lib.training.loop:_batch", "before"),
    ("lib.training.loop:_append", "before"),
    ("lib.training.loop:_append", "after"),
    ("lib.training.loop:save_checkpoint", "before"),
    ("lib.training.loop:save_checkpoint", "after"),
    ("etils.epath.backend:os.rename", "before"),
    ("etils.epath.backend:os.rename", "after"),
    (REMOVAL, "before"),
    ("shutil:os.rmdir", "before"),
    ("lib.training.loop:save_model", "before"),
    ("lib.training.loop:save_model", "after"),
    *WRITES,
]
RUNNER = [
    ("lib.experiments.pipeline:execute", "before"),
    ("lib.experiments.pipeline:execute", "after"),
    ("lib.experiments.pipeline:Path.unlink", "before"),
    ("lib.experiments.pipeline:Path.unlink", "after"),
    *WRITES,
]
STUBS = {
    "01_traces": {}, "02_dataset": {"train.tunix_sft.jsonl": "{}"},
    "04_evaluate_before": {"eval_before.jsonl": "{}", "control_before.jsonl": "{}"},
    "03_train": {"checkpoints/inputs.json": "{}", "checkpoint-final/model.json": '{"weights_sha256": "0"}'},
    "04_evaluate_after": {"eval_after.jsonl": "{}", "control_after.jsonl": "{}"},
    "05_compare": {"eval_summary.json": '{"sentence": "Same."}'},
}  # fmt: skip
NOTEBOOK = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'


class Point(NamedTuple):
    """The nth time that a process passes somewhere."""

    at: str
    when: str
    nth: int

    def fault(self, **more: Any) -> dict[str, Any]:
        return self._asdict() | {"do": "kill"} | more


Outcome = dict[str, Any]


class End(NamedTuple):
    """What a run came to, and how often and where it was killed before."""

    outcome: Outcome
    kills: int = 0
    where: str = "nowhere"


def digest(outcome: Outcome) -> str:
    return hashlib.sha256(json.dumps(outcome, sort_keys=True).encode()).hexdigest()


def files(folder: Path) -> list[str]:
    """Every file and folder; those that Orbax names at random, under one name."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return sorted({re.sub(r"/d/[0-9a-f]{32}$", "/d/…", name) for name in names})


def training_outcome(folder: Path) -> Outcome:
    from lib.experiments.evidence import LOGGED

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    return {
        "weights": json.loads((folder / "checkpoint-final" / "model.json").read_bytes())["weights_sha256"],
        "losses": [[line.get(name) for name in LOGGED] for line in lines("metrics.jsonl")],
        "checkpoints": lines("checkpoints.jsonl"),
        "digests": {
            str(file.relative_to(folder)): json.loads(file.read_bytes())["sha256"]
            for file in sorted(folder.rglob("digest.json"))
        },
        "files": files(folder),
    }


def run_outcome(folder: Path) -> Outcome:
    found = {"recorded": subject.recorded(folder), "files": files(folder), "home": files_of_home(folder.parent)}
    assert json.loads((folder / "run_manifest.json").read_bytes())["status"] == "done"
    if (folder / "evidence.json").is_file():
        found |= {"results": subject.results(folder), "training": training_outcome(folder)}
    return found


def files_of_home(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir() if path.is_file())


# ---- in forks of this process ------------------------------------------------------------------------------


def forked(do: Callable[[], None], faults: list[dict[str, Any]], log: Path) -> int:
    """Do it in a process of its own, in which the faults are armed. Returns its status as `os` tells it."""
    sys.stdout.flush()
    if child := os.fork():
        deadline = time.monotonic() + subject.PATIENCE
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                raise TimeoutError(f"not ended after {subject.PATIENCE} s, with the faults {faults}")
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(ended[1])
    status = 1
    try:
        import sitecustomize

        os.environ["RETRACE_FAULT_LOG"] = str(log)
        sitecustomize.arm(faults)
        do()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def points_of(do: Callable[[], None], places: list[tuple[str, str]], log: Path) -> list[Point]:
    """Every passage of an undisturbed run, in order."""
    assert forked(do, [{"at": at, "when": when, "do": "note"} for at, when in places], log) == 0
    noted = [json.loads(line) for line in log.read_text().splitlines()]
    return [Point(line["at"], line["when"], line["nth"]) for line in noted]


def killed(do: Callable[[], None], fault: dict[str, Any], log: Path) -> bool:
    """Whether it came to the fault; only a removal may not come, as checkpoints differ in how many files they have."""
    status = forked(do, [fault], log)
    spared = status == 0 and fault["at"] == REMOVAL
    assert spared or status == -signal.SIGKILL, f"{fault}: not killed there, but ended with {status}"
    return not spared


def train_toy(output: Path) -> None:
    """Eight steps, a checkpoint after every second, on examples and a model that are drawn anew each time."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from lib.config import Config, DatasetConfig, ModelConfig, TrainingConfig
    from lib.data.dataset import dataset_tokenizer
    from lib.data.renderer import render_example
    from lib.data.selection import is_held_out
    from lib.experiments.run import sweep
    from lib.model.gemma import Gemma, GemmaConfig
    from lib.model.weights import Model
    from lib.tasks import high_card_duel
    from lib.training.loop import train

    traces = high_card_duel.generate(60, seed=0, created_at="2025-01-01T00:00:00Z")
    rendered = [render_example(trace, "answer_sft_v1") for trace in traces]
    held = [example for example in rendered if is_held_out(example.prompt)]
    examples = [example for example in rendered if not is_held_out(example.prompt)][:6] + held[:1]
    tokenizer, source = dataset_tokenizer(rendered), np.random.default_rng(0)
    shape = GemmaConfig(tokenizer.vocab_size, 1, 16, hidden_dim=24, num_heads=4, num_kv_heads=2, head_dim=8)
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma(shape, nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: jnp.asarray(source.normal(0, 0.2, leaf.shape), leaf.dtype), state)
    config = Config(
        "toy",
        DatasetConfig("toy", "v1"),
        model=ModelConfig(max_length=80),
        training=TrainingConfig(
            num_steps=8, learning_rate=3e-2, warmup_steps=2, per_device_batch_size=2, log_every=1, eval_every=4,
            checkpoint_every=2,
        ),
    )  # fmt: skip
    sweep(output)  # as the commands do before they train
    train(Model("toy", shape, graph, nnx.to_pure_dict(params), tokenizer), examples, config, output)


def sweep_training(folder: Path, some: bool) -> Iterator[End]:
    """A toy training: at each step, inside each save, each write and each removal of an old checkpoint."""
    import lib.training.loop  # noqa: F401

    found = points_of(lambda: train_toy(folder / "whole"), TRAINING, folder / "passed")
    yield End(training_outcome(folder / "whole"))
    wanted = [
        Point("lib.training.loop:_batch", "before", 6),  # a step
        Point("etils.epath.backend:os.rename", "after", 2),  # a save, whose digest is not written yet
        Point(REMOVAL, "before", 2),  # the removal of an old one
    ]
    assert set(wanted) < set(found)
    for number, point in enumerate(wanted if some else found):
        output = folder / str(number)
        struck = killed(lambda: train_toy(output), point.fault(), folder / "struck")  # noqa: B023
        yield End(resumed_toy(output, folder / "struck"), int(struck), str(point))
    yield killed_again(folder / "again", folder / "struck", 2 if some else 5)


def killed_again(output: Path, log: Path, times: int) -> End:
    """Killed each time inside the save of step 6: it goes on from step 4, and no leftovers gather."""
    from lib.training.checkpoints import saved_steps

    inside = {"at": "etils.epath.backend:os.rename", "text": "checkpoints/6/", "do": "kill"}
    found = []
    for _ in range(times):
        killed(lambda: train_toy(output), inside, log)
        assert saved_steps(output / "checkpoints") == [2, 4]
        found.append(files(output))
    assert found == found[:1] * times, "leftovers gather"
    return End(resumed_toy(output, log), times, "each time inside the save of step 6")


def sweep_moments(folder: Path, some: bool) -> Iterator[End]:
    """A toy training: by a timer, so that it is killed within Orbax's own threads, too."""
    import lib.training.loop  # noqa: F401

    assert forked(lambda: train_toy(folder / "whole"), [], folder / "passed") == 0
    yield End(training_outcome(folder / "whole"))
    moments = random.Random(24)
    for number in range(1 if some else 20):
        save, delay, output = moments.choice((1, 2, 3)), moments.uniform(0, 0.1), folder / str(number)
        timer = Point("lib.training.loop:save_checkpoint", "before", save).fault(delay=delay)
        killed(lambda: train_toy(output), timer, folder / "struck")  # noqa: B023
        yield End(resumed_toy(output, folder / "struck"), 1, f"{1000 * delay:.0f} ms into save {save}")


def resumed_toy(output: Path, log: Path) -> Outcome:
    """What a killed training comes to, which goes on from its newest whole checkpoint."""
    from lib.training.checkpoints import saved_steps

    newest, done = max(saved_steps(output / "checkpoints"), default=0), output / "checkpoint-final" / "model.json"
    expected = json.loads(done.read_bytes())["training"]["resumed_from"] if done.is_file() else newest
    assert forked(lambda: train_toy(output), [], log) == 0, output
    assert json.loads(done.read_bytes())["training"]["resumed_from"] == expected
    found = training_outcome(output)
    shutil.rmtree(output)
    return found


def stubbed() -> None:
    """Stages that write what a stage writes, where it is not there yet, and conclude, in no time."""
    from lib.experiments import manifest, pipeline
    from lib.files import atomic_write

    def execute(stage, run, deadline) -> str:
        for name, content in STUBS[stage.name].items():
            if not run.path(name).is_file():
                atomic_write(run.path(name), content)
        atomic_write(
            run.path(f"{stage.name}.ipynb"), '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
        )
        return run.conclude(stage.name, "Done.")

    pipeline.execute = execute
    pipeline.save_code = lambda folder: {"git_sha": None, "git_dirty": False}
    manifest.environment = list


def run_stub(home: Path) -> None:
    from lib.config import load_config
    from lib.experiments.pipeline import resume_run, run_pipeline

    os.environ["RETRACE_HOME"] = str(home)
    begun = {path.parent for name in ("state.json", "run_manifest.json") for path in home.glob(f"*_toy*/{name}")}
    if begun:
        resume_run(str(begun.pop()), say=lambda line: None)
    else:
        run_pipeline(load_config("configs/smoke.yaml"), "toy", say=lambda line: None)


def sweep_records(folder: Path, some: bool) -> Iterator[End]:
    """What the runner writes of a run: at every write of one that begins, and of one that goes on."""
    stubbed()
    begun, interrupted, log = folder / "begun", folder / "interrupted", folder / "struck"
    begun.mkdir()
    interrupt = Point("lib.experiments.pipeline:execute", "before", 4).fault(do="interrupt")
    assert forked(lambda: run_stub(interrupted), [interrupt], log) == 130
    for base in (begun, interrupted):
        whole = shutil.copytree(base, folder / f"whole_{base.name}")
        found = points_of(lambda: run_stub(whole), RUNNER, folder / f"passed_{base.name}")  # noqa: B023
        if base == begun:
            yield End(run_outcome(next(whole.glob("*_toy*"))))
        for number, point in enumerate(found[:: len(found) // 4] if some else found):
            home = shutil.copytree(base, folder / f"{base.name}_{number}")
            killed(lambda: run_stub(home), point.fault(), log)  # noqa: B023
            check_killed(home, {"interrupted", "stale", "done"} if base == interrupted else {"stale", "done"}, point)
            for stray in home.glob(".index.html.*.tmp"):
                os.utime(stray, (0, 0))  # as if the kill was a while ago
            assert forked(lambda: run_stub(home), [], log) == 0, point  # noqa: B023
            [done] = [path.parent for path in home.glob("*_toy*/run_manifest.json")]
            yield End(run_outcome(done), 1, f"{base.name}, {point}")
            shutil.rmtree(home)


def check_killed(home: Path, allowed: set[str], where: Any) -> None:
    """Nothing torn, and no run that says it is running, or that it is done while no manifest says so."""
    from lib.experiments.run import status_of

    assert not (found := subject.torn(home)), (where, found)
    for left in home.glob("*/state.json"):
        manifest = left.parent / "run_manifest.json"
        there = json.loads(manifest.read_bytes())["status"] if manifest.is_file() else "stale"
        assert status_of(left.parent) == there and there in allowed, (where, there)


# ---- the whole job -----------------------------------------------------------------------------------------


def run_points(some: bool) -> list[tuple[str, dict[str, Any]]]:
    """Stage and fault: every step and every save of training, and both sides of every stage boundary."""
    loop, rename, write = "lib.training.loop", "etils.epath.backend:os.rename", "lib.model.storage:write_json"
    inside = [
        *(Point(f"{loop}:_batch", "before", step) for step in range(1, 9)),
        *(Point(f"{loop}:save_checkpoint", when, save) for save in (1, 2) for when in ("before", "after")),
        *(Point(rename, when, save) for save in (1, 2, 3) for when in ("before", "after")),
        *(Point(write, when, save) for save in (1, 2, 3) for when in ("before", "after")),
        *(Point(f"{loop}:save_model", when, 1) for when in ("before", "after")),
    ]
    pipeline = "lib.experiments.pipeline"
    around = [Point(f"{pipeline}:execute", "before", 1), Point(f"{pipeline}:execute", "after", 1),
              Point(f"{pipeline}:write_json", "after", 2)]  # fmt: skip
    found = [("03_train", point.fault(who="kernel", do="kill_run")) for point in inside]
    found += [(stage, point.fault(who="runner")) for stage in STUBS for point in around]
    found += [("05_compare", Point(f"{pipeline}:_close", when, 1).fault(who="runner")) for when in ("before", "after")]
    return found[4::12] if some else found


def sweep_pipeline(folder: Path, some: bool) -> Iterator[End]:
    """The whole job for real: eight steps, a checkpoint after every third."""
    small = subject.settings(num_steps=8, eval_every=4, checkpoint_every=3)
    status, _, said = subject.Command(folder / "whole", "run", "configs/smoke.yaml", *small).end()
    assert status == 0, said
    done = next((folder / "whole").glob("*_smoke"))
    yield End(run_outcome(done))
    for number, (stage, fault) in enumerate(run_points(some)):
        left = subject.rewound(done, folder / str(number), stage)
        status, _, said = subject.Command(left.parent, "resume", left.name, faults=[fault]).end()
        assert status == -signal.SIGKILL, f"{fault}: not killed there, but ended with {status}: {said}"
        check_killed(left.parent, {"stale"} if (left / "state.json").is_file() else {"done"}, fault)
        status, _, said = subject.Command(left.parent, "resume", left.name).end()
        assert status == 0, f"{fault}: not resumed: {said}"
        yield End(run_outcome(left), 1, f"{stage}: {fault['at']} {fault['nth']}, {fault['when']}")
        shutil.rmtree(left.parent)


# ---- by hand -----------------------------------------------------------------------------------------------

SWEEPS = {"training": sweep_training, "records": sweep_records, "pipeline": sweep_pipeline, "moments": sweep_moments}


def conclude(ends: Iterator[End]) -> int:
    """Print each end that is another than the first, and the count. Returns the exit status."""
    whole, kills, distinct = next(ends).outcome, 0, set()
    distinct.add(digest(whole))
    for end in ends:
        kills += end.kills
        distinct.add(digest(end.outcome))
        if end.outcome != whole:
            print(f"another end, killed {end.where}: {difference(whole, end.outcome)}", flush=True)
    print(f"{kills} kills, {len(distinct)} distinct hashes")
    return int(len(distinct) > 1)


def difference(there: Any, here: Any) -> str:
    """Where two values of the same kind part, for a person."""
    if isinstance(there, dict) and isinstance(here, dict):
        parts = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        return "; ".join(f"{name}: {difference(there.get(name), here.get(name))}" for name in parts)
    if isinstance(there, list) and isinstance(here, list):
        return f"missing {[one for one in there if one not in here]}, more {[one for one in here if one not in there]}"
    return f"{str(there)[:100]} became {str(here)[:100]}"


def main() -> int:
    arguments = argparse.ArgumentParser(description="Kill a run at every point, resume it, compare where it ends.")
    arguments.add_argument("sweep", nargs="?", choices=SWEEPS, default="training")
    arguments.add_argument("--few", action="store_true", help="at some of the points")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name, value in {
            "JAX_COMPILATION_CACHE_DIR": f"{scratch}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }.items():
            os.environ.setdefault(name, value)
        return conclude(SWEEPS[given.sweep](Path(scratch), given.few))


if __name__ == "__main__":
    sys.exit(main())
