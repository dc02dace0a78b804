"""Arithmetic: every claim of a step is the one that long addition and multiplication make, and a false one is found."""

import random
import re
from collections import Counter

import msgspec
import pytest

from lib.tasks import TASKS, arithmetic, group_keys
from lib.tasks.arithmetic import (
    CATEGORIES,
    NAME,
    Problem,
    canonical,
    check_steps,
    draw,
    episode_of,
    generate,
    problem,
    question,
    state_of,
    steps,
    truth,
    verify,
)
from lib.trace import Trace, make_trace, parse_trace, to_json

SUM, PRODUCT = Problem(347, "+", 85), Problem(347, "*", 6)
TRUE_SUM = [
    "First: hundreds 3 tens 4 units 7.",
    "Second: hundreds 0 tens 8 units 5.",
    "units: 7 plus 5 plus 0 is 12, carry 1, result 2.",
    "tens: 4 plus 8 plus 1 is 13, carry 1, result 3 2.",
    "hundreds: 3 plus 0 plus 1 is 4, carry 0, result 4 3 2.",
    "Last carry 0, result 4 3 2.",
]
TRUE_PRODUCT = [
    "First: hundreds 3 tens 4 units 7.",
    "units: 7 times 6 is 42, plus 0 is 42, carry 4, result 2.",
    "tens: 4 times 6 is 24, plus 4 is 28, carry 2, result 8 2.",
    "hundreds: 3 times 6 is 18, plus 2 is 20, carry 2, result 0 8 2.",
    "Last carry 2, result 2 0 8 2.",
]
TOYS = [(SUM, TRUE_SUM), (PRODUCT, TRUE_PRODUCT)]


def contents_of(episode: Problem) -> list[str]:
    return [content for _, content in steps(episode)]


def test_toys_read_as_written_by_hand():
    assert question(SUM) == "Arithmetic: what is 3 4 7 plus 8 5?" and SUM.result == "4 3 2"
    assert question(PRODUCT) == "Arithmetic: what is 3 4 7 times 6?" and PRODUCT.result == "2 0 8 2"
    assert [contents_of(episode) for episode, _ in TOYS] == [TRUE_SUM, TRUE_PRODUCT]


def test_every_digit_of_a_trace_stands_alone_but_for_the_totals_of_a_column():
    for trace in generate(200, seed=0):
        text = " ".join([trace.prompt, *(step.content for step in trace.steps), trace.final_answer])
        assert not re.search(r"[0-9]{3}", text) and re.findall(r"[0-9]{2}", text) == re.findall(
            r"(?<=is )[0-9]{2}", text
        )


@pytest.mark.parametrize("category", CATEGORIES, ids=str)
def test_the_columns_end_in_the_result_and_every_true_trace_is_verified(category: arithmetic.Category):
    for seed in range(200):
        episode = draw(category, random.Random(seed))
        claims = truth(episode)
        whole = episode.a + episode.b if episode.operator == "+" else episode.a * episode.b
        assert claims["last_carry"]["result"].replace(" ", "") == str(whole) == episode.result.replace(" ", "")
        assert len(claims) == category.digits + (3 if episode.operator == "+" else 2)
        assert all(check == (kind, True, "", "") for kind, check in zip(claims, checked(episode), strict=True))
        assert episode_of(state_of(episode)) == episode


def checked(episode: Problem, contents: list[str] | None = None) -> list:
    return check_steps(state_of(episode), contents_of(episode) if contents is None else contents)


@pytest.mark.parametrize("episode, contents", TOYS, ids=["sum", "product"])
def test_any_other_number_anywhere_in_a_step_is_a_false_claim_of_that_step(episode: Problem, contents: list[str]):
    for index, content in enumerate(contents):
        for number in re.finditer("[0-9]+", content):
            for other in {str(int(number[0]) + 1), "0", "100"} - {number[0]}:
                changed = f"{content[: number.start()]}{other}{content[number.end() :]}"
                found = checked(episode, [*contents[:index], changed, *contents[index + 1 :]])
                assert [check.error for check in found] == ["false" if at == index else "" for at in range(len(found))]
                assert re.fullmatch("says .* the engine says .*", found[index].reason)


@pytest.mark.parametrize(
    "content", ["", "x", TRUE_SUM[3] + " So.", TRUE_SUM[3].title(), TRUE_SUM[3] + "\n", TRUE_SUM[2]]
)
def test_a_step_that_reads_otherwise_is_unreadable(content: str):
    check = checked(SUM, [*TRUE_SUM[:3], content, *TRUE_SUM[4:]])[3]
    assert check == ("tens", False, "does not read as a step of kind tens", "unreadable")


def test_missing_and_extra_steps_are_wrong():
    assert [check.error for check in checked(SUM, TRUE_SUM[:4])] == [""] * 4 + ["missing"] * 2
    assert checked(SUM, [*TRUE_SUM, "x"])[6] == ("extra", False, "the game has no step after the last carry", "extra")


def test_generated_traces_are_verified_and_read_back():
    for index, trace in enumerate(generate(50, seed=7, created_at="2025-01-01T00:00:00Z")):
        assert verify(trace) == "" and parse_trace(to_json(trace)) == trace
        assert episode_of(trace.meta["state"]) == problem(7 + index)
        assert [trace.meta[key] for key in ("source", "game", "seed", "episode_index")] == ["builtin", NAME, 7, index]


def test_an_episode_depends_on_its_seed_alone():
    assert [trace.id for trace in generate(5, seed=1)] == [trace.id for trace in generate(5, seed=1)]
    assert [trace.prompt for trace in generate(4, seed=2)] == [trace.prompt for trace in generate(5, seed=1)][1:]


def test_the_categories_are_drawn_alike_and_their_numbers_have_their_digits():
    episodes = [problem(seed) for seed in range(5000)]
    drawn = Counter((episode.operator, len(str(episode.a))) for episode in episodes)
    assert drawn.keys() == set(CATEGORIES) and min(drawn.values()) > 0.9 * 5000 / len(CATEGORIES)
    assert all(len(str(e.a)) == len(str(e.b)) if e.operator == "+" else 2 <= e.b <= 9 for e in episodes)


def changed(trace: Trace, **changes) -> Trace:
    return msgspec.structs.replace(trace, **changes)


def test_what_the_engine_would_not_have_written_is_told():
    [trace] = generate(1, seed=3)
    meta = trace.meta
    for wrong, why in [
        (changed(trace, prompt=question(SUM)), "prompt: is not the question of meta.state"),
        (changed(trace, final_answer="1"), f"final_answer: expected {problem(3).result}"),
        (changed(trace, steps=trace.steps[1:]), "step 1 (first): does not read as a step of kind first"),
        (changed(trace, steps=trace.steps[:-1]), f"step {len(trace.steps)} (last_carry): the step is missing"),
        (
            changed(trace, meta=meta | {"state": state_of(SUM)}),
            "meta.state: seed 3 + episode 0 gives another one",
        ),
        (changed(trace, meta=meta | {"state": {}}), "meta.state: expected numbers of up to four digits"),
    ]:
        assert verify(wrong).startswith(why)


@pytest.mark.parametrize(
    "state",
    [
        {}, None, 5, "347+85", {"a": "1", "b": "2"}, {"a": "1", "operator": "-", "b": "2"},
        {"a": "1", "operator": "*", "b": "12"}, {"a": "01", "operator": "+", "b": "2"},
        {"a": "12345", "operator": "+", "b": "2"}, {"a": "1 + 1", "operator": "+", "b": "2"},
        {"a": "٣", "operator": "+", "b": "2"}, {"a": 1, "operator": "+", "b": 2},
        {"a": ["1"], "operator": "+", "b": "2"}, {"a": "1", "operator": "-", "b": "2", "c": "3"},
    ],
)  # fmt: skip
def test_a_state_that_is_none_of_this_task_is_refused(state: object):
    with pytest.raises(ValueError, match="expected numbers of up to four digits"):
        episode_of(state)
    assert verify(make_trace("x", [("digits", "y")], "z", {"game": NAME, "state": state})).startswith("meta.state: ")
    assert canonical(state) is state


def test_what_stands_beside_a_problem_makes_no_other_question_but_no_state_either():
    noted = state_of(SUM) | {"late": "x"}
    assert canonical(noted) == canonical(state_of(SUM))
    with pytest.raises(ValueError, match="expected numbers of up to four digits"):
        episode_of(noted)
    assert verify(make_trace("x", [("digits", "y")], "z", {"game": NAME, "state": noted})).startswith("meta.state: ")


def test_a_plus_b_asks_the_same_as_b_plus_a():
    assert TASKS[NAME] is arithmetic
    twin = state_of(Problem(85, "+", 347))
    assert group_keys("x", NAME, state_of(SUM)) & group_keys("y", NAME, twin) == {"arithmetic: a=347 b=85 operator=+"}
    for other in (Problem(347, "+", 86), Problem(347, "*", 8)):
        assert not group_keys("x", NAME, state_of(SUM)) & group_keys("y", NAME, state_of(other))
