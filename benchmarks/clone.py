"""From a clone to the first report: seconds of `git clone`, `make install` and `make quickstart`.

    python benchmarks/clone.py

Cloned is the last commit of this checkout, into an empty folder with no `.venv`; packages come from wherever pip is set
up to fetch them, so the second line measures the network and pip's cache, too. PYTHON chooses the interpreter, as for
make.
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    # Only what a newcomer's shell has: no home of runs, no compiled programs of another checkout.
    ours = ("RETRACE_", "JAX_", "XLA_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "retrace"
        seconds = [
            timed("git clone", ["git", "clone", "--quiet", str(ROOT), str(clone)], ROOT, environment),
            timed("make install", ["make", "install"], clone, environment),
            timed("make quickstart", ["make", "quickstart"], clone, environment),
        ]
        [report] = (clone / "runs").glob("*_quickstart/report.html")
        print(f"{'from clone to report':<22} {sum(seconds):8.1f} s, a report of {report.stat().st_size // 1024:,} KB")


def timed(name: str, command: list[str], folder: Path, environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    print(f"{name:<22} {seconds:8.1f} s", flush=True)
    return seconds


if __name__ == "__main__":
    main()
