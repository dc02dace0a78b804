"""All benchmarks of speed, and docs/performance.md made of what they print.

    make bench        (or: python benchmarks/performance.py, with the peers named in RETRACE_TUNIX_PYTHON and
                       RETRACE_PEERS_PYTHON; one that is not named is left out)

It takes an hour; nothing else should run meanwhile.
"""

import datetime
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"

BESIDE_PEERS = ("training.py", "generation.py")
OTHERS = ("clone.py", "quickstart.py", "loss_memory.py", "importing.py", "datasets.py")

HEAD = """# How fast

Made by `make bench` on {date}, on {machine}: {processor}. {versions}.

Peers run in environments of their own, on the same weights and data, with the allocator setting that made ours fast;
each has a process, compiles first, and they take turns. A figure is the median of the turns. A ratio says how many
times as fast ours is, turn by turn: smallest, median and largest. What differs by less than a tenth counts as equal.
What each line is exactly stands at the head of `benchmarks/training.py` and `benchmarks/generation.py`.

| work | who | figure | ours is so many times as fast |
|---|---|---|---|
{rows}
No GPU was at hand: on accelerators nothing was measured.

## What the other benchmarks print

{others}"""


def main() -> None:
    rows = "".join(run(name) for name in BESIDE_PEERS)
    others = "".join(f"`python benchmarks/{name}`\n\n```\n{run(name)}```\n\n" for name in OTHERS)
    PAGE.write_text(
        HEAD.format(
            date=datetime.date.today().isoformat(), machine=f"{os.cpu_count()} cores", processor=processor(),
            versions=versions(), rows=rows, others=others.rstrip() + "\n",
        )
    )  # fmt: skip
    print(f"written: {PAGE.relative_to(ROOT)}")


def run(name: str) -> str:
    """What a benchmark prints; it is printed here, too, as it comes."""
    process = subprocess.Popen(
        [sys.executable, f"benchmarks/{name}"], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    printed = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        printed += line
    if process.wait():
        sys.exit(f"benchmarks/{name} failed with status {process.returncode}")
    return printed


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return "processor not known"


def versions() -> str:
    ours = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax", "polars"))
    theirs = [version(python, name) for python, names in peers() for name in names if python]
    return f"Ours: {ours}. Peers: {', '.join(theirs) or 'none'}"


def peers() -> list[tuple[str, tuple[str, ...]]]:
    return [
        (os.environ.get("RETRACE_TUNIX_PYTHON", ""), ("google-tunix",)),
        (os.environ.get("RETRACE_PEERS_PYTHON", ""), ("trl", "transformers", "torch")),
    ]


def version(python: str, name: str) -> str:
    asked = f"from importlib.metadata import version; print('{name}', version('{name}'))"
    return subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
