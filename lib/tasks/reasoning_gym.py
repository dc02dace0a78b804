"""reasoning-gym: its generators as questions, its verifiers as judges, and its `gsm_symbolic` as worked traces.

    state = state_of("basic_arithmetic", {}, seed=42, size=9, index=0)
    drawn = draw(state)                         # Drawn(question="Calculate -5 * -6.", answer="30", …)
    verify(drawn.question, drawn.answer, state, "30")  # Judgement(score=1.0, reason="")
    generate(100, seed=42).traces               # worked answers of gsm_symbolic

https://github.com/open-thought/reasoning-gym, Apache-2.0; arXiv:2505.24760. Several of its generators vary with
PYTHONHASHSEED, which counts only where it is set before Python starts, and it may be installed in another environment
than ours: so it always runs in a process of its own, with PYTHONHASHSEED=0 (lib/tasks/reasoning_gym_worker.py). The
interpreter is that of the environment variable RETRACE_REASONING_GYM_PYTHON, or the running one. The process starts
when it is needed first, and ends with ours.
"""

import atexit
import json
import os
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lib.errors import RequestError, RetraceError
from lib.files import find_interpreter
from lib.tasks import gsm_symbolic
from lib.trace import Trace, make_trace

NAME = "reasoning_gym"
VERSION = "0.1.25"
VARIABLE = "RETRACE_REASONING_GYM_PYTHON"
WORKER = Path(__file__).with_name("reasoning_gym_worker.py")
STATE = ("generator", "config", "index", "version")
TRACES = 1_000_000  # in the data set that traces are from: which they are must not depend on how many are asked for
DRAW_SECONDS, SCORE_SECONDS = 120, 20
INSTALL = "python -m pip install -r requirements-reasoning-gym.txt"


class Drawn(NamedTuple):
    """One entry of a generator; `answer` is None where it has none of its own, `worked` the steps of gsm_symbolic."""

    question: str
    answer: str | None
    template: str
    worked: str


class Judgement(NamedTuple):
    """What a verifier gives an answer, 0 to 1; None, and the reason, where it fails on it."""

    score: float | None
    reason: str


class Generated(NamedTuple):
    """Traces, and how many worked answers make none, by reason."""

    traces: list[Trace]
    left_out: Counter[str]


class NotDrawn(RetraceError):
    """The generator itself failed at one index."""


class Died(RetraceError):
    """The process of reasoning-gym ended before it had answered; `how`, whatever the machine."""

    def __init__(self, interpreter: str, how: str) -> None:
        super().__init__(f"reasoning-gym in {interpreter} {how}")
        self.how = how


def python() -> str:
    """The interpreter that has reasoning-gym; a relative path leads from the working directory, or the repository."""
    return find_interpreter(os.environ.get(VARIABLE, ""))


def version() -> str:
    """Its version, which is always the pinned one. Raises RequestError where reasoning-gym is not there."""
    generators()
    return VERSION


def generators() -> list[str]:
    """The names of all generators. Raises RequestError where reasoning-gym is not there."""
    return worker(python()).ask(DRAW_SECONDS, do="generators")["generators"]


def state_of(generator: str, options: Mapping[str, Any], seed: int, size: int, index: int) -> dict[str, str]:
    """What an entry is made again from: the index-th of a data set of `size`."""
    config = json.dumps({**options, "seed": seed, "size": size}, sort_keys=True)
    return {"generator": generator, "config": config, "index": str(index), "version": VERSION}


def check_options(generator: str, options: Mapping[str, Any]) -> None:
    """Raises RequestError where there is no such generator, or it has no such option."""
    told = worker(python()).ask(DRAW_SECONDS, do="options", generator=generator)
    if "error" in told:
        raise RequestError(f"{told['error']}; it has {', '.join(told['generators'])}")
    known = {name: default for name, default in told["options"].items() if name not in ("seed", "size")}
    for name in options:
        if name not in known:
            shown = ", ".join(f"{option}={default}" for option, default in known.items()) or "none"
            raise RequestError(f"{generator}: option {name!r} is not known; its options, and their defaults: {shown}")


def draw(state: Mapping[str, str]) -> Drawn:
    """The entry of a state.

    Raises NotDrawn where the generator fails at this index, RequestError where it refuses its options, or where the
    state is none of this version.
    """
    told = worker(python()).ask(DRAW_SECONDS, do="draw", **_asked(state))
    if "refused" in told:
        raise RequestError(f"{state['generator']}: refuses the options {state['config']}: {told['refused']}")
    if "failed" in told:
        raise NotDrawn(told["failed"])
    return Drawn(**told)


def check_entry(question: str, answer: str, state: Mapping[str, str]) -> None:
    """Raises RequestError where the state makes another entry here, and RetraceError where it makes none."""
    drawn = draw(state)
    if (drawn.question, drawn.answer) != (question, answer):
        raise RequestError(
            f"{state['generator']}: index {state['index']} of {state['config']} makes another question here than in "
            f"the eval set; packages other than those of requirements-reasoning-gym.txt? {INSTALL}"
        )


def verify(question: str, answer: str, state: Mapping[str, str], given: str) -> Judgement:
    """What the generator's verifier gives the answer `given` to a question, of which `answer` is the generator's own.

    Where the verifier raises, takes too long or takes its process down with it, that answer has no score. Raises as
    `check_entry` does.
    """
    check_entry(question, answer, state)
    try:
        told = worker(python()).ask(SCORE_SECONDS, do="score", **_asked(state), answer=given)
    except Died as error:
        return Judgement(None, f"the verifier of {state['generator']} {error.how}")
    if "failed" in told:
        return Judgement(None, f"the verifier of {state['generator']} failed: {told['failed']}")
    return Judgement(told["score"], "")


def generate(count: int, seed: int, created_at: str = "") -> Generated:
    """`count` traces of gsm_symbolic whose worked steps hold: the first of the data set of that seed.

    `episode_index` counts those that hold; the place in the data set is in `state`. Raises RequestError where the data
    set ends before.
    """
    made = Generated([], Counter())
    for index in range(TRACES):
        if len(made.traces) == count:
            return made
        state = state_of(gsm_symbolic.NAME, {}, seed, TRACES, index)
        drawn = draw(state)
        if reason := gsm_symbolic.why_not(drawn.worked, drawn.answer):
            made.left_out[reason] += 1
            continue
        meta = {"source": NAME, "game": gsm_symbolic.NAME, "seed": seed, "episode_index": len(made.traces)}
        meta["state"] = state
        steps = [("step", step) for step in gsm_symbolic.steps(drawn.worked)]
        made.traces.append(make_trace(drawn.question, steps, drawn.answer, meta, created_at=created_at))
    raise RequestError(f"{gsm_symbolic.NAME}: {TRACES} entries hold {len(made.traces)} traces, not {count}")


@cache
def worker(interpreter: str) -> "Worker":
    """The process of this interpreter, one for all who ask."""
    return Worker(interpreter)


class Worker:
    """A process of reasoning-gym: started when it is first asked, and again after it died."""

    def __init__(self, interpreter: str) -> None:
        self.interpreter = interpreter
        self._process: subprocess.Popen | None = None
        atexit.register(self.stop)

    def ask(self, seconds: int, **request: Any) -> dict[str, Any]:
        """Its answer to one request. Raises Died, or RequestError where it cannot be started as it must be."""
        try:
            if self._process is None:
                self._start()
            self._process.stdin.write(json.dumps({**request, "seconds": seconds}) + "\n")
            self._process.stdin.flush()
            return self._answer(f"after {seconds} s")
        except BrokenPipeError:
            raise self._death(f"after {seconds} s") from None
        except BaseException:
            self.stop()  # interrupted: what it still says would be taken for the answer to the next request
            raise

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with suppress(BrokenPipeError):  # what was not sent yet
                self._process.stdin.close()
            self._process.stdout.close()
            self._errors.close()
            self._process = None

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "TZ": "UTC", "OPENBLAS_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [self.interpreter, str(WORKER)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._errors, encoding="utf-8",
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise RequestError(f"{self.interpreter}: no interpreter for reasoning-gym: {error.strerror}") from None
        try:
            hello = self._answer("at the start")
        except Died as error:
            raise RequestError(str(error)) from None
        if problem := self._problem(hello):
            self.stop()
            raise RequestError(problem)

    def _problem(self, hello: dict[str, Any]) -> str:
        """Why this is no process to ask; empty where it is one."""
        if "absent" in hello:
            return (
                f"reasoning-gym is not installed in {self.interpreter}: {INSTALL}, or name an interpreter that has it "
                f"with --reasoning-gym-python or {VARIABLE}"
            )
        if "error" in hello:
            return f"{self.interpreter}: {hello['error']}"
        if hello["version"] != VERSION:
            return f"{self.interpreter}: expected reasoning-gym {VERSION}, got {hello['version']}: {INSTALL}"
        return f"{self.interpreter}: PYTHONHASHSEED does not reach it" if hello["hash_randomization"] else ""

    def _answer(self, when: str) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death(when)
        try:
            return json.loads(line)
        except ValueError:
            self.stop()
            raise Died(self.interpreter, f"says {line.strip()[:80]!r}, which is no answer") from None

    def _death(self, when: str) -> Died:
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").split("\n")
        last = [f": {line.strip()[:300]}" for line in said if line.strip()][-1:]
        self.stop()
        if status == -signal.SIGALRM:
            return Died(self.interpreter, f"was not done {when}")
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return Died(self.interpreter, f"ended with {how}{''.join(last)}")


def _asked(state: Mapping[str, str]) -> dict[str, Any]:
    if set(state) != set(STATE) or not state["index"].isdecimal():
        raise RequestError(f"state: expected {', '.join(STATE)}, got {str(dict(state))[:200]}")
    if state["version"] != VERSION:
        raise RequestError(f"state: of reasoning-gym {state['version']}, and we have {VERSION}; make the eval set anew")
    return {"generator": state["generator"], "config": state["config"], "index": int(state["index"])}
