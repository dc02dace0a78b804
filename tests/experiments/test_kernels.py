"""Forked kernels: each a process of its own, as if it had been started alone, and none that outlives its runner."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import papermill
import psutil
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from lib.experiments import kernels
from lib.files import repository_root

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")

ASKED = """
import os, random, sys, numpy
print(os.getpid(), os.getppid(), os.getsid(0), os.getcwd(), "jax" in sys.modules, "polars" in sys.modules,
      os.environ.get("MARK"), sys.stdin.read() == "", sys.path[0] == os.getcwd(), random.random())
"""


@pytest.fixture(autouse=True)
def server(monkeypatch):
    """One of its own for each test, and none that stays."""
    monkeypatch.setattr(kernels, "_servers", [])
    for name, value in kernels.KERNEL_ENVIRONMENT.items():  # as a run starts its kernels
        monkeypatch.setenv(name, value)
    kernels.use_forked_kernels()
    yield
    for one in kernels._servers:
        one.stop()


def told(folder: Path, source: str = ASKED) -> list[str]:
    """What a kernel prints that papermill starts in the folder."""
    notebook = new_notebook(cells=[new_code_cell(source)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    source_file = folder / "asked.ipynb"
    papermill.iorw.write_ipynb(NotebookNode(notebook), str(source_file))
    done = papermill.execute_notebook(
        str(source_file), str(folder / "told.ipynb"), cwd=str(folder), progress_bar=False, kernel_name="python3"
    )
    return done.cells[-1].outputs[0].text.split()


def test_each_is_a_process_of_its_own_in_its_folder_with_its_environment(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("RETRACE_MARK", "")  # what we read ourselves makes no other server
    one = told(tmp_path / "one")
    other = told(tmp_path / "other")
    assert one[0] != other[0] and one[1] == other[1] == str(kernels._servers[0].pid)
    assert [one[2], other[2]] == [one[0], other[0]]  # the head of its session, so that nothing else is interrupted
    assert [one[3], other[3]] == [str(tmp_path / "one"), str(tmp_path / "other")]
    assert one[7] == "True" and one[9] != other[9]
    monkeypatch.setenv("MARK", "seen")
    third = told(tmp_path)
    assert third[6] == "seen" and third[1] != one[1]


def test_the_next_one_waits_with_its_imports_made_and_is_taken_wherever_it_is_to_work(tmp_path):
    (tmp_path / "other").mkdir()
    waits = forked_ahead()
    first = told(tmp_path)
    assert first[:6] == [str(waits.pid), str(kernels._servers[0].pid), first[0], str(tmp_path), "False", "True"]
    waits = forked_ahead(first)
    second = told(tmp_path / "other")
    assert second[:6] == [str(waits.pid), first[1], second[0], str(tmp_path / "other"), "True", "True"]
    assert second[9] != first[9]
    waits = forked_ahead(first, second)
    waits.kill()
    waits.wait(20)
    assert told(tmp_path / "other")[0] != str(waits.pid)
    waits = forked_ahead(first, second)
    kernels._servers[0].stop()
    waits.wait(20)


def test_one_that_imported_what_remembers_another_home_is_left_and_ends(tmp_path, monkeypatch):
    source = "from lib.model import gemma; import jax, os; print(os.getpid(), jax.config.jax_compilation_cache_dir)"
    first = told(tmp_path, source)
    waits = forked_ahead(first)
    monkeypatch.setenv("RETRACE_HOME", str(tmp_path / "another"))
    second = told(tmp_path, source)
    assert second[0] != str(waits.pid) and second[1] == str(tmp_path / "another" / ".compiled")
    waits.wait(20)
    waits = forked_ahead(first, second)
    assert told(tmp_path, source) == [str(waits.pid), second[1]]


def forked_ahead(*ended: list[str]) -> psutil.Process:
    """The kernel that waits, once it has imported what it can; its server's only child beside those that ended."""
    server = psutil.Process(kernels._servers[0].pid)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        waiting = [child for child in server.children() if str(child.pid) not in {one[0] for one in ended}]
        with suppress(psutil.Error):
            if waiting and any("polars" in part.path for part in waiting[0].memory_maps()):
                if waiting[0].status() == psutil.STATUS_SLEEPING and waiting[0].cpu_percent(0.5) == 0:
                    return waiting[0]
        time.sleep(0.1)
    raise AssertionError("no kernel was forked ahead")


def test_a_server_that_was_killed_takes_its_kernels_along_and_another_takes_its_place(tmp_path):
    first = told(tmp_path)
    kernels._servers[0]._process.kill()
    kernels._servers[0]._process.wait()
    second = told(tmp_path)
    assert second[1] != first[1]
    kernel = kernels._servers[0].fork(["-f", str(tmp_path / "connection.json")], dict(os.environ), str(tmp_path))
    assert kernel.poll() is None
    kernels._servers[0]._process.kill()
    deadline = time.monotonic() + 20
    while kernel.poll() is None:
        assert time.monotonic() < deadline, "the kernel lives on without its server"
        time.sleep(0.1)


def test_another_python_than_ours_starts_as_it_always_did(tmp_path):
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    program = f"""
import asyncio, os, sys
from jupyter_client import AsyncKernelManager
from lib.experiments import kernels
kernels.use_forked_kernels()
async def start():
    manager = AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = {str(link)!r}
    await manager.start_kernel()
    print(type(manager.provisioner.process).__name__)
    await manager.shutdown_kernel(now=True)
asyncio.run(start())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=repository_root(), capture_output=True, text=True)
    assert done.stdout == "Popen\n", done.stderr


def test_nothing_that_is_imported_for_all_has_begun_a_thread():
    asked = "threading.active_count(), 'polars' in sys.modules, xla_bridge._backends"
    assert after_importing(kernels.PRELOADED + kernels.PRELOADED_LAST, asked) == "1 False {}\n"


def test_a_kernel_that_waits_holds_no_device():
    assert (
        after_importing(kernels.AHEAD + kernels.AHEAD_LAST, "'jax' in sys.modules, xla_bridge._backends") == "True {}\n"
    )


def after_importing(names: tuple[str, ...], asked: str) -> str:
    program = f"import threading, sys; [__import__(name) for name in {names}]; from jax._src import xla_bridge"
    program += f"; print({asked})"
    command = [sys.executable, "-Xfrozen_modules=off", "-c", program]
    return subprocess.run(command, cwd=repository_root(), capture_output=True, text=True, check=True).stdout
