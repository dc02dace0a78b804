"""Leak audit: which questions of an eval set the training data asks too, and which trace asks each.

    audit(traces, eval_set.items)
    # [Leak(item="duel-0007", kind="same state", trace="7c2f…", similarity=1.0), …]

Kinds, each item and trace told once, by the first that holds:

exact            the same characters
same words       the same but for case and blanks
same state       the same deal or problem of a known game, whatever the words
near duplicate   shared runs of three words, where the state is not known: at least six tenths of all that the two have
                 (Jaccard), or nine tenths of the item's own, and the same numbers in both

An eval set is small, so the runs of three words of its items are an index, and every trace is looked up in it:
exact counts, and no sketch such as MinHash to estimate them. A question asked in other words altogether is not found.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from lib.evaluation.evalsets import EvalItem
from lib.tasks import TASKS, group_keys
from lib.trace import Trace

WORDS = 3  # in a run
FEWEST = 3  # runs that an item must have to be compared by them
JACCARD, CONTAINED = 0.6, 0.9


class Leak(NamedTuple):
    """One item of an eval set, one trace that asks the same, and how alike they are (1.0: the same)."""

    item: str
    kind: str
    trace: str
    similarity: float


class Near(NamedTuple):
    """A training trace, and how alike its question is (1.0: the same)."""

    trace: str
    prompt: str
    similarity: float


def audit(traces: Iterable[Trace], items: Sequence[EvalItem]) -> list[Leak]:
    """Every pair of an item and a trace that ask the same, in the order of the items."""
    exact, keyed, runs = defaultdict(list), defaultdict(list), defaultdict(list)
    for number, item in enumerate(items):
        exact[item.prompt].append(number)
        for key in group_keys(item.prompt, item.task, item.state):
            keyed[key].append(number)
        if item.task not in TASKS:
            for run in _runs(item.prompt):
                runs[run].append(number)
    items_runs = {number: _runs(items[number].prompt) for numbers in runs.values() for number in numbers}

    @lru_cache(maxsize=100_000)  # generated traces ask the same questions again and again
    def near(prompt: str) -> list[tuple[int, float]]:
        return list(_near(prompt, items, runs, items_runs)) if runs else []

    found: dict[tuple[int, str], Leak] = {}
    for trace in traces:
        for number, kind, similarity in _asked(trace, exact, keyed, near):
            found.setdefault((number, trace.id), Leak(items[number].id, kind, trace.id, similarity))
    return [found[key] for key in sorted(found)]


def nearest(traces: Iterable[Trace], prompts: Iterable[str], count: int = 3) -> dict[str, list[Near]]:
    """For each prompt the traces whose questions share the most runs of three words with it (Jaccard), best first."""
    best: dict[str, list[tuple[float, str, str]]] = {prompt: [] for prompt in prompts}
    wanted = {prompt: _runs(prompt) for prompt in best}
    for trace in traces:
        runs = _runs(trace.prompt)
        for prompt, own in wanted.items():
            if shared := len(own & runs):
                alike = (-shared / (len(own) + len(runs) - shared), trace.id, trace.prompt)
                if len(best[prompt]) < count or alike < best[prompt][-1]:
                    best[prompt] = sorted([*best[prompt], alike])[:count]
    return {
        prompt: [Near(trace, asked, round(-similarity, 3)) for similarity, trace, asked in found]
        for prompt, found in best.items()
    }


def _asked(
    trace: Trace, exact: dict, keyed: dict, near: Callable[[str], list[tuple[int, float]]]
) -> Iterator[tuple[int, str, float]]:
    """(number of the item, kind, similarity) of every item that the trace asks, the strictest kind first."""
    for number in exact.get(trace.prompt, ()):
        yield number, "exact", 1.0
    for key in sorted(group_keys(trace.prompt, str(trace.meta.get("game", "")), trace.meta.get("state"))):
        for number in keyed.get(key, ()):
            yield number, "same words" if key.startswith("prompt: ") else "same state", 1.0
    for number, similarity in near(trace.prompt):
        yield number, "near duplicate", similarity


def _near(prompt: str, items: Sequence[EvalItem], runs: dict, items_runs: dict) -> Iterator[tuple[int, float]]:
    """(number of the item, similarity) of every item that is asked in nearly these words."""
    own = _runs(prompt)
    for number, shared in Counter(number for run in own for number in runs.get(run, ())).items():
        theirs = items_runs[number]
        jaccard, contained = shared / (len(own) + len(theirs) - shared), shared / len(theirs)
        if len(theirs) >= FEWEST and (jaccard >= JACCARD or contained >= CONTAINED):
            if _numbers(prompt) == _numbers(items[number].prompt):
                yield number, round(max(jaccard, contained), 3)


def _runs(text: str) -> set[tuple[str, ...]]:
    """`the capital of France` → {(the, capital, of), (capital, of, france)}; signs are words, too."""
    words = re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).casefold())
    return {tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


def _numbers(text: str) -> Counter:
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))
