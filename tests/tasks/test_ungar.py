"""UNGAR's episodes become the same traces as our engine's, and whatever goes wrong in its process is told."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from lib.__main__ import main
from lib.errors import RequestError, RetraceError
from lib.experiments.stages import store
from lib.files import repository_root
from lib.tasks import high_card_duel, ungar
from lib.trace import to_json

WHEN = "2025-01-01T00:00:00Z"
GOLDENS = json.loads(Path(__file__).with_name("ungar_goldens.json").read_bytes())

# What our bridge uses of UNGAR, in its own words, so that the bridge is tested where UNGAR is not at hand.
STAND_IN = {
    "version": '__version__ = "0.1.0"',
    "games/high_card_duel": """
from enum import Enum
from random import Random
from types import SimpleNamespace as Thing
Suit = Enum("Suit", "SPADES HEARTS DIAMONDS CLUBS")
Rank = Enum("Rank", "ACE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN JACK QUEEN KING JOKER")
def make_high_card_duel_spec():
    return Thing(deck=[Thing(rank=rank, suit=suit) for suit in Suit for rank in Rank if rank is not Rank.JOKER])
""",
    "runner": """
from random import Random
from types import SimpleNamespace as Thing
def play_random_episode(spec, seed):
    deck = list(spec.deck)
    Random(seed).shuffle(deck)
    mine, other = deck[:2]
    difference = mine.rank.value % 13 - other.rank.value % 13
    if mine.rank.name == "ACE" or other.rank.name == "ACE":
        difference = (mine.rank.name == "ACE") - (other.rank.name == "ACE")
    elif "KING" in (mine.rank.name, other.rank.name):
        difference = mine.rank.value - other.rank.value
    score = float((difference > 0) - (difference < 0))
    reveal = Thing(name="reveal")
    return Thing(states=[Thing(hands=(mine, other), legal_moves=lambda: [reveal])], moves=[reveal] * 2,
                 rewards=(score, -score or 0.0) if score else (0.0, 0.0))
""",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which the interpreter of the tests imports the stand-in as `ungar`."""
    package = tmp_path / "site" / "ungar"
    (package / "games").mkdir(parents=True)
    for name in ("__init__", "games/__init__"):
        (package / f"{name}.py").touch()
    for name, source in STAND_IN.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return package


def same_but_for_source(count: int, seed: int, python: str = "") -> None:
    theirs, ours = ungar.generate(count, seed, WHEN, python), high_card_duel.generate(count, seed, WHEN)
    for their, our in zip(theirs, ours, strict=True):
        told, told_by_us = json.loads(to_json(their)), json.loads(to_json(our))
        assert told.pop("id") != told_by_us.pop("id")
        assert (told["meta"].pop("source"), told_by_us["meta"].pop("source")) == ("ungar", "builtin")
        assert told == told_by_us


def test_our_engine_deals_and_decides_as_ungar_did():
    rewards = {"win": "1.0 -1.0", "loss": "-1.0 1.0", "tie": "0.0 0.0"}
    deals = [high_card_duel.deal(GOLDENS["seed"] + index) for index in range(GOLDENS["count"])]
    lines = [f"{mine.rank} {mine.suit} {other.rank} {other.suit}".upper() for mine, other in deals]
    lines = [f"{line} {rewards[deal.result]}" for line, deal in zip(lines, deals, strict=True)]
    assert lines[:5] == GOLDENS["first"] and sha256("\n".join(lines).encode()).hexdigest() == GOLDENS["sha256"]


@pytest.mark.ungar
def test_traces_by_ungar_itself_are_ours_but_for_source_and_id():
    same_but_for_source(1000, 42, os.environ["RETRACE_UNGAR_PYTHON"])


def test_traces_by_ungar_are_ours_but_for_source_and_id(installed):
    same_but_for_source(200, 7)


def test_an_interpreter_is_found_from_the_repository_too(installed, tmp_path, monkeypatch):
    link = repository_root() / "runs" / f"python-{os.getpid()}"
    link.symlink_to(sys.executable)
    try:
        monkeypatch.chdir(tmp_path)
        assert ungar.version(str(link.relative_to(repository_root()))) == "0.1.0"
    finally:
        link.unlink()


def test_generate_keeps_them_and_engines_lists_them(installed, capsys):
    assert main("traces generate --engine ungar --game high_card_duel --count 20 --seed 3".split()) == 0
    assert {trace.meta["source"] for trace in store().scan()} == {"ungar"} and store().count() == 20
    assert main("traces verify".split()) == 0
    assert main("traces engines --json".split()) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(engine["name"], engine["version"], engine["note"]) for engine in found[:2]] == [
        ("builtin", "0.1.0", ""), ("ungar", "0.1.0", "")]  # fmt: skip


def test_absent_it_says_how_to_install_it(capsys):
    assert main("traces generate --engine ungar --game high_card_duel --count 20".split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "UNGAR is not installed for" in line and "pip install git+https://github.com/m-cahill/ungar" in line
    assert main("traces engines".split()) == 0
    assert "ungar         absent" in capsys.readouterr().out
    assert main("run configs/smoke.yaml --set traces.engine=ungar".split()) == 2
    assert "UNGAR is not installed for" in capsys.readouterr().err
    with pytest.raises(RequestError, match="/nowhere/python: cannot be run .*No such file.*; install it into"):
        ungar.version("/nowhere/python")


def test_another_game_is_refused(capsys):
    assert main("traces generate --engine ungar --game arithmetic --count 2".split()) == 2
    assert "ungar plays high_card_duel, not 'arithmetic'; take builtin" in capsys.readouterr().err
    assert main("run configs/arithmetic.yaml --set traces.engine=ungar".split()) == 2
    assert "ungar plays high_card_duel, not 'arithmetic'; take builtin" in capsys.readouterr().err


@pytest.mark.parametrize(
    "broken, said",
    [
        (("Random(seed)", "Random(seed + 1)"), "UNGAR's episode of seed 42 is .* not those that the steps"),
        (("rewards=(score", "rewards=(2 * score"), "not those that the steps"),
        (("deck = list", "assert seed < 45, 'no more cards'; deck = list"), "after 3 of 20 episodes .*no more cards"),
        (("deck = list", "import os; os._exit(1); deck = list"), "after 0 of 20 episodes .it said nothing"),
    ],
    ids=["another deal", "another decision", "it raises", "it dies"],
)
def test_what_is_not_as_our_engine_holds_it_or_fails_is_told_and_nothing_kept(broken, said, installed):
    source = (installed / "runner.py").read_text()
    (installed / "runner.py").write_text(source.replace(*broken))
    with pytest.raises(RetraceError, match=said):
        store().add(ungar.generate(20, 42))
    assert store().count() == 0


def test_whoever_stops_listening_leaves_no_process(installed):
    episodes = ungar.generate(1_000_000, 42)
    assert next(episodes).meta["source"] == "ungar"
    episodes.close()
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "ungar_player.py 42 1000000" not in running
