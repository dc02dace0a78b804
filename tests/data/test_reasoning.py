"""Where reasoning ends and an answer begins: each rule on a text that can be read, and what is refused."""

import pytest

from lib.data.reasoning import split_completion, split_steps
from lib.data.renderer import render_response


@pytest.mark.parametrize(
    "text, steps, answer",
    [
        ("48/2 = <<48/2=24>>24 clips\n\n 48+24 = 72 \n#### 72\n", ["48/2 = 24 clips", "48+24 = 72"], "72"),
        ("a\n#### 1,000 km", ["a"], "1,000 km"),
        ("a\nb\nAnswer: 4", ["a", "b"], "4"),
        ("a\n**Final answer:** 4", ["a"], "4"),
        ("a\n**Answer: 4**", ["a"], "4"),
        ("5 + 6 = 11. The answer is 11.", ["5 + 6 = 11."], "11"),
        ("x = 3.5\nThus, the final answer is: 3.5.", ["x = 3.5"], "3.5"),
        ("a = 3, so the answer is **3**.", ["a = 3,"], "3"),
        (r"a" "\n" r"The answer is $\boxed{\frac{1}{2}}$.", ["a"], r"\frac{1}{2}"),
        (r"a" "\n" r"Hence $x = \boxed{\{2\}}$.", ["a", r"Hence $x = \boxed{\{2\}}$."], r"\{2\}"),
        (r"a" "\n" r"$\boxed{2}$", ["a"], "2"),
        ("<think>\nhm\n\nso 42\n</think>\n\n42", ["hm", "so 42"], "42"),
        ("<think>hm</think>\nIt is even.\nAnswer: 42", ["hm", "It is even."], "42"),
        ("1. a\n2. b\nAnswer: 4", ["a", "b"], "4"),
        ("Step 1: a\nStep 2: b\n#### 4", ["a", "b"], "4"),
        ("1. a\n3. b\n#### 4", ["1. a", "3. b"], "4"),
        ("costs < 3 << 4\n#### 4", ["costs < 3 << 4"], "4"),
    ],
)
def test_each_rule_finds_the_answer_and_keeps_every_other_line(text: str, steps: list[str], answer: str):
    assert split_completion(text) == (steps, answer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "It is 4.",
        "The answer is 4. Hope this helps!",
        "Answer:\n4",
        "#### 4\nas shown",
        "a\n####",
        r"\boxed{4",
        "<think>a</think>\nb\nc",
        "<think>a</think>",
        "<think>a\n42",
    ],
)
def test_a_text_without_an_answer_by_the_rules_is_refused(text: str):
    with pytest.raises(ValueError, match="the answer on the last line, as `#### 72`"):
        split_completion(text)


@pytest.mark.parametrize("text", ["#### 4", "Answer: 4", "The answer is 4.", r"$\boxed{4}$", "<<2+2=4>>\n#### 4"])
def test_an_answer_without_reasoning_is_refused(text: str):
    with pytest.raises(ValueError, match="at least one line of reasoning"):
        split_completion(text)


def test_our_own_rendering_comes_back_whole_whatever_its_steps_hold():
    steps, answer = ["a\n#### 3", "The answer is 4.\n"], "5\nor 6"
    assert split_completion(render_response(steps, answer)) == (steps, answer)


def test_what_stands_before_the_numbered_steps_is_a_step_and_not_lost():
    assert split_completion("Let me see.\n1. a\nAnswer: 4").steps == ["Let me see.", "1. a"]


def test_a_column_of_steps_is_split_into_its_lines():
    assert split_steps(" 1) a\n\n2) b ") == ["a", "b"]
