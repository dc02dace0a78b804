"""Writes ungar_goldens.json, what UNGAR itself dealt. Run by an interpreter that has UNGAR:

python tests/tasks/make_ungar_goldens.py
"""

import json
from hashlib import sha256
from pathlib import Path

from ungar.games.high_card_duel import make_high_card_duel_spec
from ungar.runner import play_random_episode
from ungar.version import __version__

SEED, COUNT = 42, 1000


def told(seed: int) -> str:
    """`QUEEN SPADES SEVEN HEARTS 1.0 -1.0`"""
    episode = play_random_episode(make_high_card_duel_spec(), seed=seed)
    cards = [word for card in episode.states[0].hands for word in (card.rank.name, card.suit.name)]
    return " ".join([*cards, *map(str, episode.rewards)])


if __name__ == "__main__":
    lines = [told(seed) for seed in range(SEED, SEED + COUNT)]
    golden = {
        "ungar": __version__,
        "seed": SEED,
        "count": COUNT,
        "first": lines[:5],
        "sha256": sha256("\n".join(lines).encode()).hexdigest(),
    }
    Path(__file__).with_name("ungar_goldens.json").write_text(json.dumps(golden, indent=1) + "\n")
