"""Every generator of reasoning-gym put to the proof: which make eval items, and which verifiers can be believed.

    python benchmarks/reasoning_gym.py [--count 20] [--seed 42] [GENERATOR…]

Needs reasoning-gym (requirements-reasoning-gym.txt), here or in the interpreter of RETRACE_REASONING_GYM_PYTHON. Of
each generator `count` entries are drawn, with its default options, and a line is printed:

    sound    that make an eval item: the generator's own answer is found by our extractor and accepted by its verifier,
             and a wrong one is not; the others by reason
    again    of these, made again by another process, in reverse: the same question and the same answer

After them, the worked answers of gsm_symbolic: how many hold, and what its templates have wrong.
"""

import argparse
import time
from collections import Counter
from typing import NamedTuple

from lib.errors import RequestError
from lib.evaluation.reasoning_gym_items import not_again, sound_items
from lib.tasks import gsm_symbolic, reasoning_gym


class Row(NamedTuple):
    """What the survey found of one generator; `refused` where it draws nothing at all."""

    generator: str
    drawn: int
    sound: int
    again: int
    left_out: Counter[str]
    refused: str
    seconds: float

    @property
    def usable(self) -> bool:
        """At least half are sound: what `eval make` asks for."""
        return self.sound * 2 >= self.drawn > 0


class Worked(NamedTuple):
    """Worked answers of gsm_symbolic: how many hold, and why the others do not, by template; and their steps."""

    count: int
    left_out: dict[str, Counter[str]]
    steps: Counter[str]


class Survey(NamedTuple):
    rows: list[Row]
    worked: Worked


def main(generators: list[str], count: int, seed: int, worked: int) -> Survey:
    known = reasoning_gym.generators()
    print(f"reasoning-gym {reasoning_gym.VERSION}: {len(known)} generators, seed {seed}")
    print(f"{'generator':<26} {'drawn':>6} {'sound':>6} {'again':>6} {'seconds':>8}")
    rows = []
    for name in generators or known:
        rows.append(row := survey(name, count, seed))
        reasons = "; ".join(f"{number} left out: {reason}" for reason, number in row.left_out.items())
        print(f"{name:<26} {row.drawn:>6} {row.sound:>6} {row.again:>6} {row.seconds:>8.1f}  "
              f"{row.refused or reasons}", flush=True)  # fmt: skip
    whole, usable = sum(row.drawn == row.sound > 0 for row in rows), sum(row.usable for row in rows)
    print(f"{whole} generators sound throughout, {usable - whole} more usable, {len(rows) - usable} refused; "
          f"{sum(row.drawn for row in rows)} drawn, {sum(row.sound for row in rows)} sound, "
          f"{sum(row.again for row in rows)} the same again")  # fmt: skip
    tell_worked(found := survey_worked(worked, seed))
    return Survey(rows, found)


def survey(generator: str, count: int, seed: int) -> Row:
    start = time.perf_counter()
    states = [reasoning_gym.state_of(generator, {}, seed, count, index) for index in range(count)]
    try:
        made = sound_items(states, count)
    except RequestError as error:
        return Row(generator, 0, 0, 0, Counter(), str(error), time.perf_counter() - start)
    again = len(made.items) - len(not_again(made.items))
    return Row(generator, made.draws, len(made.items), again, made.left_out, "", time.perf_counter() - start)


def survey_worked(count: int, seed: int) -> Worked:
    left_out: dict[str, Counter[str]] = {}
    steps: Counter[str] = Counter()
    for index in range(count):
        drawn = reasoning_gym.draw(reasoning_gym.state_of(gsm_symbolic.NAME, {}, seed, count, index))
        for check in map(gsm_symbolic.check, gsm_symbolic.steps(drawn.worked)):
            steps["without an equation" if check is None else "true" if check.correct else "false"] += 1
        reason = gsm_symbolic.why_not(drawn.worked, drawn.answer)
        left_out.setdefault(drawn.template, Counter())[reason] += 1
    return Worked(count, left_out, steps)


def tell_worked(found: Worked) -> None:
    total = sum(found.left_out.values(), Counter())
    print(f"gsm_symbolic: {found.count} worked answers of {len(found.left_out)} templates, {total['']} hold; steps: "
          + ", ".join(f"{count} {kind}" for kind, count in sorted(found.steps.items())))  # fmt: skip
    for reason in sorted(total.keys() - {""}):
        templates = [f"{name} ({counts[reason]} of {counts.total()})" for name, counts in
                     sorted(found.left_out.items(), key=lambda pair: int(pair[0])) if counts[reason]]  # fmt: skip
        print(f"  {total[reason]} with {reason}: templates {', '.join(templates)}")


if __name__ == "__main__":
    words = argparse.ArgumentParser()
    words.add_argument("generators", nargs="*", metavar="GENERATOR")
    words.add_argument("--count", type=int, default=20)
    words.add_argument("--seed", type=int, default=42)
    words.add_argument("--worked", type=int, default=5000, help="worked answers of gsm_symbolic to check")
    given = words.parse_args()
    main(given.generators, given.count, given.seed, given.worked)
