"""Kernels that start in a moment: forked from a process that has imported what each of them would import again.

    use_forked_kernels()     # from now on, papermill's kernels in this process come from the server

A run starts six kernels, and each would take a second or two to import IPython, jax, flax, orbax, matplotlib and scipy.
The server imports them once; asked for a kernel, it forks, and the child goes on as `ipykernel_launcher` does. Each
kernel is a process of its own as ever, in a session of its own, with the environment that it was given, and ends by
itself where the server, which ends with its runner, is gone. A server under another environment is another server.

Nothing that is imported there may start a thread that a fork would lose: neither Polars nor an array of jax. Such are
imported by the child that the server forks ahead, which waits until a kernel is asked for.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from importlib.metadata import EntryPoint
from select import select
from typing import Any, NamedTuple

import psutil
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from lib.files import home, repository_root

# What the server imports, and what the child does. Jax and what needs it come last: the first notebooks need neither.
PRELOADED = ("ipykernel.ipkernel", "ipykernel.kernelapp", "ipykernel.debugger", "matplotlib.figure")
AHEAD = ("lib.experiments.display", "lib.experiments.report", "lib.experiments.figures")
PRELOADED_LAST = ("jax", "flax.nnx", "optax", "orbax.checkpoint", "scipy.special")
AHEAD_LAST = ("lib.training.loop", "lib.evaluation.evaluate")
LAUNCHER = "ipykernel_launcher"
HOME = "RETRACE_HOME"  # the folder of what jax compiles is there; it is read when lib is imported
KERNELS_OWN = ("JPY_", "RETRACE_", "_RJEM_", "PYTEST_")  # variables that no package reads that is imported for all

# Page faults on the step's temporaries cost a third of the time of training on a CPU; huge pages spare most of them.
# The C library reads this when a process starts, so it is set here, where the kernels are started.
KERNEL_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class ForkedKernel(LocalProvisioner):
    """How jupyter_client starts a kernel here; all else it does as it does with its own."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """A kernel from the server; by a command of its own where it is none of IPython's, or of another Python."""
        if LAUNCHER not in cmd or cmd[0] != sys.executable:
            return await super().launch_kernel(cmd, **kwargs)
        self.cwd = kwargs.get("cwd") or os.getcwd()
        environment = {HOME: str(home())} | kwargs["env"] | {"JPY_PARENT_PID": str(os.getpid())}
        self.process = _server(environment).fork(cmd[cmd.index(LAUNCHER) + 1 :], environment, str(self.cwd))
        self.pid = self.pgid = self.process.pid
        return self.connection_info


def use_forked_kernels() -> None:
    """Let papermill start its kernels so, and begin to import for them; on Linux, as forking is safe there alone."""
    if sys.platform == "linux":
        _server({**KERNEL_ENVIRONMENT, **os.environ, HOME: str(home())})
        factory = KernelProvisionerFactory.instance()
        factory.provisioners["forked"] = EntryPoint("forked", f"{__name__}:{ForkedKernel.__name__}", factory.GROUP_NAME)
        factory.default_provisioner_name = "forked"


def forked_kernels() -> set[psutil.Process]:
    """Those of this process that live; one that waits to be asked for is among them."""
    with suppress(IndexError, psutil.NoSuchProcess):
        return set(psutil.Process(_servers[0].pid).children())
    return set()


class _Kernel:
    """A forked kernel, for jupyter_client, which expects a Popen. It is no child of ours: how it ended is not known."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid = pid
        with suppress(psutil.NoSuchProcess):
            self._process = psutil.Process(pid)  # it remembers when that began, as numbers are given again

    def poll(self) -> int | None:
        with suppress(AttributeError, psutil.NoSuchProcess):
            if self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
                return None
        return 1

    def wait(self) -> int:
        return 1  # asked of one that has ended

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class _Server:
    """The process from which kernels are forked; it ends when this one does."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        replies, here = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-Xfrozen_modules=off", "-m", __name__, str(here)], cwd=repository_root(), env=environment,
            pass_fds=(here,), stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        os.close(here)
        self.pid = self._process.pid
        self._replies = open(replies)
        atexit.register(self.stop)

    def serves(self, environment: dict[str, str]) -> bool:
        """Whether it lives, and what it imported under its environment would be the same under this one."""
        return self._process.poll() is None and _read_once(self.environment) == _read_once(environment)

    def fork(self, arguments: list[str], environment: dict[str, str], folder: str) -> _Kernel:
        request = json.dumps({"arguments": arguments, "environment": environment, "folder": folder})
        with suppress(BrokenPipeError):
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
            if reply := self._replies.readline():
                return _Kernel(int(reply))
        raise RuntimeError("Kernel died before it was forked")  # as the kernel's death is told

    def stop(self) -> None:
        """End it, the kernel that waits, and, as they see that it is gone, what is left of the others."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        self._replies.close()
        atexit.unregister(self.stop)


_servers: list[_Server] = []  # one at most


def _server(environment: dict[str, str]) -> _Server:
    """The server under this environment."""
    if _servers and not _servers[0].serves(environment):
        _servers.pop().stop()
    if not _servers:
        _servers.append(_Server(environment))
    return _servers[0]


def _read_once(environment: dict[str, str]) -> dict[str, str]:
    """What a package may read when it is imported."""
    return {name: value for name, value in environment.items() if not name.startswith(KERNELS_OWN)}


# ---- the server's side ---------------------------------------------------------------------------------------


class _Waiting(NamedTuple):
    """A kernel that is not asked for yet; it reads what it is asked for from the other end of the pipe `asking`."""

    pid: int
    home: str
    asking: int

    def begin(self, request: dict[str, Any]) -> bool:
        """Whether it is the kernel of this request now; else it ends."""
        try:
            if self.home == request["environment"][HOME]:
                os.write(self.asking, json.dumps(request).encode() + b"\n")
                return True
        except BrokenPipeError:
            pass
        finally:
            os.close(self.asking)
        return False


def _serve(replies: int) -> None:
    """A kernel for each line that comes in, and end with these.

    Imports are made while nobody asks, so that a kernel need not wait for all of them. The first is forked ahead before
    jax is imported, which begins when that one is asked for; each one after it as soon as nothing is left to import.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a kernel that ends leaves nothing behind
    to_import, ahead, home, waiting = list(PRELOADED), AHEAD, os.environ[HOME], None
    while True:
        asked = select([sys.stdin], [], [], 0)[0]
        if to_import and not asked:
            _import(to_import.pop(0))
        elif not (waiting or asked):
            waiting = _fork(replies, home, ahead)
        elif line := sys.stdin.readline():
            request = json.loads(line)
            home = request["environment"][HOME]
            if not (waiting and waiting.begin(request)):
                waiting = _fork(replies, home, ())
                waiting.begin(request)
            os.write(replies, f"{waiting.pid}\n".encode())
            waiting = None
            if ahead == AHEAD:
                to_import, ahead = [*to_import, *PRELOADED_LAST], AHEAD + AHEAD_LAST
        else:
            if waiting:
                with suppress(ProcessLookupError):
                    os.kill(waiting.pid, signal.SIGKILL)
            os._exit(0)  # at once: whoever asked is gone


def _fork(replies: int, home: str, to_import: tuple[str, ...]) -> _Waiting:
    server, (reading, asking) = os.getpid(), os.pipe()
    if (pid := os.fork()) == 0:
        os.close(asking)
        os.close(replies)
        os.environ[HOME] = home
        _become_kernel(server, reading, list(to_import))
        sys.exit()
    os.close(reading)
    return _Waiting(pid, home, asking)


def _become_kernel(server: int, reading: int, to_import: list[str]) -> None:
    """Import while nobody asks for this kernel, then be it; end where nobody ever will."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    while to_import and not select([reading], [], [], 0)[0]:
        _import(to_import.pop(0))
    gc.freeze()  # all that was imported stays: looking through it for garbage takes a tenth of a second
    with open(reading) as asked:
        if not (line := asked.readline()):
            os._exit(1)
    request = json.loads(line)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = [LAUNCHER, *request["arguments"], f"--IPKernelApp.parent_handle={server}"]  # it sees when that is gone
    if os.getppid() != server:
        os._exit(1)
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()


def _import(name: str) -> None:
    with suppress(Exception):  # a notebook that needs it will say what is wrong
        import_module(name)


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # the folder that it was started in, which a kernel does not look in
    warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)  # numpy's and scipy's can be forked
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as a kernel does, but before
    _serve(int(sys.argv[1]))
