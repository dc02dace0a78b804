"""Retrace: reasoning traces in, a fine-tuned model and an honest before/after report out."""

import os

# XLA divides CPU work by the number of cores it sees, and another division changes the last bits of a trained
# model. A fixed count makes the same bits on any number of cores; it counts only if set before jax is imported.
os.environ.setdefault("NPROC", "2")
