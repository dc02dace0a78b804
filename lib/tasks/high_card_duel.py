"""High Card Duel: two cards are dealt, the higher rank wins. Our own engine, and the truth of every step.

52 cards, one each, ace high, equal ranks tie. Episode i of seed s is dealt by `random.Random(s + i)` from a
deck in the canonical order of the UNGAR engine (spades, hearts, diamonds, clubs; ace, two … king): the first
two cards after the shuffle are ours and the opponent's. A trace of it reads:

    High Card Duel: you hold the queen of spades and your opponent reveals the seven of hearts. …
    1. Legal move: reveal the queen of spades.
    2. My card: queen of spades, value 12.
    3. Opponent card: seven of hearts, value 7.
    4. Unseen cards: 40 lower, 3 equal, 8 higher.
    5. Comparison: 12 is higher than 7, so the result is win.
    Answer: win

Unseen are the 51 cards other than our own. Each step makes claims, which `check_steps` reads back out of its
text and compares with the engine's.
"""

import random
from collections.abc import Iterator
from functools import cache
from itertools import permutations
from typing import NamedTuple

from lib.tasks.steps import StepCheck, check_claims, verify_trace
from lib.trace import Trace, make_trace

NAME = "high_card_duel"
SUITS = ["spades", "hearts", "diamonds", "clubs"]
RANKS = ["ace", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "jack", "queen", "king"]


class Card(NamedTuple):
    """One of 52; written `queen of spades` in a text and `QS` in a state."""

    rank: str
    suit: str

    def __str__(self) -> str:
        return f"{self.rank} of {self.suit}"

    @property
    def value(self) -> int:
        """2 to 14, ace high."""
        return 14 if self.rank == "ace" else RANKS.index(self.rank) + 1

    @property
    def code(self) -> str:
        return "A23456789TJQK"[RANKS.index(self.rank)] + self.suit[0].upper()


class Deal(NamedTuple):
    """Everything there is to know about an episode."""

    mine: Card
    opponent: Card

    @property
    def result(self) -> str:
        difference = self.mine.value - self.opponent.value
        return "win" if difference > 0 else "loss" if difference < 0 else "tie"


DECK = [Card(rank, suit) for suit in SUITS for rank in RANKS]
_CARDS = {card.code: card for card in DECK}
_WORDS = {"win": "higher than", "loss": "lower than", "tie": "equal to"}

# Each kind of step: how it is written, and what it claims. The order is the order of a trace.
_CARD = f"(?:{'|'.join(RANKS)}) of (?:{'|'.join(SUITS)})"
_STEPS = {
    "legal_move": rf"Legal move: reveal the (?P<card>{_CARD})\.",
    "my_card": rf"My card: (?P<card>{_CARD}), value (?P<value>\d+)\.",
    "opponent_card": rf"Opponent card: (?P<card>{_CARD}), value (?P<value>\d+)\.",
    "unseen": r"Unseen cards: (?P<lower>\d+) lower, (?P<equal>\d+) equal, (?P<higher>\d+) higher\.",
    "comparison": (
        r"Comparison: (?P<mine>\d+) is (?P<relation>higher than|lower than|equal to) (?P<opponent>\d+), "
        r"so the result is (?P<result>win|loss|tie)\."
    ),
}


def deal(seed: int) -> Deal:
    """The two cards of the episode with this seed."""
    deck = list(DECK)
    random.Random(seed).shuffle(deck)
    return Deal(deck[0], deck[1])


def all_deals() -> list[Deal]:
    """The 2,652 different deals."""
    return [Deal(mine, opponent) for mine, opponent in permutations(DECK, 2)]


def generate(count: int, seed: int, created_at: str = "") -> Iterator[Trace]:
    """`count` traces: episode i is dealt with seed `seed + i`."""
    for index in range(count):
        yield tell(deal(seed + index), "builtin", seed, index, created_at)


def tell(episode: Deal, source: str, seed: int, index: int, created_at: str) -> Trace:
    """The episode as a trace; `source` is the engine that dealt it as episode `index` of `seed`."""
    meta = {"source": source, "game": NAME, "seed": seed, "episode_index": index, "state": state_of(episode)}
    return make_trace(question(episode), steps(episode), episode.result, meta, created_at=created_at)


def question(episode: Deal) -> str:
    return (
        f"High Card Duel: you hold the {episode.mine} and your opponent reveals the {episode.opponent}. "
        "What is your result?"
    )


def steps(episode: Deal) -> list[tuple[str, str]]:
    """(type, content) of each step of the true reasoning."""
    claims = truth(episode)
    mine, opponent, unseen = claims["my_card"], claims["opponent_card"], claims["unseen"]
    compared = claims["comparison"]
    return [
        ("legal_move", f"Legal move: reveal the {claims['legal_move']['card']}."),
        ("observation", f"My card: {mine['card']}, value {mine['value']}."),
        ("observation", f"Opponent card: {opponent['card']}, value {opponent['value']}."),
        ("count", f"Unseen cards: {unseen['lower']} lower, {unseen['equal']} equal, {unseen['higher']} higher."),
        (
            "comparison",
            f"Comparison: {compared['mine']} is {compared['relation']} {compared['opponent']}, "
            f"so the result is {compared['result']}.",
        ),
    ]


def truth(episode: Deal) -> dict[str, dict[str, str]]:
    """What each kind of step must claim, counted from the deck."""
    mine, opponent = episode
    return {
        "legal_move": {"card": str(mine)},
        "my_card": {"card": str(mine), "value": str(mine.value)},
        "opponent_card": {"card": str(opponent), "value": str(opponent.value)},
        "unseen": _unseen(mine),
        "comparison": {
            "mine": str(mine.value),
            "relation": _WORDS[episode.result],
            "opponent": str(opponent.value),
            "result": episode.result,
        },
    }


@cache
def _unseen(mine: Card) -> dict[str, str]:
    """How many of the other 51 cards are lower, equal and higher."""
    others = [card.value for card in DECK if card != mine]
    return {
        "lower": str(sum(value < mine.value for value in others)),
        "equal": str(sum(value == mine.value for value in others)),
        "higher": str(sum(value > mine.value for value in others)),
    }


def state_of(episode: Deal) -> dict[str, str]:
    """The state from which every step can be checked, as kept in `meta` and in an eval set."""
    return {"my_card": episode.mine.code, "opponent_card": episode.opponent.code}


def episode_of(state: dict[str, str]) -> Deal:
    """The deal of a state. Raises ValueError where it is not one of this game."""
    codes = [state.get(name) if isinstance(state, dict) else None for name in ("my_card", "opponent_card")]
    known = all(isinstance(code, str) and code in _CARDS for code in codes)
    if not known or len(state) != 2 or codes[0] == codes[1]:
        raise ValueError(
            f"expected two different cards such as {{'my_card': 'QS', 'opponent_card': '7H'}}, got {str(state)[:80]}"
        )
    return Deal(_CARDS[codes[0]], _CARDS[codes[1]])


def canonical(state: dict[str, str]) -> dict[str, str]:
    """What two states of the same question have in common: the two cards, each in its place, whatever stands beside."""
    try:
        return state_of(episode_of({name: state[name] for name in ("my_card", "opponent_card")}))
    except (KeyError, ValueError):
        return state


def check_steps(state: dict[str, str], contents: list[str]) -> list[StepCheck]:
    """One check a step, in order; a step that is missing at the end counts as wrong."""
    return check_claims(_STEPS, truth(episode_of(state)), contents)


def verify(trace: Trace) -> str:
    """Why this trace is not what the engine would have written; empty where it is."""
    return verify_trace(trace, episode_of, deal, question, check_steps)
