"""What benchmarks beside other libraries share: the model that all of them read, and a process for each.

Each peer is an interpreter in whose environment it is installed (`make bench` makes them). All read the same random
Gemma 3 (6 layers, width 256, 6.2 million weights, float32) from a folder in the released format. Each has a process
of its own, compiles first, and then takes turns with the others, the order turning too; a line tells the median, and
the ratio of ours to each peer's, turn by turn: min, median, max.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, WINDOW = 2048, 512
SHAPE = {"num_layers": 6, "embed_dim": 256, "hidden_dim": 1024, "num_heads": 4, "num_kv_heads": 1, "head_dim": 64}
# Without it, a third of a step on a CPU is spent on memory that is given back and asked for again; with huge pages
# weights are read faster.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}


class Worker:
    """A process of a benchmark file that answers: a line goes in, a line of JSON with `seconds` comes back."""

    def __init__(self, file: str, name: str, python: str, folder: Path, environment: dict[str, str]):
        self.process = subprocess.Popen(
            [python, file, "--worker", name, str(folder)], cwd=ROOT, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, work: str) -> dict:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(work + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith('{"seconds"'):
                return json.loads(line)
        sys.exit(f"{self.process.args}: ended with status {self.process.wait()}; its last words are above")

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tunix", default=os.environ.get("RETRACE_TUNIX_PYTHON", ""), metavar="PYTHON")
    parser.add_argument("--torch", default=os.environ.get("RETRACE_PEERS_PYTHON", ""), metavar="PYTHON")
    parser.add_argument("--turns", type=int, default=5)
    return parser


def row(work: str, who: str, figure: str, ratio: str = "") -> None:
    """A row of the table of docs/performance.md."""
    print(f"| {work} | {who} | {figure} | {ratio} |", flush=True)


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def in_turn(workers: dict[str, Worker], work: str, turns: int) -> dict[str, list[dict]]:
    """What each worker answers in each turn."""
    found: dict[str, list[dict]] = {name: [] for name in workers}
    for turn in range(turns):
        names = list(workers)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(workers[name].ask(work))
    return found


def ratio(ours: list[float], theirs: list[float]) -> str:
    """How many times as fast ours is, turn by turn: `1.21 1.30 1.35`, the smallest, the median and the largest."""
    ratios = sorted(own / other for own, other in zip(ours, theirs, strict=True))
    return f"{ratios[0]:.2f} {median(ratios):.2f} {ratios[-1]:.2f}"


def our_shape():
    """Our configuration, graph, and weights without numbers."""
    from flax import nnx

    from lib.model.gemma import GENERATIONS, Gemma, GemmaConfig

    config = GemmaConfig(VOCABULARY, **SHAPE, sliding_window=WINDOW, **GENERATIONS[3])
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0))))
    return config, graph, nnx.to_pure_dict(state)


def our_model(folder: Path):
    """Our configuration, graph, and the weights of the folder."""
    from lib.model.released_weights import read_weights

    config, graph, shapes = our_shape()
    return config, graph, read_weights(folder, config, shapes)


def write_model(folder: Path, scale: float = 0.06) -> None:
    """Random weights in the released format, the norms' scales among them.

    What attention adds is loud and the embedding is not: else each answer would soon repeat one token for ever.
    """
    import jax
    import numpy as np

    from lib.model.released_config import config_fields
    from lib.model.released_weights import write_weights

    config, _, shapes = our_shape()
    source = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: source.normal(0, scale, leaf.shape).astype(np.float32), shapes)
    params["embedding"] /= 16
    for layer in params["layers"].values():
        layer["attention"]["query_norm"]["scale"] += 2
        layer["attention_post_norm"]["scale"] += 2
    (folder / "config.json").write_text(json.dumps(config_fields(config)))
    write_weights(folder, config, params)


def tunix_model(folder: Path):
    """Tunix's own Gemma 3 with the weights of the folder."""
    import jax.numpy as jnp
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.gemma3.params_safetensors import create_model_from_safe_tensors

    config = gemma3.ModelConfig(
        num_embed=VOCABULARY, **SHAPE, sliding_window_size=WINDOW, global_base_frequency=1_000_000,
        param_dtype=jnp.float32,
    )  # fmt: skip
    return create_model_from_safe_tensors(str(folder), config, dtype=jnp.float32)


def torch_model(folder: Path):
    """The Gemma 3 of transformers with the weights of the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
