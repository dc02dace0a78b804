"""The data of docs/tutorial.md: which weekday is so many days after another, and how that is worked out.

    python docs/weekdays.py        # writes weekdays.jsonl and evalsets/weekdays_v1.jsonl

There are 700 such questions, 1 to 100 days after each of seven weekdays. Drawn at random, 500 become traces to train
on, and the other 200 the eval set, so that no question is in both.
"""

import json
import random
from pathlib import Path

from lib.evaluation.evalsets import EvalItem, write_eval_set
from lib.trace import utc_now

WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def question(start: int, days: int) -> str:
    return f"Which weekday is {days} days after {WEEKDAYS[start]}?"


def record(start: int, days: int) -> dict[str, str]:
    """A trace in columns of its own, as data is found; `weekdays_mapping.yaml` of the tutorial says what they are."""
    weeks, rest = divmod(days, 7)
    counted = ", ".join(f"{number} {WEEKDAYS[(start + number) % 7]}" for number in range(rest + 1))
    steps = f"{days} = {weeks} * 7 + {rest}.\nCount: {counted}."
    return {
        "Question": question(start, days),
        "Thought": steps,
        "Weekday": WEEKDAYS[(start + days) % 7],
        "Author": "weekdays.py",
    }


def item(number: int, start: int, days: int) -> EvalItem:
    """A question to evaluate by; accuracy is told of each category, too."""
    category = "within a week" if days < 7 else "whole weeks" if days % 7 == 0 else "weeks and days"
    difficulty = "easy" if days < 7 else "medium"
    answer = WEEKDAYS[(start + days) % 7]
    return EvalItem(f"weekdays-{number:03}", question(start, days), answer, category, difficulty)


if __name__ == "__main__":
    problems = [(start, days) for start in range(7) for days in range(1, 101)]
    random.Random(42).shuffle(problems)
    lines = [json.dumps(record(*problem)) + "\n" for problem in problems[:500]]
    Path("weekdays.jsonl").write_text("".join(lines))
    items = [item(number, *problem) for number, problem in enumerate(problems[500:], 1)]
    write_eval_set(Path("evalsets/weekdays_v1.jsonl"), items, "200 questions of docs/weekdays.py", utc_now())
    print(f"weekdays.jsonl: {len(lines)} traces; evalsets/weekdays_v1.jsonl: {len(items)} questions")
