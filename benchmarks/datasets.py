"""What datasets cost as they grow: one line for each stage and size, with rows a second and the most memory held.

    python benchmarks/datasets.py [--counts 100000 1000000] [--folder DIR]

Traces of High Card Duel are written as JSONL (20,000 deals, again and again under other seeds), imported, chosen from
(the newest first; drawn at random; without duplicates; all of them each time), and exported in each format. Each stage
is a command of its own, start of Python and flush to disk within the figure; core-seconds are what it took of all
cores together, which other work on the machine changes less. The last column is the core-seconds for a trace against
those at the smallest count: 1.0 where cost is a straight line through the origin, less where part of it is fixed. Some
ten times the size of the traces is needed on the disk.
"""

import argparse
import platform
import resource
import tempfile
from pathlib import Path

from importing import Done, python

WRITE = """
import sys
from msgspec.structs import replace
from lib.tasks import high_card_duel
from lib.trace import to_json, utc_now
played = high_card_duel.generate(20_000, seed=0, created_at=utc_now())
lines = [to_json(replace(trace, id="")) + b"\\n" for trace in played]
with open(sys.argv[1], "wb") as file:
    for start in range(0, int(sys.argv[2]), len(lines)):
        seed = b'"seed":%d' % start
        file.writelines(line.replace(b'"seed":0', seed) for line in lines[: int(sys.argv[2]) - start])
"""
FORMATS = ("trace", "tunix_sft", "training_example", "messages")


def stages(home: Path, file: Path) -> dict[str, list[str]]:
    """The words of each stage's command."""
    build = ["dataset", "build", "--version", "v1", "--name"]
    chosen = {"build latest": [], "build random": ["--strategy", "random", "--seed", "1"], "dedup": ["--unique"]}
    return {
        "import": ["traces", "import", str(file)],
        **{stage: [*build, stage.replace(" ", "-"), *flags] for stage, flags in chosen.items()},
        **{
            f"export {name}": ["dataset", "export", "build-latest-v1", "--format", name, "--output", f"{home}/{name}"]
            for name in FORMATS
        },
    }


def main(counts: list[int], folder: Path) -> None:
    print(f"{platform.machine()}, Python {platform.python_version()}", flush=True)
    first: dict[str, float] = {}
    for count in counts:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            file, home = Path(place, "own.jsonl"), Path(place, "home")
            python("-c", WRITE, str(file), str(count))
            for stage, words in stages(home, file).items():
                before = core_seconds()
                done: Done = python("-m", "lib", "--home", str(home), *words)
                used = core_seconds() - before
                straight = used / count / first.setdefault(stage, used / count)
                print(
                    f"{stage:<24} {count:>10,}  {done.seconds:7.1f} s  {count / done.seconds:>9,.0f} rows/s  "
                    f"{used:7.1f} core-seconds  "
                    f"peak {done.megabytes:>6,.0f} MB  {straight:.2f} x",
                    flush=True,
                )
                if stage.startswith("export"):
                    (home / stage.removeprefix("export ")).unlink()


def core_seconds() -> float:
    """Of all processes that ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What datasets cost as they grow.")
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the temporary folder)")
    given = parser.parse_args()
    main(given.counts, given.folder)
