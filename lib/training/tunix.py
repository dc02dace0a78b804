"""Google's Tunix as the trainer: our model, data, masks, loss and optimizer through its PeftTrainer.

    step = tunix_step(shapes, config)
    state, metrics = step(state, frozen, batch)      # as the step that step.py makes

Everything around the step is as it is with our own: batches, held-out loss, logs, checkpoints, resuming. The trainer
keeps model and optimizer, and is given one batch a call; micro-batches are summed inside the loss, so that
ragged ones weigh by their tokens, which Tunix's own accumulation would not do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lib.config import Config
from lib.data.batches import Batch
from lib.model.lora import join
from lib.training.optimizer import make_optimizer
from lib.training.plan import Shapes
from lib.training.step import Params, StepMetrics, TrainState, sum_loss
from lib.training.trainers import tunix_version


def tunix_step(shapes: Shapes, config: Config) -> Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]:
    """A function like the one of `make_train_step`; weights that are not trained are those of `shapes`."""
    tunix_version()
    trainer = _trainer(shapes, config)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        if int(state.step) != trainer.train_steps or trainer.train_steps == 0:
            _put(trainer, state)
        trainer.train([batch])
        loss, grad_norm = trainer.last
        return _take(trainer, state), StepMetrics(loss, grad_norm, jnp.sum(batch.loss_mask))

    return step


def _trainer(shapes: Shapes, config: Config) -> Any:
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    class Trainer(PeftTrainer):
        """Remembers the loss and the norm of the gradient, which the one it extends logs a step late."""

        last: tuple[jax.Array, jax.Array]

        def _buffer_metrics(self, buffer: Any, loss: jax.Array, step: int, additional_metrics: Any = None) -> Any:
            self.last = loss, additional_metrics["grad_norm"][0]
            return super()._buffer_metrics(buffer, loss, step, additional_metrics)

    optimizer, _ = make_optimizer(config.training)
    trainer = Trainer(_model(shapes), optimizer, TrainingConfig(eval_every_n_steps=config.training.eval_every))
    trainer.is_managed_externally = True  # each call goes on where the one before ended
    return trainer.with_loss_fn(_loss(config)).with_gen_model_input_fn(lambda batch: {"batch": batch})


def _model(shapes: Shapes) -> nnx.Module:
    """The model as a module; where it has adapters, Tunix sees that by their kind, and trains them alone."""
    return nnx.merge(shapes.graph, join(shapes.frozen, jax.tree.map(jnp.array, shapes.trained)))


def _loss(config: Config) -> Callable[[nnx.Module, Batch], jax.Array]:
    """(model, batch [A, B, T]) → mean loss in nats a trained token."""

    def loss(model: nnx.Module, batch: Batch) -> jax.Array:
        graph, state = nnx.split(model)
        params, total = nnx.to_pure_dict(state), sum_loss(graph, config.model.dtype, config.training.remat)

        @jax.checkpoint  # what a micro-batch leaves for the gradient is made again, or all would be there at once
        def add(sums: tuple, micro: Batch) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, sums, total(params, {}, micro)), None

        (nats, tokens), _ = jax.lax.scan(add, (jnp.float32(0), jnp.int32(0)), batch)
        return nats / tokens

    return loss


def _put(trainer: Any, state: TrainState) -> None:
    """Make model, optimizer and count of the trainer those of the state."""
    nnx.update(trainer.model, state.params)
    for variable, value in zip(_optimizer_variables(trainer), jax.tree.leaves(state.opt_state), strict=True):
        variable.set_value(value)
    trainer._train_steps = trainer._iter_steps = int(state.step)


def _take(trainer: Any, like: TrainState) -> TrainState:
    """The state as our checkpoints keep it; `like` gives the structure."""
    values = [variable.get_value() for variable in _optimizer_variables(trainer)]
    return TrainState(
        step=jnp.int32(trainer.train_steps),
        params=_trained(trainer),
        opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), values),
    )


def _trained(trainer: Any) -> Params:
    kind = nnx.LoRAParam if trainer.optimizer.wrt is nnx.LoRAParam else nnx.Param
    return nnx.to_pure_dict(nnx.state(trainer.model, kind))


def _optimizer_variables(trainer: Any) -> list[nnx.Variable]:
    """In the order in which Optax has the leaves of the same state over plain dicts."""
    return jax.tree.leaves(trainer.optimizer.opt_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
