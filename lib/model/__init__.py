"""The model: architecture, weights in and out, decoding."""

import ctypes
import sys

# A training step frees some hundred megabytes that the next one needs again. glibc hands them back to the system, and
# to have each page anew costs a quarter of the step on a CPU. So it is told to keep them: no mapping of its own for a
# large piece, no trimming, and one heap for all threads, as the others' give back what is free. A few of the first
# steps still find a small piece in the way and take new memory (docs/troubleshooting.md). It counts only if told before
# jax computes anything, and changes no number.
if sys.platform == "linux" and hasattr(glibc := ctypes.CDLL(None), "mallopt"):
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    glibc.mallopt(M_ARENA_MAX, 1)
    glibc.mallopt(M_MMAP_MAX, 0)
    glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
