"""High Card Duel: the deal is the one it says it is, and every false claim of a step is found where it stands."""

import random
from collections import Counter

import msgspec
import pytest

from lib.tasks import TASKS, group_keys, high_card_duel
from lib.tasks.high_card_duel import (
    DECK,
    NAME,
    Card,
    Deal,
    all_deals,
    check_steps,
    deal,
    episode_of,
    generate,
    question,
    state_of,
    steps,
    verify,
)
from lib.trace import Trace, make_trace, parse_trace, to_json

QUEEN, SEVEN = Card("queen", "spades"), Card("seven", "hearts")
TOY = Deal(QUEEN, SEVEN)
TRUE = [content for _, content in steps(TOY)]


def test_the_deck_is_the_52_cards_in_ungars_order():
    assert len(set(DECK)) == 52
    assert [card.code for card in DECK[:3]] == ["AS", "2S", "3S"] and [card.code for card in DECK[12:15]] == [
        "KS",
        "AH",
        "2H",
    ]
    assert [card.suit for card in DECK[::13]] == ["spades", "hearts", "diamonds", "clubs"]
    assert len({card.code for card in DECK}) == len({str(card) for card in DECK}) == 52


def test_the_ace_is_high():
    assert {card.rank: card.value for card in DECK} == dict(
        two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, jack=11, queen=12, king=13, ace=14
    )


def test_there_are_2652_deals_and_equal_ranks_tie():
    results = Counter(episode.result for episode in all_deals())
    assert len(set(all_deals())) == 52 * 51 == sum(results.values())
    assert results["tie"] == 52 * 3 and results["win"] == results["loss"]


def test_a_deal_is_the_head_of_the_shuffled_deck():
    # By hand: numbers 0 to 51 shuffled by random.Random(42) begin with 9 and 23, the 10th spade and the 11th heart.
    order = list(range(52))
    random.Random(42).shuffle(order)
    assert order[:2] == [9, 23]
    assert deal(42) == Deal(Card("ten", "spades"), Card("jack", "hearts"))


def test_toy_reads_as_the_module_says():
    assert question(TOY) == (
        "High Card Duel: you hold the queen of spades and your opponent reveals the seven of hearts. "
        "What is your result?"
    )
    assert TRUE == [
        "Legal move: reveal the queen of spades.",
        "My card: queen of spades, value 12.",
        "Opponent card: seven of hearts, value 7.",
        "Unseen cards: 40 lower, 3 equal, 8 higher.",
        "Comparison: 12 is higher than 7, so the result is win.",
    ]


def test_every_true_trace_of_every_deal_is_verified():
    for episode in all_deals():
        assert all(
            check.correct for check in check_steps(state_of(episode), [content for _, content in steps(episode)])
        )
        assert episode_of(state_of(episode)) == episode


def test_unseen_cards_are_counted_from_the_51_others():
    for card in DECK:
        counts = high_card_duel.truth(Deal(card, next(other for other in DECK if other != card)))["unseen"]
        assert sum(map(int, counts.values())) == 51
        assert (int(counts["lower"]), int(counts["equal"])) == (4 * (card.value - 2), 3)


FALSE = [
    (1, "queen of spades", "queen of hearts", "says card queen of hearts, the engine says queen of spades"),
    (1, "queen", "seven", "says card seven of spades, the engine says queen of spades"),
    (2, "queen", "king", "says card king of spades, the engine says queen of spades"),
    (2, "12", "13", "says value 13, the engine says 12"),
    (2, "12", "012", "says value 012, the engine says 12"),
    (3, "hearts", "clubs", "says card seven of clubs, the engine says seven of hearts"),
    (3, "7", "8", "says value 8, the engine says 7"),
    (4, "40", "39", "says lower 39, the engine says 40"),
    (4, "3 equal", "4 equal", "says equal 4, the engine says 3"),
    (4, "8", "9", "says higher 9, the engine says 8"),
    (5, "12", "11", "says mine 11, the engine says 12"),
    (5, "than 7", "than 6", "says opponent 6, the engine says 7"),
    (5, "higher than", "lower than", "says relation lower than, the engine says higher than"),
    (5, "higher than", "equal to", "says relation equal to, the engine says higher than"),
    (5, "win", "loss", "says result loss, the engine says win"),
]
KINDS = ["legal_move", "my_card", "opponent_card", "unseen", "comparison"]


@pytest.mark.parametrize("number, old, new, reason", FALSE)
def test_each_false_claim_is_found_in_its_step_with_its_reason(number: int, old: str, new: str, reason: str):
    assert old in TRUE[number - 1]
    contents = list(TRUE)
    contents[number - 1] = contents[number - 1].replace(old, new)
    checks = check_steps(state_of(TOY), contents)
    assert [check.correct for check in checks] == [index != number for index in range(1, 6)]
    assert (checks[number - 1].kind, checks[number - 1].reason) == (KINDS[number - 1], reason)


def test_every_claim_of_the_engine_has_a_false_one_above():
    claims = {(number, reason.split(" ")[1]) for number, _, _, reason in FALSE}
    assert claims == {
        (number, name) for number, kind in enumerate(KINDS, 1) for name in high_card_duel.truth(TOY)[kind]
    }


@pytest.mark.parametrize(
    "content", ["", "x", TRUE[1] + " And more.", " " + TRUE[1], TRUE[1] + "\n", TRUE[1].lower(), TRUE[2]]
)
def test_a_step_that_reads_otherwise_is_wrong(content: str):
    checks = check_steps(state_of(TOY), [TRUE[0], content, *TRUE[2:]])
    assert [check.correct for check in checks] == [True, False, True, True, True]
    assert checks[1].reason == "does not read as a step of kind my_card"


@pytest.mark.parametrize("kept", range(5))
def test_missing_steps_are_wrong(kept: int):
    checks = check_steps(state_of(TOY), TRUE[:kept])
    assert [check.correct for check in checks] == [index < kept for index in range(5)]
    assert {check.reason for check in checks[kept:]} == {"the step is missing"} and [
        check.kind for check in checks
    ] == KINDS


def test_extra_steps_are_wrong():
    checks = check_steps(state_of(TOY), [*TRUE, TRUE[0], "x"])
    assert [(check.kind, check.correct) for check in checks[5:]] == [("extra", False), ("extra", False)]


def test_generated_traces_are_verified_and_read_back():
    for index, trace in enumerate(generate(50, seed=7, created_at="2025-01-01T00:00:00Z")):
        assert verify(trace) == "" and parse_trace(to_json(trace)) == trace
        assert trace.meta["episode_index"] == index and episode_of(trace.meta["state"]) == deal(7 + index)
        assert (trace.meta["source"], trace.meta["game"], trace.meta["seed"]) == ("builtin", NAME, 7)


def test_the_same_seed_deals_the_same_traces_and_no_run_of_seeds_repeats_another():
    first = [trace.id for trace in generate(5, seed=1)]
    assert first == [trace.id for trace in generate(5, seed=1)]
    assert [trace.prompt for trace in generate(4, seed=2)] == [trace.prompt for trace in generate(5, seed=1)][1:]


def changed(trace: Trace, **changes) -> Trace:
    return msgspec.structs.replace(trace, **changes)


def test_what_the_engine_would_not_have_written_is_told():
    [trace] = generate(1, seed=3)
    other, meta = deal(4), trace.meta
    mutated = list(trace.steps)
    mutated[3] = msgspec.structs.replace(mutated[3], content="Unseen cards: 1 lower, 1 equal, 1 higher.")
    for wrong, why in [
        (changed(trace, prompt=question(other)), "prompt: is not the question of meta.state"),
        (changed(trace, final_answer="draw"), f"final_answer: expected {deal(3).result}"),
        (changed(trace, steps=tuple(mutated)), "step 4 (unseen): says lower 1, the engine says "),
        (changed(trace, steps=trace.steps[:4]), "step 5 (comparison): the step is missing"),
        (changed(trace, steps=(*trace.steps, trace.steps[0])), "step 6 (extra): the game has no step"),
        (changed(trace, meta=meta | {"state": state_of(other)}), "meta.state: seed 3 + episode 0 gives another one"),
        (changed(trace, meta=meta | {"episode_index": 1}), "meta.state: seed 3 + episode 1 gives another one"),
    ]:
        assert verify(wrong).startswith(why)


@pytest.mark.parametrize(
    "state",
    [
        {}, None, 5, "QS", ["QS", "7H"], {"my_card": "QS"}, {"my_card": "QS", "opponent_card": "QS"},
        {"my_card": "QS", "opponent_card": "1H"}, {"my_card": "QS", "opponent_card": 7},
        {"my_card": ["QS"], "opponent_card": "7H"}, {"my_card": "QS", "opponent_card": "7H", "late": "x"},
        {"my_card": "QS", "opponent": "7H"},
    ],
)  # fmt: skip
def test_a_state_that_is_none_of_this_game_is_refused(state: object):
    with pytest.raises(ValueError, match="expected two different cards"):
        episode_of(state)
    trace = make_trace(question(TOY), steps(TOY), "win", {"game": NAME, "state": state})
    assert verify(trace).startswith("meta.state: expected two different cards")


def test_the_order_of_a_states_keys_does_not_matter():
    assert episode_of({"opponent_card": "7H", "my_card": "QS"}) == TOY


def test_two_questions_are_the_same_by_their_state_or_their_words():
    assert TASKS[NAME] is high_card_duel
    state = state_of(TOY)
    assert group_keys("What is  2 + 2?") == {"prompt: what is 2 + 2?"}
    assert group_keys("x", NAME, state) & group_keys("y", NAME, dict(reversed(state.items())))
    assert group_keys("x", NAME, state) & group_keys("y", NAME, state | {"late": "x"})
    assert group_keys("x", NAME, {"my_card": "1H"}) == {"prompt: x", "high_card_duel: my_card=1H"}
    assert not group_keys("x", NAME, state) & group_keys("y", NAME, state_of(Deal(SEVEN, QUEEN)))
    assert not group_keys("x", "other", state) & group_keys("y", "other", state)
    assert group_keys("x", NAME, None) == group_keys("X ", "", None) == {"prompt: x"}
