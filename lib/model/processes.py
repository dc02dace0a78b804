"""Several processes that compute as one (jax.distributed): process 0 writes, the others wait for it.

    join_job()                                      # before anything else of jax
    found = tree_digest(params)                     # what computes, all do: a collective waits for the last of them
    by_first(lambda: write_json(file, found))       # process 0 does it; where it fails, all of them stop

In a process alone, all of this is nothing but the call.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lib.errors import RequestError, RetraceError
from lib.progress import VARIABLE

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")  # as XLA says it


def join_job() -> None:
    """Take part in the job that the environment describes; all but process 0 print nothing from here on.

    Slurm, Open MPI and others are found by jax itself; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say it. Raises RequestError where nothing does, RetraceError where the others do not come.
    """
    given = {
        name: int(os.environ[variable])
        for name, variable in [("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")]
        if os.environ.get(variable, "").isdigit()
    }
    # Else jax takes SIGTERM for a notice to save soon, and whoever asks this process to end is not heard.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**given)
    except ValueError as error:
        raise RequestError(
            f"launch: no job to take part in ({str(error).rstrip('.')}); give --processes N, start it by srun, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    except RuntimeError as error:
        raise RetraceError(f"launch: the processes did not find each other ({str(error).splitlines()[0]})") from None
    _quiet_output(is_first())


def _quiet_output(speaks: bool) -> None:
    """Only the first process prints, and only from Python: gloo says each of its connections on standard output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if speaks:
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
    else:
        sys.stdout = os.fdopen(nowhere, "w")
        os.environ[VARIABLE] = ""
    os.dup2(nowhere, 1)


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def by_first(act: Callable[[], Any]) -> None:
    """Have process 0 do it, and wait for its end. Raises what it raises there, RetraceError elsewhere."""
    if jax.process_count() == 1:
        act()
        return
    failure: BaseException | None = None
    try:
        if is_first():
            act()
    except Exception as error:
        failure = error
    if any_process(failure is not None):
        raise failure or RetraceError("stopped, as the first process failed: see what it says")


def any_process(mine: bool) -> bool:
    """Whether it is so in any process; all of them ask."""
    return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(mine)).any())


@contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Says what ran out of memory and the remedy, and that another process is gone, both as a RetraceError."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError, MemoryError) as error:  # short of memory, XLA raises either
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            raise RetraceError(f"{what} ran out of memory ({said[:120]}); {remedy}") from None
        if isinstance(error, ValueError) or jax.process_count() == 1:
            raise
        raise RetraceError(
            f"another process of this job is gone, or cannot be reached ({said[:200]}); "
            "the same command, given again, goes on from what was saved"
        ) from None


def whole(leaf: Any) -> np.ndarray:
    """All of an array, wherever its parts lie; where they lie in several processes, all of them ask."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(leaf)
