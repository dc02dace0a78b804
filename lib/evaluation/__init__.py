"""Eval sets, scoring and the statistics of a before/after comparison."""
