"""What the tests beside transformers share."""

import os

import pytest


@pytest.fixture(scope="session")
def parity_python() -> str:
    """The interpreter with torch, transformers and peft; asked for without one, the tests fail."""
    python = os.environ.get("RETRACE_PARITY_PYTHON")
    if not python:
        pytest.fail("RETRACE_PARITY_PYTHON names no interpreter with torch and transformers; run `make test-parity`")
    return python
