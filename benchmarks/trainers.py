"""Our own trainer and Tunix's on the same data: how far their losses are apart, and how fast each is.

    python benchmarks/trainers.py [--steps 60] [--picture trainers.png]

Needs Tunix: python -m pip install --no-deps -r requirements-tunix.txt. Both train the tiny Gemma, from the same
weights, on the same batches of High Card Duel, one after the other in this process; the speed is the median of the
logged lines, compiling left out. The picture lays one curve over the other, and under them their difference.
"""

import argparse
import json
import os
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("NPROC", str(os.cpu_count()))

from matplotlib.figure import Figure  # noqa: E402

from lib.config import Config, load_config  # noqa: E402
from lib.data.dataset import dataset_tokenizer  # noqa: E402
from lib.data.renderer import render_example  # noqa: E402
from lib.model.weights import base_model  # noqa: E402
from lib.tasks import high_card_duel  # noqa: E402
from lib.training.loop import train  # noqa: E402
from lib.training.trainers import tunix_version  # noqa: E402

Lines = list[dict[str, float]]


def main(steps: int, picture: Path) -> None:
    config = load_config("configs/quickstart.yaml")
    shorter = {"num_steps": steps, "warmup_steps": steps // 10, "log_every": 1, "eval_every": steps}
    config = replace(config, training=replace(config.training, **shorter, checkpoint_every=steps))
    print(f"{steps} steps on {os.cpu_count()} cores, {platform.machine()}, tunix {tunix_version()}")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = (trained(config, name, Path(folder, name)) for name in ("builtin", "tunix"))
    apart = [abs(own["loss"] - other["loss"]) for own, other in zip(ours, theirs, strict=True)]
    speeds = [sorted(line["tokens_per_second"] for line in lines)[steps // 2] for lines in (ours, theirs)]
    print(f"losses {ours[0]['loss']:.4f} → {ours[-1]['loss']:.4f}, apart by at most {max(apart):.1e}")
    print(f"builtin {speeds[0]:,.0f} tokens/s, tunix {speeds[1]:,.0f}: {speeds[0] / speeds[1]:.2f} x")
    draw(ours, theirs, apart, picture)


def trained(config: Config, trainer: str, output: Path) -> Lines:
    """The logged lines of a training."""
    traces = list(high_card_duel.generate(400, seed=42))
    examples = [render_example(trace) for trace in traces]
    output.mkdir()
    dataset_tokenizer(examples).save(output / "tokenizer.json")
    base = base_model("tiny", config.training.seed, output / "tokenizer.json")
    train(base, examples, replace(config, training=replace(config.training, trainer=trainer)), output)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def draw(ours: Lines, theirs: Lines, apart: list[float], picture: Path) -> None:
    steps = [line["step"] for line in ours]
    figure = Figure(figsize=(7, 5), layout="constrained")
    losses, difference = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    losses.plot(steps, [line["loss"] for line in ours], color="0.6", linewidth=4, label="builtin")
    losses.plot(steps, [line["loss"] for line in theirs], color="black", linewidth=1, linestyle="--", label="Tunix")
    losses.set_ylabel("loss [nats a token]")
    losses.legend()
    difference.semilogy(steps, [max(value, 1e-9) for value in apart], color="black")
    difference.set(xlabel="step", ylabel="difference [nats]")
    figure.savefig(picture, dpi=150)
    print(f"picture: {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Our trainer beside Tunix's.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--picture", type=Path, default=Path("trainers.png"))
    main(**vars(parser.parse_args()))
