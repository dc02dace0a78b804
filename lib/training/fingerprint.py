"""What bit-equality is promised within: everything outside code, configuration and data that can move a last bit."""

import os
import platform
import re
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from lib.config import ONE_DEVICE, ParallelismConfig
from lib.model.mesh import make_mesh

# JAX_… variables that say where something is kept or what is told, and move no bit; or who takes part, counted below.
HARMLESS = ("CACHE", "LOG", "TRACEBACK", "DUMP", "PROFILER", "COORDINATOR", "PROCESS", "DEVICE")
DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\d+")


def fingerprint(parallelism: ParallelismConfig = ONE_DEVICE) -> dict[str, Any]:
    """Versions, devices and settings; two trainings of the same inputs under equal ones end with equal weights."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "nproc": os.environ.get("NPROC", ""),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        **({"mesh": asdict(parallelism), "processes": jax.process_count()} if make_mesh(parallelism) else {}),
        "xla_flags": DEVICE_COUNT.sub("", os.environ.get("XLA_FLAGS", "")).strip(),
        **{
            name.lower(): value
            for name, value in sorted(os.environ.items())
            if name.startswith("JAX_") and not any(word in name for word in HARMLESS)
        },
        "cpu": _cpu(),
        "platform": f"{sys.platform}-{platform.machine()}",
    }


def setting(entry: str) -> str:
    """The environment variable behind an entry, which whoever starts the process can put back; or nothing."""
    return entry.upper() if entry in ("nproc", "xla_flags") or entry.startswith("jax_") else ""


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The entries in which two fingerprints differ."""
    return [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
