"""Several processes of this machine that compute as one: started together, and stopped together.

    python -m lib launch --processes 2 train --config C.yaml --data D.jsonl --output DIR

Each is `python -m lib launch train …` with three variables that say who it is, as on a cluster srun does. Where one
fails or is killed the others cannot go on: they are given a moment to say why, and stopped.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from lib.errors import RequestError, RetraceError

GRACE_SECONDS = 10
SHOWN_CHARACTERS = 2_000


def start(words: list[str], processes: int) -> None:
    """The command in so many processes of this machine; what the first one prints is what is seen.

    Raises RequestError where they refuse the request, RetraceError where one fails or is killed.
    """
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(number)) for number in range(processes)]
        children = []
        try:
            for number, log in enumerate(logs):
                who = {"JAX_PROCESS_ID": str(number), "JAX_LOCAL_DEVICE_IDS": str(number)}
                who |= {"NO_COLOR": "1"} if number else {}  # what it says goes to a file
                with open(log, "wb") as file:
                    children.append(_child(words, os.environ | job | who, file if number else None))
            failed = _wait(children)
        finally:
            _stop(children)
        if failed == 0 and children[0].returncode > 0:
            raise SystemExit(children[0].returncode)  # it has said why
        if failed is not None:
            raise _failure(failed, [child.returncode for child in children], logs)


def _child(words: list[str], environment: dict[str, str], errors: IO[bytes] | None) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "lib", "launch", *words], env=environment, stderr=errors)


def _wait(children: list[subprocess.Popen]) -> int | None:
    """Until all are done, or one failed and the others have had a moment; the number of the one to blame."""
    while not any(first := [child.poll() for child in children]) and None in first:
        time.sleep(0.1)
    _until_ended(children)
    return _to_blame(first, [child.poll() for child in children])


def _to_blame(first: list[int | None], then: list[int | None]) -> int | None:
    """The one that refused the request, else one that was killed, else one that failed first.

    The others end because it did: by status 1, or aborted by jax, which does so where process 0 is gone.
    """
    failed = [number for number, status in enumerate(then) if status]
    return min(
        failed,
        key=lambda number: (then[number] != 2, then[number] == -signal.SIGABRT, then[number] > 0, not first[number]),
        default=None,
    )


def _stop(children: list[subprocess.Popen]) -> None:
    """Those that are still there are asked to end, then killed."""
    for end in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for child in children:
            if child.poll() is None:
                end(child)
        _until_ended(children)


def _until_ended(children: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)


def _failure(failed: int, statuses: list[int], logs: list[Path]) -> RetraceError:
    status, who = statuses[failed], f"process {failed} of {len(statuses)}"
    if status < 0:
        return RetraceError(
            f"launch: {who} was killed by {signal.Signals(-status).name}, so the others were stopped; "
            "the same command goes on from the last checkpoint"
        )
    said = logs[failed].read_text(errors="replace")[-SHOWN_CHARACTERS:].strip()
    kind = RequestError if status == 2 else RetraceError
    return kind(f"launch: {who} ended with status {status}" + (f": {said}" if said else ", and so did the others"))


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]
