"""LoRA: adapters that begin as nothing, are told apart from the base, and can be added to it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lib.config import PROJECTIONS, LoraConfig
from lib.model.gemma import causal_mask, positions
from lib.model.lora import join, merged, split
from lib.model.weights import Model, with_lora

LORA = LoraConfig(rank=3, alpha=6.0, projections=list(PROJECTIONS))
TOKENS = jnp.array([[2, 9, 5, 7, 11, 3], [2, 4, 8, 0, 0, 0]])


def logits(model: Model) -> np.ndarray:
    module, valid = nnx.merge(model.graph, model.params), TOKENS > 0
    return np.asarray(module.logits(module(TOKENS, positions(valid), causal_mask(valid))[0]))


def leaves(tree: dict) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in found}


@pytest.fixture(scope="module")
def moved(two_layer_model: Model) -> Model:
    """Adapters as after some training: every number of them is drawn."""
    model, source = with_lora(two_layer_model, LORA, seed=7), np.random.default_rng(1)
    parts = split(model.params)
    adapters = jax.tree.map(lambda leaf: jnp.float32(source.normal(0, 0.3, leaf.shape)), parts.adapters)
    return model._replace(params=join(parts.base, adapters))


def test_fresh_adapters_change_no_bit(two_layer_model: Model):
    adapted = with_lora(two_layer_model, LORA, seed=7)
    assert np.array_equal(logits(adapted), logits(two_layer_model))


def test_adapters_stand_beside_the_named_projections_alone(two_layer_model: Model):
    lora = replace(LORA, projections=["value", "down"])
    found = leaves(split(with_lora(two_layer_model, lora, seed=7).params).adapters)
    assert {name: leaf.shape for name, leaf in found.items()} == {
        f"layers/{layer}/{path}": shape
        for layer in (0, 1)
        for path, shape in {
            "attention/adapters/value/a": (3, 16), "attention/adapters/value/b": (2, 8, 3),
            "feed_forward/adapters/down/a": (3, 24), "feed_forward/adapters/down/b": (16, 3),
        }.items()
    }  # fmt: skip


def test_the_same_seed_draws_the_same_adapters_and_another_draws_others(two_layer_model: Model):
    first, same, other = (with_lora(two_layer_model, LORA, seed) for seed in (1, 1, 2))
    assert first.weights_sha256 == same.weights_sha256 != other.weights_sha256


def test_a_tree_is_split_and_joined_without_a_loss(moved: Model, two_layer_model: Model):
    parts = split(moved.params)
    assert leaves(parts.base).keys() == leaves(two_layer_model.params).keys()
    assert leaves(join(*parts)).keys() == leaves(moved.params).keys() == {*leaves(parts.base), *leaves(parts.adapters)}
    assert split(two_layer_model.params).adapters == {}


def test_the_merged_weights_compute_what_the_adapted_model_does(moved: Model, two_layer_model: Model):
    plain = two_layer_model._replace(params=merged(moved.params, LORA))
    assert np.abs(logits(moved) - logits(two_layer_model)).max() > 0.1
    np.testing.assert_allclose(logits(plain), logits(moved), atol=2e-5)


def test_merging_leaves_the_adapted_model_and_the_dtype_of_the_base_as_they_were(moved: Model):
    before, (base, adapters) = moved.weights_sha256, split(moved.params)
    narrow = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), base)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(merged(join(narrow, adapters), LORA))} == {"bfloat16"}
    assert moved.weights_sha256 == before
