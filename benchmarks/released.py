"""Loading released weights at full size: seconds, and the most memory against the weights' own; one line a model.

    python benchmarks/released.py [--folder DIR] [--models gemma3-270m gemma-2b]

Each model is first written with random weights, as its release is published: config.json, tokenizer.json (a small
one), safetensors in shards with an index. A process of its own then loads it and answers one short prompt. Memory is
what the process holds at its highest beyond what Python and jax held before, by Linux's /proc; the files were just
written, so that they are read from the page cache. Gemma 2B takes 5 GB of disk, and 16 GB of memory to answer: on a
CPU, XLA decodes with copies of the weights in float32.
"""

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lib.data.tokenizer import train_tokenizer
from lib.model.gemma import PRESETS, Gemma, GemmaConfig
from lib.model.released_config import SIZES
from lib.model.released_weights import INDEX, Place, place

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 2_000_000_000
BLOCK = 1 << 24
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16"}


class Case(NamedTuple):
    """A model: the rest of its config.json, the type of its weights on disk, and the type that they are loaded to."""

    about: dict
    stored: str
    loaded: str


CASES = {
    "gemma3-270m": Case(
        {"model_type": "gemma3_text", "sliding_window": 512, "query_pre_attn_scalar": 256}, "bfloat16", "float32"
    ),
    "gemma-2b": Case({"model_type": "gemma"}, "bfloat16", "bfloat16"),
}

LOAD = """
import json, sys, time
from pathlib import Path
import lib, jax, jax.numpy as jnp
from lib.model.sampler import generate
from lib.model.weights import base_model

def megabytes(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if name in line) * 1024 / 1e6

jnp.zeros(3).block_until_ready()
before, started = megabytes("VmRSS"), time.perf_counter()
model = base_model(sys.argv[1], 0, Path("none"), jnp.dtype(sys.argv[2]))
jax.block_until_ready(model.params)
seconds, peak = time.perf_counter() - started, megabytes("VmHWM") - before
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 1e6
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
started = time.perf_counter()
prompt = [model.tokenizer.bos_id, *model.tokenizer.encode("What is 2 + 3?")]
[answer] = generate(model.graph, model.params, [prompt], (-1,), 8, batch_size=1)
print(json.dumps({
    "before": before, "seconds": seconds, "peak": peak, "weights": weights, "tokens": len(answer.tokens),
    "answered": time.perf_counter() - started, "answering": megabytes("VmHWM") - before,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="where the models are written, and stay; else they are removed")
    parser.add_argument("--models", nargs="*", choices=CASES, default=list(CASES))
    asked = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}")
    for name in asked.models:
        with tempfile.TemporaryDirectory() as scratch:
            measure(name, (asked.folder or Path(scratch)) / name)


def measure(name: str, folder: Path) -> None:
    case = CASES[name]
    if not (folder / INDEX).is_file():
        write_release(folder, PRESETS[name], case)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, folder, case.loaded], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True
    )
    found = json.loads(done.stdout)
    print(
        f"{name}, {case.stored} to {case.loaded}: {found['weights']:,.0f} MB loaded in {found['seconds']:.1f} s, peak "
        f"{found['peak'] / found['weights']:.2f} times the weights beside {found['before']:.0f} MB of Python and jax; "
        f"{found['tokens']} tokens in {found['answered']:.1f} s, compiled anew, peak "
        f"{found['answering'] / found['weights']:.2f} times the weights",
        flush=True,
    )


# ---- a release with random weights ------------------------------------------------------------------------------


def write_release(folder: Path, config: GemmaConfig, case: Case) -> None:
    """The folder of a model, index last; ends with one line where the disk has no room for it."""
    dtype, places = np.dtype(getattr(jnp, case.stored)), all_places(config)
    size = sum(math.prod(place.shape) for place in places) * dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < 1.1 * size:
        sys.exit(f"{folder}: {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; give another --folder")
    sizes = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    (folder / "config.json").write_text(json.dumps(case.about | sizes))
    train_tokenizer(["What is 2 + 3?"] * 5).save(folder / "tokenizer.json")
    shards, names, source = list(shards_of(places, dtype.itemsize)), {}, np.random.default_rng(0)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file, shard, dtype, source)
        names |= dict.fromkeys((place.name for place in shard), file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": names}))


def all_places(config: GemmaConfig) -> list[Place]:
    state = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0))))[1])
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [place(tuple(entry.key for entry in path), leaf.shape, config) for path, leaf in leaves]


def shards_of(places: list[Place], itemsize: int) -> Iterator[list[Place]]:
    """The tensors in order, as many in each file as SHARD_BYTES have room for."""
    shard, size = [], 0
    for own in places:
        bytes_of_it = math.prod(own.shape) * itemsize
        if shard and size + bytes_of_it > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard, size = [*shard, own], size + bytes_of_it
    yield shard


def write_shard(file: Path, places: list[Place], dtype: np.dtype, source: np.random.Generator) -> None:
    """Length of the header, header, numbers (https://huggingface.co/docs/safetensors), never a whole tensor at once."""
    header, start = {}, 0
    for own in places:
        end = start + math.prod(own.shape) * dtype.itemsize
        header[own.name] = {"dtype": SAFETENSORS[dtype.name], "shape": own.shape, "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header).encode()
    with open(file, "wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for own in places:
            left = math.prod(own.shape)
            while left:
                count = min(left, BLOCK)
                out.write((source.standard_normal(count, np.float32) * 0.02).astype(dtype).tobytes())
                left -= count


if __name__ == "__main__":
    main()
