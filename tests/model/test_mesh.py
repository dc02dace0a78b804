"""Where each weight lies on a mesh, and which meshes are refused; what they compute is in test_processes.py."""

from dataclasses import replace

import jax
import pytest
from jax.sharding import AbstractMesh

from lib.config import LoraConfig, ParallelismConfig, TrainingConfig
from lib.errors import RequestError
from lib.model.gemma import PRESETS, GemmaConfig
from lib.model.mesh import AXES, by_rows, make_mesh, mesh_of, placed, row_devices, shardings, spread
from lib.model.weights import Model, abstract, with_lora
from lib.training.optimizer import make_optimizer


def specs(tree: dict, data: int = 1, fsdp: int = 1, tensor: int = 1) -> dict[str, tuple]:
    """`{"attention.query": ("tensor", None, "fsdp"), …}` of a tree on a mesh of so many devices."""
    found = jax.tree_util.tree_leaves_with_path(shardings(tree, AbstractMesh((data, fsdp, tensor), AXES)))
    return {
        ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)): tuple(place.spec)
        for path, place in found
    }


def weights(config: GemmaConfig) -> dict:
    return abstract(replace(config, num_layers=1))[1]


def test_heads_feed_forward_and_vocabulary_are_over_tensor_and_the_embedding_axis_over_fsdp():
    found = specs(weights(PRESETS["gemma2-2b"]), fsdp=2, tensor=4)
    assert found["embedding"] == ("tensor", "fsdp")
    assert found["layers.0.attention.query"] == found["layers.0.attention.key"] == ("tensor", None, "fsdp")
    assert found["layers.0.attention.output"] == ("fsdp", "tensor", None)
    assert found["layers.0.feed_forward.gate"] == found["layers.0.feed_forward.up"] == ("tensor", "fsdp")
    assert found["layers.0.feed_forward.down"] == ("fsdp", "tensor")
    assert {spec for name, spec in found.items() if name.endswith("scale")} == {()}


def test_a_key_value_head_for_all_queries_is_on_every_device():
    found = specs(weights(PRESETS["gemma3-1b"]), tensor=4)
    assert found["layers.0.attention.key"] == found["layers.0.attention.value"] == (None, None, "fsdp")
    assert found["layers.0.attention.query"] == ("tensor", None, "fsdp")


def test_a_vocabulary_that_cannot_be_split_is_split_along_its_numbers():
    odd = replace(PRESETS["tiny"], vocab_size=511)
    assert specs(weights(odd), fsdp=2, tensor=2)["embedding"] == (None, ("fsdp", "tensor"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_size_of_gemma_fits_on_four_by_four(name: str):
    found = specs(weights(PRESETS[name]), data=2, fsdp=4, tensor=4)
    assert all(any(spec) for path, spec in found.items() if not path.endswith("scale"))


def test_the_optimizer_lies_where_its_weights_do(small_model: Model):
    for name, split in [("adamw", 2), ("adafactor", 1)]:
        optimizer, _ = make_optimizer(TrainingConfig(optimizer=name))
        state = jax.eval_shape(optimizer.init, small_model.params)
        places = jax.tree_util.tree_leaves_with_path(shardings(state, AbstractMesh((1, 2, 2), AXES)))
        gates = [tuple(place.spec) for path, place in places if "['gate']" in jax.tree_util.keystr(path)]
        assert gates.count(("tensor", "fsdp")) == split


def test_an_adapter_lies_beside_its_projection(small_model: Model):
    adapted = with_lora(small_model, LoraConfig(rank=2, projections=["query", "output", "down"]), seed=0)
    found = specs(adapted.params, fsdp=2, tensor=2)
    attention, feed_forward = "layers.0.attention.adapters", "layers.0.feed_forward.adapters"
    assert found[f"{attention}.query.a"] == (None, "fsdp") and found[f"{attention}.query.b"] == ("tensor", None, None)
    assert found[f"{attention}.output.a"] == (None, "tensor", None)
    assert found[f"{attention}.output.b"] == ("fsdp", None)
    assert found[f"{feed_forward}.down.a"] == (None, "tensor")


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"tensor": 8}, "parallelism.tensor 8: does not divide the model's num_heads 4; take a divisor of it"),
        ({"fsdp": 3}, "parallelism.fsdp 3: does not divide the model's embed_dim 128"),
    ],
)
def test_what_the_model_cannot_be_split_into_is_refused(sizes: dict[str, int], said: str):
    with pytest.raises(RequestError, match=said):
        specs(weights(PRESETS["tiny"]), **sizes)


def test_a_mesh_of_other_devices_than_there_are_is_refused_and_one_everywhere_is_none():
    assert make_mesh(ParallelismConfig()) is None
    with pytest.raises(
        RequestError, match=r"data 2 × fsdp 1 × tensor 4 is 8 devices, and jax sees 1; make the product"
    ):
        make_mesh(ParallelismConfig(data=2, tensor=4))


def test_without_a_mesh_nothing_is_touched(small_model: Model):
    assert (
        spread(small_model.params, None) is small_model.params
        and placed(small_model.params, None) is small_model.params
    )
    assert mesh_of(small_model.params) is None and row_devices(None) == 1
    x = jax.numpy.ones((2, 3))
    assert by_rows(x) is x and "sharding" not in str(jax.make_jaxpr(by_rows)(x))
