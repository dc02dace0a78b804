"""How fast traces are imported, in how much memory: one line for each of two ways in which a file may be written.

    python benchmarks/importing.py [--count 1000000] [--turns 3]

Traces of High Card Duel go to a temporary file and are imported from it by `python -m lib traces import`, start of
Python and the flush to disk within the figure, by a process of its own on one core; of several turns, each into a
store of its own, the slowest, the median and the fastest are told. Beside the median stand two others,
on the same core and the same file: `careful` does the same checks the plain way, the standard library's JSON, one
line at a time, and makes the same ids and hashes, but stores nothing (timed on the first 20,000 lines); `polars` is
polars.read_ndjson, which checks nothing: it drops late keys, coerces types, and takes a repeated key for one.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("trace_version", "prompt", "steps", "final_answer", "meta")
SAMPLE = 20_000

WRITE = """
import json, sys
from lib.tasks import high_card_duel
from lib.trace import to_json, utc_now
with open(sys.argv[1], "wb") as own, open(sys.argv[2], "w") as plain:
    for trace in high_card_duel.generate(int(sys.argv[3]), seed=42, created_at=utc_now()):
        line = to_json(trace)
        own.write(line + b"\\n")
        record = json.loads(line)
        plain.write(json.dumps({name: record[name] for name in sys.argv[4:]}) + "\\n")
"""

CAREFUL = """
import sys, time
from itertools import islice
from lib.trace import Trace, read_strictly, to_entry, utc_now
now, started = utc_now(), time.perf_counter()
with open(sys.argv[1], "rb") as file:
    done = sum(to_entry(read_strictly(line, Trace), now).id != "" for line in islice(file, int(sys.argv[2])))
print(done / (time.perf_counter() - started))
"""

POLARS = """
import sys, time
import polars as pl
started = time.perf_counter()
print(pl.read_ndjson(sys.argv[1]).height / (time.perf_counter() - started))
"""


class Done(NamedTuple):
    """What a process printed, its wall time and the most memory that it held."""

    printed: str
    seconds: float
    megabytes: float


def main(count: int, turns: int) -> None:
    core = on_one_core()
    print(f"{count:,} traces on {core}, {platform.machine()}, Python {platform.python_version()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = {"as to_json writes": Path(folder, "own.jsonl"), "as json.dumps writes": Path(folder, "plain.jsonl")}
        python("-c", WRITE, *map(str, files.values()), str(count), *ORDER)
        for name, path in files.items():
            done = [imported(path, count, Path(folder, "home")) for _ in range(turns)]
            rates = sorted(count / turn.seconds for turn in done)
            rate, careful = statistics.median(rates), float(python("-c", CAREFUL, str(path), str(SAMPLE)).printed)
            polars = python("-c", POLARS, str(path))
            print(
                f"{name:<21} {rates[0]:9,.0f} {rate:9,.0f} {rates[-1]:9,.0f} traces/s  "
                f"peak {max(turn.megabytes for turn in done):,.0f} MB  "
                f"{rate / careful:.1f} x careful ({careful:,.0f}/s)  "
                f"{rate / float(polars.printed):.1f} x polars, which checks nothing "
                f"({float(polars.printed):,.0f}/s, {polars.megabytes:,.0f} MB)",
                flush=True,
            )


def imported(path: Path, count: int, home: Path) -> Done:
    """Import the file into a home that is removed again."""
    done = python("-m", "lib", "--home", str(home), "traces", "import", str(path))
    assert f"{count} accepted, 0 rejected" in done.printed, done.printed
    shutil.rmtree(home)
    return done


def on_one_core() -> str:
    """Keep this process, and all that it starts, on one core."""
    if not hasattr(os, "sched_setaffinity"):
        return f"any of {os.cpu_count()} cores (this system cannot pin a process to one)"
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return f"one of {os.cpu_count()} cores"


def python(*arguments: str) -> Done:
    """Run Python with these arguments."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{arguments[:2]} failed with status {status}")
    return Done(printed, seconds, used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How fast traces are imported.")
    parser.add_argument("--count", type=int, default=1_000_000, help="how many traces (default: 1,000,000)")
    parser.add_argument("--turns", type=int, default=3, help="how often each file is imported (default: 3)")
    main(**vars(parser.parse_args()))
