"""What importing `lib.model` sets for the whole process: memory that is kept, and compiled programs that are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.files import repository_root

FAULTS = """
import resource, sys
import numpy as np
if sys.argv[1] == "told":
    import lib.model
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 22)  # 32 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
CACHE = "import lib.model.gemma, jax; print(jax.config.jax_compilation_cache_dir)"


def said(*words: str, **variables: str) -> str:
    given = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | variables
    return subprocess.run(
        [sys.executable, "-c", *words],
        cwd=repository_root(),
        env=given,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told how to keep memory")
def test_memory_that_was_freed_is_used_again():
    assert int(said(FAULTS, "told")) * 5 < int(said(FAULTS, "not told"))


def test_what_was_compiled_is_kept_in_the_home_or_where_the_user_wants_it(tmp_path: Path):
    assert said(CACHE, RETRACE_HOME=str(tmp_path)) == str(tmp_path / ".compiled")
    assert said(CACHE, RETRACE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"
