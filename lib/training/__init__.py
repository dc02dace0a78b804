"""Supervised fine-tuning: the step, the loop, the checkpoints."""
