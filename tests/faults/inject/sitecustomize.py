"""Faults for the tests: a process dies, stops or fails at a named point, with no hook in the code under test.

Python imports this module when it starts, if its folder is on PYTHONPATH: in the runner and, as they inherit the
environment, in its kernels. RETRACE_FAULT then holds the faults as JSON, one or several of

    [{"at": "lib.files:os.replace", "when": "after", "text": "digest.json", "nth": 2, "who": "kernel", "do": "kill"}]

"the second time that code in lib.files has called os.replace with `digest.json` in its arguments, in a kernel: kill".
`at` is a function of a module, or a dotted name that the module calls; all but `at` and `do` may be left out. `do`:

    note       write one line to the file RETRACE_FAULT_LOG; every other one does so, too, before it strikes
    kill       SIGKILL for this process, after `delay` seconds where that is given
    kill_run   SIGKILL for this process and for the runner that started it, as a power cut would
    orphan     SIGKILL for the runner, SIGSTOP for this process, which so outlives it
    stop       SIGSTOP for this process
    sleep      do nothing for ten minutes
    interrupt  KeyboardInterrupt, as from Ctrl-C
    full       OSError, no space left on device
"""

import json
import os
import signal
import sys
import threading
import time


def arm(faults):
    """Make each fault strike in this process, whether or not its module is imported yet."""
    for fault in faults:
        module, _ = fault["at"].split(":")
        if module in sys.modules:
            _patch(sys.modules[module], fault)
    waiting = [fault for fault in faults if fault["at"].split(":")[0] not in sys.modules]
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))


class _Finder:
    """Lets the other finders load a module, and patches it before anything can import from it."""

    def __init__(self, faults):
        self.faults = faults

    def find_spec(self, name, path=None, target=None):
        wanted = [fault for fault in self.faults if fault["at"].split(":")[0] == name]
        if not wanted:
            return None
        self.faults = [fault for fault in self.faults if fault not in wanted]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in sys.meta_path)))
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for fault in wanted:
                _patch(module, fault)

        spec.loader.exec_module = exec_module
        return spec


def _patch(module, fault):
    *path, name = fault["at"].split(":")[1].split(".")
    owner = module
    for part in path:
        owner = getattr(owner, part)
    original, passes = getattr(owner, name), [0]

    def passing(*arguments, **options):
        # A name of another module, such as os.replace, is patched for all; only calls from the module named count.
        foreign = path and sys._getframe(1).f_globals.get("__name__") != module.__name__
        if foreign or not _concerns(fault, arguments, options):
            return original(*arguments, **options)
        passes[0] += 1
        now = passes[0] == fault.get("nth", 1) or fault["do"] == "note"
        if now and fault.get("when", "before") == "before":
            _strike(fault, passes[0])
        result = original(*arguments, **options)
        if now and fault.get("when") == "after":
            _strike(fault, passes[0])
        return result

    setattr(owner, name, passing)


def _concerns(fault, arguments, options):
    here = "kernel" if "JPY_PARENT_PID" in os.environ else "runner"
    if fault.get("who", here) != here:
        return False
    return "text" not in fault or fault["text"] in repr((arguments, options))


def _strike(fault, count):
    if log := os.environ.get("RETRACE_FAULT_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps(fault | {"nth": count, "pid": os.getpid()}) + "\n")
    if fault["do"] in ("kill_run", "orphan"):
        os.kill(int(os.environ["JPY_PARENT_PID"]), signal.SIGKILL)
    if fault["do"] == "kill" and "delay" in fault:
        threading.Timer(fault["delay"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif fault["do"] in ("kill", "kill_run"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault["do"] in ("stop", "orphan"):
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault["do"] == "sleep":
        time.sleep(600)
    elif fault["do"] == "interrupt":
        raise KeyboardInterrupt
    elif fault["do"] == "full":
        raise OSError(28, "No space left on device")


if os.environ.get("RETRACE_FAULT"):
    arm(json.loads(os.environ["RETRACE_FAULT"]))
