"""Traces that say nearly the same in nearly the same words.

    found = NearDuplicates(0.8)
    found.seen(trace), found.seen(trace), found.seen(other)      # False, True, False

Two traces are near duplicates where the sets of their runs of three words (of question, steps and answer) overlap by
the threshold or more (Jaccard). Candidates are found by MinHash with locality-sensitive hashing (Broder 1997; Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, chapter 3): 128 hashes in bands so wide that a pair at the threshold
shares one with a probability of more than 99.9 %. Each candidate's overlap is then counted exactly, so nothing is left
out that is not a near duplicate.
"""

import re
from zlib import crc32

import numpy as np

from lib.trace import Trace

WORDS = 3
HASHES = 128
_SOURCE = np.random.default_rng(0)
_FACTORS, _OFFSETS = (_SOURCE.integers(0, 1 << 64, HASHES, dtype=np.uint64) for _ in range(2))


class NearDuplicates:
    """Remembers of each trace it has seen, but for the near duplicates, the hashes of its runs."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.rows = _rows(threshold)
        self._kept: list[np.ndarray] = []
        self._bands: dict[bytes, list[int]] = {}

    def seen(self, trace: Trace) -> bool:
        """Whether a near duplicate of it was seen before; if not, it is remembered."""
        runs = runs_of(trace)
        bands = self._bands_of(runs)
        candidates = {number for band in bands for number in self._bands.get(band, ())}
        if any(jaccard(runs, self._kept[number]) >= self.threshold for number in candidates):
            return True
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._kept))
        self._kept.append(runs)
        return False

    def _bands_of(self, runs: np.ndarray) -> list[bytes]:
        hashes = runs.astype(np.uint64)[:, None] * (_FACTORS | np.uint64(1)) + _OFFSETS  # modulo 2^64
        smallest = hashes.min(axis=0)
        return [
            bytes([start]) + smallest[start : start + self.rows].tobytes()
            for start in range(0, HASHES - self.rows + 1, self.rows)
        ]


def runs_of(trace: Trace) -> np.ndarray:
    """uint32[runs], sorted: a hash of each run of three words, or of all words where they are fewer."""
    texts = [trace.prompt, *(step.content for step in trace.steps), trace.final_answer]
    words = re.findall(r"\w+|[^\w\s]", " \n ".join(texts).casefold())
    width = min(WORDS, len(words))
    runs = {crc32(" ".join(words[start : start + width]).encode()) for start in range(len(words) - width + 1)}
    return np.array(sorted(runs), np.uint32)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Shared of all that are in either; both sorted and without repeats."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _rows(threshold: float) -> int:
    """The widest band in which a pair at the threshold is still found: 1 - (1 - t^r)^(128 / r) > 0.999."""
    return max(r for r in (1, 2, 4, 8, 16) if r == 1 or (1 - threshold**r) ** (HASHES // r) < 0.001)
