"""Plays High Card Duel by the UNGAR engine, and prints what was dealt. It runs in UNGAR's own interpreter.

    python lib/tasks/ungar_player.py 42 2      # episodes of the seeds 42 and 43; 0 episodes tell the version alone

    {"ungar": "0.1.0"}
    {"cards": ["QS", "7H"], "legal_moves": ["reveal"], "moves": ["reveal", "reveal"], "rewards": [1.0, -1.0]}
    …

It imports nothing of ours, and no more of UNGAR than the game: neither numpy's version nor torch matters here.
"""

import json
import sys

NOT_INSTALLED = 3


def main(seed: int, count: int) -> None:
    sys.path.pop(0)  # this folder, whose ungar.py is ours
    try:
        from ungar.games.high_card_duel import make_high_card_duel_spec
        from ungar.runner import play_random_episode
        from ungar.version import __version__
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    print(json.dumps({"ungar": __version__}))
    spec = make_high_card_duel_spec()
    for episode_seed in range(seed, seed + count):
        episode = play_random_episode(spec, seed=episode_seed)
        first = episode.states[0]
        told = {
            "cards": [_code(card) for card in first.hands],
            "legal_moves": [move.name for move in first.legal_moves()],
            "moves": [move.name for move in episode.moves],
            "rewards": list(episode.rewards),
        }
        print(json.dumps(told))


def _code(card) -> str:
    """`QS`; a joker, which this game does not deal, is `?`."""
    number = card.rank.value - 1
    return "A23456789TJQK?"[number] + card.suit.name[0]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
