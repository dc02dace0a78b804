"""High Card Duel as the UNGAR engine plays it (github.com/m-cahill/ungar), told as the same traces as our engine's.

    for trace in generate(1000, seed=42, created_at="", python=".venv-ungar/bin/python"): ...

UNGAR pins numpy below 2, and jax needs 2, so the two seldom share an environment: UNGAR is played in a process of
its own, by the interpreter that has it. Its cards, its legal move and its rewards are what the trace tells; where
they are not what our engine holds true, nothing is generated.

Of its other games no trace is made. Their moves are drawn at random, so no reasoning led to them, and what could be
told instead would be of another game than people know. Both Gin Rummy and Spades mini of UNGAR 0.1.0 take the first 52
of its 56 cards for a deck, so that three jokers are dealt and jack, queen and king of clubs never are. Gin Rummy counts
every card as deadwood, as if there were no melds, and of 40 games of random play none was over after 400 moves; in
Spades mini the ace is low.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.errors import RequestError, RetraceError
from lib.files import find_interpreter
from lib.tasks import high_card_duel
from lib.tasks.ungar_player import NOT_INSTALLED
from lib.trace import Trace

INSTALL = (
    "install it into an environment of its own, python3 -m venv .venv-ungar && .venv-ungar/bin/pip install "
    "git+https://github.com/m-cahill/ungar, and name that: --ungar-python .venv-ungar/bin/python"
)
PLAYER = Path(__file__).with_name("ungar_player.py")


def generate(count: int, seed: int, created_at: str = "", python: str = "") -> Iterator[Trace]:
    """`count` traces: episode i is dealt by UNGAR with seed `seed + i`.

    `python` is the interpreter that has UNGAR; empty: this one. Raises RequestError where it has none, RetraceError
    where UNGAR fails, or deals and decides otherwise than our engine.
    """
    for index, episode in enumerate(_play(seed, count, python)):
        dealt = high_card_duel.deal(seed + index)
        ours = {
            "cards": [dealt.mine.code, dealt.opponent.code],
            "legal_moves": ["reveal"],
            "moves": ["reveal", "reveal"],
            "rewards": {"win": [1.0, -1.0], "loss": [-1.0, 1.0], "tie": [0.0, 0.0]}[dealt.result],
        }
        if episode != ours:
            raise RetraceError(
                f"UNGAR's episode of seed {seed + index} is {json.dumps(episode)}, our engine's {json.dumps(ours)}: "
                "its rules are not those that the steps of a trace are checked by; nothing was generated"
            )
        yield high_card_duel.tell(dealt, "ungar", seed, index, created_at)


def version(python: str = "") -> str:
    """UNGAR's own version. Raises RequestError where it is not installed for that interpreter."""
    played = _run(0, 0, python)
    [first] = played
    return first["ungar"]


def _play(seed: int, count: int, python: str) -> Iterator[dict[str, Any]]:
    played = _run(seed, count, python)
    next(played)
    yield from played


def _run(seed: int, count: int, python: str) -> Iterator[dict[str, Any]]:
    """What the player prints, line by line; it must be all that was asked for."""
    python = find_interpreter(python)
    try:
        player = subprocess.Popen(
            [python, str(PLAYER), str(seed), str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise RequestError(f"UNGAR's interpreter {python}: cannot be run ({error.strerror}); {INSTALL}") from None
    lines = 0
    with player:
        try:
            for line in player.stdout:
                lines += 1
                yield json.loads(line)
        finally:
            player.kill()  # it is over, or nobody listens any more
        said = player.stderr.read().strip().splitlines()
    if player.returncode == NOT_INSTALLED:
        raise RequestError(f"UNGAR is not installed for {python} ({said[-1]}); {INSTALL}")
    if lines != count + 1:
        reason = said[-1] if said else "it said nothing"
        raise RetraceError(f"UNGAR ended after {max(0, lines - 1)} of {count} episodes ({reason})")
