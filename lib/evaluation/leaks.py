"""Leak audit: which questions of an eval set the training data asks too, and which trace asks each.

    audit(traces, eval_set.items)
    # [Leak(item="duel-0007", kind="same state", trace="7c2f…", similarity=1.0), …]

Kinds, each item and trace told once, by the first that holds:

exact            the same characters
same words       the same but for case and blanks, alone or after a blank line, as behind an instruction
same state       the same deal or problem of a known game, whatever the words
near duplicate   shared runs of three words, where the state is not known: at least six tenths of all that the two have
                 (Jaccard), or nine tenths of the item's own, and the same numbers in both; where it is known of the
                 item alone, all of the item's own, as another deal is asked in nearly the same words

An eval set is small, so the runs of three words of its items are an index, and every trace is looked up in it:
exact counts, and no sketch such as MinHash to estimate them. A question of fewer than five words has too few runs, and
is looked for in the same words alone; one asked in other words altogether is not found.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from lib.data.dataset import Traces
from lib.data.store import read_facts, remembering
from lib.evaluation.evalsets import EvalItem
from lib.tasks import PROMPT, TASKS, group_keys, keys_within
from lib.trace import Trace, facts_of

WORDS = 3  # in a run
FEWEST = 3  # runs that an item must have to be compared by them
HAN = r"\u3040-\u30ff\u3400-\u9fff"  # of Chinese and Japanese, which put no blanks between words: each sign is a word
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]")
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
    return audit_all(traces, {"": items})[""]


def audit_all(traces: Iterable[Trace], eval_sets: Mapping[str, Sequence[EvalItem]]) -> dict[str, list[Leak]]:
    """`audit` of several eval sets by their names; the traces are gone through once."""
    indexes = {name: _Index(items) for name, items in eval_sets.items()}
    found: dict[str, dict[tuple[int, str], Leak]] = {name: {} for name in eval_sets}
    if isinstance(traces, Traces):
        known, place = traces.facts(), str(traces.file)
    else:
        known, place = ((one.id, facts_of(one)) for one in traces), "trace"

    @remembering  # traces ask the same questions again and again
    def matched(prompt: str, keys: tuple[str, ...]) -> list[tuple[str, int, str, float]]:
        return [(name, *same) for name, index in indexes.items() for same in index.asked(prompt, keys)]

    @remembering  # and generated ones answer them in the same way
    def asked(facts: str) -> list[tuple[str, int, str, float]]:
        of = read_facts(facts, place)
        return matched(of.prompt, tuple(sorted(group_keys(of.prompt, of.game, of.state))))

    for trace, facts in known:
        for name, number, kind, similarity in asked(facts):
            leak = Leak(indexes[name].items[number].id, kind, trace, similarity)
            found[name].setdefault((number, trace), leak)
    return {name: [leaks[key] for key in sorted(leaks)] for name, leaks in found.items()}


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


class _Index:
    """The items of an eval set, found by their words, by what they ask, and by their runs of three words."""

    def __init__(self, items: Sequence[EvalItem]):
        self.items = items
        self._exact: dict[str, list[int]] = defaultdict(list)
        self._keyed: dict[str, list[int]] = defaultdict(list)
        self._holding: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._rarest: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._runs = {number: _runs(item.prompt) for number, item in enumerate(items)}
        for number, item in enumerate(items):
            self._exact[item.prompt].append(number)
            for key in group_keys(item.prompt, item.task, item.state):
                self._keyed[key].append(number)
            if item.task not in TASKS:
                for run in self._runs[number]:
                    self._holding[run].append(number)
        stated = {number: self._runs[number] for number, item in enumerate(items) if item.task in TASKS}
        times = Counter(run for runs in stated.values() for run in runs)
        for number, runs in stated.items():
            if len(runs) >= FEWEST:  # found by one of them alone, as most are in every question of the task
                self._rarest[min(runs, key=lambda run: (times[run], run))].append(number)

    def asked(self, prompt: str, keys: Iterable[str]) -> Iterator[tuple[int, str, float]]:
        """(number of the item, kind, similarity) of every item that asks this, the strictest kind first."""
        for number in self._exact.get(prompt, ()):
            yield number, "exact", 1.0
        for key in chain(keys, keys_within(prompt)):
            for number in self._keyed.get(key, ()):
                yield number, "same words" if key.startswith(PROMPT) else "same state", 1.0
        stated = any(not key.startswith(PROMPT) for key in keys)
        if self._holding or self._rarest and not stated:
            own = _runs(prompt)
            for number, similarity in [*self._look_for_near(prompt, own), *([] if stated else self._contained(own))]:
                yield number, "near duplicate", similarity

    def _contained(self, own: set[tuple[str, ...]]) -> list[tuple[int, float]]:
        """(number, 1.0) of every item of a known task that is asked in these words among others."""
        candidates = [number for run in own & self._rarest.keys() for number in self._rarest[run]]
        return [(number, 1.0) for number in candidates if self._runs[number] <= own]

    def _look_for_near(self, prompt: str, own: set[tuple[str, ...]]) -> list[tuple[int, float]]:
        """(number, similarity) of every other item that is asked in nearly these words."""
        found = []
        for number, shared in Counter(number for run in own for number in self._holding.get(run, ())).items():
            theirs = self._runs[number]
            jaccard, contained = shared / (len(own) + len(theirs) - shared), shared / len(theirs)
            if len(theirs) >= FEWEST and (jaccard >= JACCARD or contained >= CONTAINED):
                if _numbers(prompt) == _numbers(self.items[number].prompt):
                    found.append((number, round(max(jaccard, contained), 3)))
        return found


def _runs(text: str) -> set[tuple[str, ...]]:
    """`the capital of France` → {(the, capital, of), (capital, of, france)}; signs are words, too."""
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return {tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


def _numbers(text: str) -> Counter:
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))
