"""What bit-equality is promised within: everything outside code, configuration and data that can move a last bit."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def fingerprint() -> dict[str, Any]:
    """Versions, devices and settings; two trainings of the same inputs under equal ones end with equal weights."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "nproc": os.environ.get("NPROC", ""),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **{name.lower(): value for name, value in sorted(os.environ.items()) if name.startswith("JAX_")},
        "cpu": _cpu(),
        "platform": f"{sys.platform}-{platform.machine()}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
