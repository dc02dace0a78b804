"""How gradients become updates: clipped by their global norm, then AdamW or Adafactor with decoupled weight decay.

optimizer, schedule = make_optimizer(config.training)
schedule(0)     # the learning rate of the first update
"""

import jax
import optax

from lib.config import TrainingConfig

ADAM_B2 = 0.99  # a memory of 100 steps: runs of some hundred steps never fill 0.999's


def make_optimizer(config: TrainingConfig) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW (arXiv 1711.05101), or Adafactor (arXiv 1804.04235), which keeps row and column means of the squares
    where AdamW keeps every mean and square; decay on matrices alone. And the learning rate: linear to its peak,
    cosine to zero. It means the same to both, as it is not multiplied by the size of the weights."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.num_steps,
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), _updates(config, schedule)), schedule


def _updates(config: TrainingConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    if config.optimizer == "adamw":
        return optax.adamw(schedule, b2=ADAM_B2, weight_decay=config.weight_decay, mask=_matrices)
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(schedule),
    )


def _matrices(params: dict) -> dict:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
