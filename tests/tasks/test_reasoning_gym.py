"""The process of reasoning-gym: what it says whatever the package prints, how it fails, and that it never lingers."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from standin_gym import interpreter, script

from lib.__main__ import main
from lib.config import Config, DatasetConfig, TracesConfig
from lib.data.selection import NOT_PLAYED
from lib.errors import RequestError
from lib.experiments.stages import Made, make_dataset, make_traces, store
from lib.files import repository_root
from lib.tasks import reasoning_gym
from lib.tasks.reasoning_gym import Died, Drawn, NotDrawn, draw, state_of, verify

STATE = state_of("toy", {}, seed=40, size=10, index=2)
QUESTION = ("40 + 2?", "42", STATE)


def toy(kind: str, index: int = 2) -> dict[str, str]:
    return state_of("toy", {"kind": kind}, seed=40, size=10, index=index)


def test_what_the_package_prints_is_no_answer(gym: str):
    assert reasoning_gym.generators() == ["gsm_symbolic", "toy"]
    assert [draw(toy("sum", index)).question for index in range(3)] == ["40 + 0?", "40 + 1?", "40 + 2?"]
    assert draw(STATE) == Drawn("40 + 2?", "42", "", "")
    assert draw(toy("templates")).template == "7"
    assert verify(*QUESTION, "42") == (1.0, "")
    assert verify(*QUESTION, "41") == (0.5, "")


def test_a_verifier_that_fails_on_an_answer_gives_it_no_score_and_goes_on(gym: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reasoning_gym, "SCORE_SECONDS", 1)
    failures = {given: verify(*QUESTION, given) for given in ("raise", "hang", "leave")}
    assert failures == {
        "raise": (None, "the verifier of toy failed: ValueError: odd answer"),
        "hang": (None, "the verifier of toy was not done after 1 s"),
        "leave": (None, "the verifier of toy ended with exit status 3"),
    }
    assert verify(*QUESTION, "42") == (1.0, "")


def test_an_answer_is_no_program(gym: str, tmp_path: Path):
    for given, deed in [(f"write {tmp_path}/made", "open"), (f"call touch {tmp_path}/made", "os.system")]:
        assert verify(*QUESTION, given) == (
            None,
            f"the verifier of toy failed: PermissionError: an answer must not do {deed}",
        )
    assert not (tmp_path / "made").exists()


def test_what_cannot_be_made_is_an_error_and_no_word_on_the_answer(gym: str):
    with pytest.raises(NotDrawn, match="IndexError: no more"):
        draw(toy("odd fails", 1))
    with pytest.raises(Died, match=f"{gym} ended with SIGKILL"):
        verify("40 + 2?", "42", toy("dead"), "42")
    with pytest.raises(RequestError, match="makes another question here than in the eval set"):
        verify("40 + 3?", "42", STATE, "42")
    with pytest.raises(RequestError, match="makes another question here"):
        verify("40 + 2?", "43", STATE, "43")
    with pytest.raises(RequestError, match="of reasoning-gym 0.1.24, and we have 0.1.25"):
        draw(STATE | {"version": "0.1.24"})
    for state in ({}, STATE | {"more": ""}, STATE | {"index": "-1"}):
        with pytest.raises(RequestError, match="state: expected generator, config, index, version, got"):
            draw(state)


def test_options_are_checked_by_name_and_by_the_generator(gym: str):
    reasoning_gym.check_options("toy", {"shift": 1})
    with pytest.raises(RequestError, match="toy: option 'shft' is not known; .*: kind='sum', shift=0$"):
        reasoning_gym.check_options("toy", {"shft": 1})
    with pytest.raises(RequestError, match="option 'seed' is not known"):
        reasoning_gym.check_options("toy", {"seed": 1})
    with pytest.raises(RequestError, match="no generator 'tox'; it has gsm_symbolic, toy"):
        reasoning_gym.check_options("tox", {})
    with pytest.raises(RequestError, match="toy: refuses the options .*: AssertionError: shift must not be negative"):
        draw(state_of("toy", {"shift": -1}, seed=1, size=1, index=0))


def test_an_entry_depends_on_nothing_that_was_drawn_before(gym: str):
    forward = [draw(toy("drawn", index)) for index in range(4)]
    assert [draw(toy("drawn", index)) for index in reversed(range(4))] == forward[::-1]


def test_worked_answers_that_hold_become_traces_and_the_others_are_counted(gym: str):
    made = reasoning_gym.generate(4, seed=40, created_at="2026-11-22T00:00:00Z")
    assert [trace.meta["episode_index"] for trace in made.traces] == [0, 1, 2, 3]
    assert [trace.meta["state"]["index"] for trace in made.traces] == ["0", "2", "3", "5"]
    assert made.left_out == {"a false equation": 2}
    first = made.traces[1]
    assert (first.prompt, first.final_answer) == ("40 + 2?", "42")
    assert [step.content for step in first.steps] == ["He has some pens.", "That is 40 + 2 = 42 pens."]
    assert first.meta == {
        "source": "reasoning_gym", "game": "gsm_symbolic", "seed": 40, "episode_index": 1,
        "state": state_of("gsm_symbolic", {}, seed=40, size=1_000_000, index=2),
    }  # fmt: skip
    assert reasoning_gym.generate(2, seed=40, created_at="2026-11-22T00:00:00Z").traces == made.traces[:2]


def test_the_verb_keeps_them_and_says_what_it_left_out(gym: str, capsys: pytest.CaptureFixture):
    generate = "traces generate --engine reasoning-gym --seed 40 --count 4 --game"
    assert main(f"{generate} gsm_symbolic".split()) == 0
    said = capsys.readouterr().out
    assert "left out: 2 of 6 worked answers: a false equation\n4 traces added" in said
    assert {trace.meta["source"] for trace in store().scan()} == {"reasoning_gym"} and store().count() == 4
    assert main(f"{generate} toy".split()) == 2
    assert "--engine: reasoning-gym plays gsm_symbolic, not 'toy'" in capsys.readouterr().err
    assert main("traces engines --json".split()) == 0
    [*_, engine] = json.loads(capsys.readouterr().out)
    assert engine == {"name": "reasoning-gym", "version": "0.1.25", "games": ["gsm_symbolic"], "note": ""}


def test_a_configuration_trains_on_the_episodes_that_it_asks_for(gym: str):
    more = Config("gsm", DatasetConfig("gsm", "v1"), traces=TracesConfig("gsm_symbolic", 6, 40, "reasoning-gym"))
    assert make_traces(more) == Made(6, 0, {"a false equation": 3})
    fewer = replace(more, traces=replace(more.traces, count=4))
    assert make_traces(fewer) == Made(0, 4, {"a false equation": 2})
    dataset = make_dataset(fewer)
    assert sorted(trace.meta["episode_index"] for trace in dataset.traces) == [0, 1, 2, 3]
    assert dataset.manifest["dropped"] == {NOT_PLAYED: 2}


def broken(tmp_path: Path, kind: str) -> str:
    if kind == "absent":
        return script(tmp_path, f'exec "{sys.executable}" -S "$@"')
    if kind == "another version":
        return interpreter(tmp_path, version="0.1.24")
    if kind == "broken":
        return interpreter(tmp_path, package="import one_that_is_missing")
    if kind == "no file":
        return str(tmp_path / "python")
    return script(tmp_path, {"talks": "echo hello", "fails": "echo odd >&2; exit 3"}[kind])


REFUSED = {
    "absent": "reasoning-gym is not installed in .*python: python -m pip install -r requirements-reasoning-gym.txt, or "
    "name an interpreter that has it with --reasoning-gym-python or RETRACE_REASONING_GYM_PYTHON$",
    "another version": "expected reasoning-gym 0.1.25, got 0.1.24: python -m pip install",
    "broken": "reasoning-gym 0.1.25 cannot be imported: ModuleNotFoundError: No module named 'one_that_is_missing'",
    "no file": "no interpreter for reasoning-gym: No such file or directory",
    "talks": "says 'hello', which is no answer",
    "fails": "ended with exit status 3: odd",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_interpreter_that_will_not_do_is_refused_in_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(reasoning_gym.VARIABLE, broken(tmp_path, kind))
    with pytest.raises(RequestError, match=REFUSED[kind]) as refused:
        reasoning_gym.generators()
    assert "\n" not in str(refused.value) and reasoning_gym.python() in str(refused.value)


def test_an_interpreter_that_sets_another_hash_seed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interpreter(tmp_path)
    seeded = f'PYTHONHASHSEED=1 PYTHONPATH="{tmp_path}/packages" exec "{sys.executable}" "$@"'
    monkeypatch.setenv(reasoning_gym.VARIABLE, script(tmp_path, seeded))
    with pytest.raises(RequestError, match="PYTHONHASHSEED does not reach it"):
        reasoning_gym.generators()


def test_an_interrupted_request_leaves_no_stale_answer(gym: str):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        draw(STATE)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            verify(*QUESTION, "hang")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert draw(toy("sum", 3)).question == "40 + 3?"


def test_an_interrupted_start_leaves_no_stale_answer(gym: str, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as importing:
        importing.setattr(reasoning_gym.Worker, "_answer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw(STATE)
    assert draw(toy("sum", 3)).question == "40 + 3?"


def test_the_process_ends_with_the_one_that_started_it_however_that_ends(gym: str):
    program = (
        "import os\nfrom lib.tasks import reasoning_gym\nreasoning_gym.generators()\n"
        "print(reasoning_gym.worker(reasoning_gym.python())._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repository_root(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while alive(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_worker_needs_nothing_of_ours():
    source = reasoning_gym.WORKER.read_text()
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", source, re.MULTILINE)) - set(sys.stdlib_module_names)
    assert imported == {"reasoning_gym", "numpy"}


def test_the_version_is_the_pinned_one():
    pinned = (repository_root() / "requirements-reasoning-gym.txt").read_text()
    assert f"\nreasoning-gym=={reasoning_gym.VERSION}\n" in pinned
    lines = [line for line in pinned.splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
