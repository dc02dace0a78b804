"""Peak memory of the loss over Gemma's vocabulary: logits in parts against all at once.

    python benchmarks/loss_memory.py                    # vocabulary 262,144, batch 4, length 512, width 640

Each is the gradient of the mean loss with respect to hidden states and embedding, twice, in a process of its own;
what the process held before it (the arrays, the compiler) is taken off.
"""

import argparse
import ctypes
import re
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--only", choices=("naive", "chunked"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments)
        return
    peaks = {}
    for kind in ("naive", "chunked"):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", kind], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        gradient, peak, seconds, loss = map(float, done.stdout.split())
        peaks[kind] = peak - gradient
        print(f"{kind:<8} {peak:7.0f} MB, the gradient itself {gradient:.0f} of it; {seconds:.1f} s, loss {loss:.6f}")
    print(f"ratio    {peaks['naive'] / peaks['chunked']:.1f}, the gradient taken off both")


def measure(arguments: argparse.Namespace) -> None:
    """Print MB of the gradient, MB of the peak above the arguments, seconds of the second call, and the loss."""
    import jax
    import jax.numpy as jnp

    from lib.training.step import CHUNK_LOGITS, token_losses

    V, B, T, D = arguments.vocabulary, arguments.batch, arguments.length, arguments.width

    class Head:
        def __init__(self, embedding: jax.Array):
            self.embedding = embedding

        def logits(self, hidden: jax.Array, rows: jax.Array | None = None) -> jax.Array:
            return jnp.einsum("...D,VD->...V", hidden, self.embedding if rows is None else rows)

    def mean(embedding: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        most = CHUNK_LOGITS if arguments.only == "chunked" else B * T * V
        return token_losses(Head(embedding), hidden, targets, most).mean()

    keys = jax.random.split(jax.random.key(0), 3)
    embedding = jax.random.normal(keys[0], (V, D)) * D**-0.5
    hidden, targets = jax.random.normal(keys[1], (B, T, D)), jax.random.randint(keys[2], (B, T), 0, V)
    jax.block_until_ready((embedding, hidden, targets))
    gradient = jax.jit(jax.value_and_grad(mean, argnums=(0, 1))).lower(embedding, hidden, targets).compile()
    _forget_peak()
    before = _held("VmRSS")
    loss, _ = jax.block_until_ready(gradient(embedding, hidden, targets))
    started = time.perf_counter()
    jax.block_until_ready(gradient(embedding, hidden, targets))
    seconds = time.perf_counter() - started
    print((V * D + B * T * D) * 4 / 2**20, (_held("VmHWM") - before) / 1024, seconds, float(loss))


def _forget_peak() -> None:
    """Give back what was freed, which our processes keep, and begin to look for the peak anew (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _held(name: str) -> int:
    """KiB that this process holds now (VmRSS), or held at most since then (VmHWM)."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
