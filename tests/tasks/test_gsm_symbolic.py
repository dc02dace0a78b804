"""The worked answers of gsm_symbolic: which equations are read out of a step, and which of them are true."""

import random
import re

import pytest

from lib.tasks.gsm_symbolic import check, check_steps, equations, steps, why_not

# What stands in the worked answers of reasoning-gym 0.1.25, and the equations in it.
WRITTEN = {
    "First find how long it takes: 900 onion / 12 onion/minute = 75 minutes": ["900 / 12 = 75"],
    "so that's 0.8*100 = 80 students": ["0.8*100 = 80"],
    "they collected 20 + 50 signatures = 70 signatures.": ["20 + 50 = 70"],
    "to collect 125 - 70 signatures. 125 - 70 = 55 signatures": ["125 - 70 = 55"],
    "There are 25 girls x 4 boys/girl = 100 boys in the park.": ["25 * 4 = 100"],
    "she used 49/75*150 = 98": ["49/75*150 = 98"],
    "David has $20 - $12 = $8 remaining.": ["$20 - $12 = $8"],
    "The fee is $350,000 x 6/100 = $21,000.": ["$350,000 * 6/100 = $21,000"],
    "So 192.0 feet / 2.0 feet per plant = 96 plants total": ["192.0 / 2.0 = 96"],
    "189 total students - 39 bake - 25 basketball - 50 play video games = 75": ["189 - 39 - 25 - 50 = 75"],
    "131 spools / 524 spools * 100% = 25%": ["131 / 524 * 100% = 25%"],
    "40 yards * (3 feet / 1 yards) = 120 feet.": ["40 * (3 / 1 ) = 120"],
    "The room's perimeter is 2(122+120) = 484": ["2 * (122+120) = 484"],
    "each serving has 16 grams/4 = 4 grams": ["16 /4 = 4"],
    "Bought 49 fewer, so 100 - 49 = 51 grape": ["100 - 49 = 51"],
    "He has 2 times as many, so 60 × 2 = 120": ["60 * 2 = 120"],
    "He can harvest 12 ÷ 6 = 2 times per year": ["12 / 6 = 2"],
    "a rate of 13 miles per 65 minutes, or 13/65 = 1/5 miles per minute.": ["13/65 = 1/5"],
    "3 + 4 = 7 and 7 + 1 = 8 is one less than 9 = 3 * 3": ["3 + 4 = 7", "7 + 1 = 8", "9 = 3 * 3"],
    "He multiplies (12 + 8)(3 + 1) = 80 and (2)  (4) = 8": ["(12 + 8) * (3 + 1) = 80", "(2) * (4) = 8"],
    "(he counts 3 + 4 = 7)": ["3 + 4 = 7"],
    "that is 5 + 3 = 8 (left), and 2 * 2 = 4 (that is all)": ["5 + 3 = 8", "2 * 2 = 4"],
    "5 + 3 = 8 - so eight": ["5 + 3 = 8"],
    "5 + 3 = 8 of the 10, and 2 / 8 = 1/4 of them": ["5 + 3 = 8", "2 / 8 = 1/4"],
    r"so that is 2 \times 3 + 4 = 10 and 6 \div 2 = 3": ["2 * 3 + 4 = 10", "6 / 2 = 3"],
    r"so 2 · 3 + 4 = 10, 2⋅3 + 4 = 10 and 2 \cdot 3 + 4 = 10": ["2 * 3 + 4 = 10"] * 3,
    "he has 10 – 3 + 2 = 9, or 10 pens – 3 pens + 2 = 9": ["10 - 3 + 2 = 9"] * 2,
    "in total – 5 + 3 = 8": ["5 + 3 = 8"],
    "which is (10 / 40) * 100 = 25%": ["(10 / 40) * 100 = 25"],
    "eggs, which is 24/12 = 2 dozen eggs": ["24/12 = 2"],
    "First 5 + 3 = 8\n- 8 / 2 = 4\n* so 4 * 2 = 8": ["5 + 3 = 8", "4 * 2 = 8"],
    "half of it is right, so that is 50 questions * 0.5 = 25 points": ["50 * 0.5 = 25"],
    "she has 1/4 of the essay which is 248 pages x 1/4 = 62 pages": ["248 * 1/4 = 62"],
    # with a variable, without an operation, or not whole
    "She has 74 + 46 + 32 + T = 152 + T = 195 toys": [],
    "we get 2x=116, leaving x=58": [],
    "Thus, T = 195 - 152": [],
    "Thomas = 258 points": [],
    "John receives 21=21 emails": [],
    "it is half * 198 wasps = 99 ladybugs": [],
    "Charlotte finds 5 eggs.": [],
}


@pytest.mark.parametrize("step", WRITTEN)
def test_the_equations_of_a_step_are_read_without_their_units(step: str):
    assert [str(equation) for equation in equations(step)] == WRITTEN[step]


@pytest.mark.parametrize("step", [step for step, found in WRITTEN.items() if found])
def test_what_holds_is_true_and_any_other_result_false(step: str):
    assert check(step).correct
    draw, result = random.Random(step), re.search(r"= *[$]?(\d)", step)
    for digit in draw.sample([digit for digit in "123456789" if digit != result[1]], 4):
        mutant = check(step[: result.start(1)] + digit + step[result.end(1) :])
        assert not mutant.correct and mutant.error == "false" and "the left side is" in mutant.reason


@pytest.mark.parametrize(
    "step, reason",
    [
        ("She needs 90 / 24 = 3 baking sheets", "90 / 24 = 3: the left side is 15/4"),
        ("they cost €30 / 2 = $15.", "€30 / 2 = $15: mixes $ and €"),
        ("it takes her 14÷2/5=35 minutes", "14/2/5 = 35: the left side is 7/5"),
        ("it is 3 / 0 = 4", "3 / 0 = 4: divides by zero"),
        ("that is 10 / 3 = 3.34", "10 / 3 = 3.34: the left side is 10/3"),
        ("that is 1 / 3 = 34%", "1 / 3 = 34%: the left side is 1/3"),
        ("that is 10 / 40 * 100 = 24%", "10 / 40 * 100 = 24: the left side is 25"),
        ("that is 10 / 40 = 0.25%", "10 / 40 = 0.25%: the left side is 1/4"),
        ("that is 2 + 2 * 3 = 12", "2 + 2 * 3 = 12: the left side is 8"),
        ("first 1 + 1 = 2, then 2 + 2 = 5", "2 + 2 = 5: the left side is 4"),
    ],
)
def test_a_false_equation_is_named_with_what_it_comes_to(step: str, reason: str):
    assert check(step).reason == reason


@pytest.mark.parametrize("step", ["10 / 3 = 3.33", "2 / 3 = 0.7", "1 / 3 = 33.3%", "5 - 7 + 4 = 2", "8 / 4 / 2 = 1"])
def test_a_result_may_be_rounded_to_the_decimals_that_it_has(step: str):
    assert check(step).correct


@pytest.mark.parametrize(
    "right",
    ["7.5hours", "7.5kg", "7,500g", "7g", "7%x", "7 %", "7 1/2", "7.5 * 2x", "7 - T", "7 * price", "7 / x", "7 (T + 1)",
     "7 (3)", "7^2", "7 ** 2", "7.5.1", "7,50", "50% of 20", "1/5 of 50", "3/20 of the other $50", "7:30", "7 squared",
     "7 thousand", "7 percent", "7 plus 2", "7 times 3"],
)  # fmt: skip
def test_no_part_of_a_right_side_is_taken_for_all_of_it(right: str):
    assert equations(f"That is 3 + 4 = {right}") == []


@pytest.mark.parametrize(
    "left",
    ["2^3 + 1", "2 ** 3 + 1", "√16 + 2", "20% of 50 + 5", "20% of the other 50 + 5", "25% of those 40 + 2",
     "1/4 of his 40 + 2", "half of 8 + 5", "3/4 of 8 + 5", "1 1/2 + 1/2", "2 (3 + 1)", "20% (3 + 1)", "(2 + 1)3 + 1",
     "2 times 3 + 4", "10 minus 3 + 2", "12 plus 4 * 2", "30 divided by 2 + 1", "twice 4 + 1", "Twice 4 + 1",
     "8:00 + 2 hours", "8:30 + 2", "$10 + tax of $10 * 0.1", "Alice 5 + Bob 3 * 2", "2 dozen + 3", "2 dozen eggs + 3",
     "2 dozen – 3", "3 * 2 million", "3 squared + 1", "10 percent * 50", "20 percent of 50 + 5"],
)  # fmt: skip
def test_no_part_of_a_left_side_is_taken_for_all_of_it(left: str):
    assert equations(f"That is {left} = 7") == []


def test_a_right_side_may_begin_with_a_minus():
    for written in ("5 - 8 = -3", "5 - 8 = −3 degrees", "$5 - $8 = -$3", "7 - 5 = -2 + 4"):
        assert check(written).correct
    assert check("2 + 2 = 4, so 5 - 8 = -4 left").reason == "5 - 8 = -4: the left side is -3"
    assert equations("He has 4 = -4") == []  # a sign is no operation


def test_only_a_result_is_rounded():
    assert check("10 / 2.5 = 4.0").correct and check("3 - 5.26 = -2.3").correct
    for rounded in ("4.04 = 10 / 2.5", "33 / 8 = 100 / 24.2"):
        assert not check(rounded).correct


def test_a_step_without_an_equation_is_neither_true_nor_false():
    assert check("Let T be the number of balls.") is None


def test_a_completion_is_checked_where_it_holds_an_equation():
    found = check_steps(["Let T be the number of balls.", "That is 5 + 3 = 8.", "So 8 * 2 = 17."])
    assert [check.correct for check in found] == [None, True, False] and found[2].reason.startswith("8 * 2 = 17")
    assert check_steps(["Eight of them.", "Two are red."]) == check_steps([]) == []


def test_steps_are_lines_without_numbers_and_bullets_each_with_its_heading():
    worked = (
        "Let's solve this step by step:\n\n1. Initial amounts:\n   • James has 60 plums\n   • So 60 × 2 = 120 pears\n\n"
        "2. At the store:\n   - Bought 100 plums\n\nTherefore, 220.\n#### 220"
    )
    assert steps(worked) == [
        "Initial amounts: James has 60 plums",
        "So 60 × 2 = 120 pears",
        "At the store: Bought 100 plums",
        "Therefore, 220.",
    ]


@pytest.mark.parametrize(
    "worked, answer, reason",
    [
        ("He has 5 + 3 = 8 pens.\n#### 8", "8", ""),
        ("He has 5 + 3 = 8.0 pens.\n#### 8.0", "8", ""),
        ("That is 1 / 4 = 25%\n#### 25", "25", ""),
        ("He has 5 + 3 = 9 pens.\n#### 9", "9", "a false equation"),
        ("He has 5 + 3 = 8 pens.\n#### 9", "9", "an answer that no equation gives"),
        ("He has 5 + 3 = 8 pens.\n#### 8", "9", "another answer at the end"),
        ("He has 5 + 3 = 8 pens.", "8", "another answer at the end"),
        ("We get 2x=16, so x=8\n#### 8", "8", "an answer that no equation gives"),
    ],
)
def test_a_worked_answer_makes_a_trace_only_where_all_of_it_holds(worked: str, answer: str, reason: str):
    assert why_not(worked, answer) == reason
