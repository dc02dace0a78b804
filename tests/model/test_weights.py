"""Weights in and out: what is loaded is what was saved, to the bit, or it is refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lib.config import Config, DatasetConfig, ModelConfig
from lib.data.dataset import Dataset
from lib.errors import RequestError, RetraceError
from lib.files import sealed, write_json
from lib.model import weights
from lib.model.gemma import GENERATIONS, PRESETS, Gemma
from lib.model.storage import DamagedError, restore_tree, save_tree, tree_digest
from lib.model.weights import Model, _fresh_weights, base_model, configured_base, load_model, read_about, save_model

# Orbax leaves a coroutine behind where a damaged file stops it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# ---- trees of arrays ----------------------------------------------------------------------------------------

TREE = {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "b": {"c": jnp.int32(7)}}


def test_the_digest_sees_every_path_type_shape_and_value():
    changed = [
        {"a": TREE["a"], "b": {"d": TREE["b"]["c"]}},
        {"a": TREE["a"].astype(jnp.float16), "b": TREE["b"]},
        {"a": TREE["a"].reshape(3, 2), "b": TREE["b"]},
        {"a": TREE["a"].at[1, 2].set(np.nextafter(np.float32(5), np.float32(6))), "b": TREE["b"]},
        {"a": TREE["a"]},
    ]
    digests = [tree_digest(tree) for tree in (TREE, *changed)]
    assert len(set(digests)) == 6 and tree_digest(dict(reversed(TREE.items()))) == digests[0]


def test_a_tree_comes_back_as_it_was_saved(tmp_path: Path):
    digest = save_tree(tmp_path / "1", TREE)
    assert tree_digest(restore_tree(tmp_path / "1", TREE)) == digest == tree_digest(TREE)


def test_what_is_restored_needs_no_program_of_its_own(tmp_path):
    double = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree))
    double(TREE)
    save_tree(tmp_path / "1", TREE)
    double(restore_tree(tmp_path / "1", TREE))
    assert double._cache_size() == 1


@pytest.mark.parametrize(
    "like, fault",
    [
        (TREE | {"a": jnp.zeros((2, 4))}, "leaf ['a']: expected float32[2,4], the checkpoint has float32[2,3]"),
        (
            TREE | {"a": TREE["a"].astype(jnp.float16)},
            "leaf ['a']: expected float16[2,3], the checkpoint has float32[2,3]",
        ),
        (TREE | {"z": jnp.zeros(1)}, "leaf ['z']: expected float32[1], the checkpoint has None"),
        ({"a": TREE["a"]}, "leaf ['b']['c'] is in the checkpoint and not in the model"),
    ],
)
def test_f38_a_checkpoint_of_another_shape_is_refused_naming_the_leaf(like: dict, fault: str, tmp_path: Path):
    save_tree(tmp_path / "1", TREE)
    with pytest.raises(RequestError) as caught:
        restore_tree(tmp_path / "1", like)
    assert str(caught.value).startswith(f"{tmp_path}/1: {fault}; it is left as it is, ")


@pytest.mark.parametrize("field, value", [("format_version", "9.9"), ("leaves", {})])
def test_a_record_that_was_edited_is_damage_and_one_that_was_written_so_another_tree(field, value, tmp_path: Path):
    save_tree(tmp_path / "1", TREE)
    record = json.loads((tmp_path / "1" / "digest.json").read_bytes()) | {field: value}
    write_json(tmp_path / "1" / "digest.json", record)
    with pytest.raises(DamagedError):
        restore_tree(tmp_path / "1", TREE)
    del record["record_sha256"]
    write_json(tmp_path / "1" / "digest.json", record | {"record_sha256": sealed(record)["sha256"]})
    with pytest.raises(RequestError, match=r"is not known, only '1.0'|leaf .* the checkpoint has None"):
        restore_tree(tmp_path / "1", TREE)


def test_f36_a_flipped_bit_is_never_believed(tmp_path: Path):
    source, digest = np.random.default_rng(0), save_tree(tmp_path / "1", {"a": jnp.arange(500.0)})
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file() and path.stat().st_size]
    largest = max(files, key=lambda path: path.stat().st_size)
    refused = 0
    for path in [*files, *[largest] * 20]:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[source.integers(len(whole))] ^= 1 << int(source.integers(8))
        path.write_bytes(damaged)
        try:
            assert tree_digest(restore_tree(tmp_path / "1", {"a": jnp.zeros(500)})) == digest
        except DamagedError:
            refused += 1
        path.write_bytes(whole)
    assert refused >= 20
    assert tree_digest(restore_tree(tmp_path / "1", {"a": jnp.zeros(500)})) == digest


def test_f24_a_save_that_never_ended_is_no_checkpoint(tmp_path: Path):
    save_tree(tmp_path / "1", TREE)
    (tmp_path / "1" / "digest.json").unlink()
    with pytest.raises(DamagedError, match="no readable digest.json"):
        restore_tree(tmp_path / "1", TREE)
    assert save_tree(tmp_path / "1", TREE) == tree_digest(TREE)
    assert tree_digest(restore_tree(tmp_path / "1", TREE)) == tree_digest(TREE)


# ---- checkpoints of ours ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(two_layer_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoint-final"
    save_model(folder, two_layer_model, training={"loss": 0.5})
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_a_checkpoint_stands_alone(copy: Path, two_layer_model: Model):
    loaded = load_model(copy)
    assert loaded.weights_sha256 == two_layer_model.weights_sha256 == read_about(copy)["weights_sha256"]
    assert (loaded.name, loaded.config) == (two_layer_model.name, two_layer_model.config)
    assert loaded.tokenizer.to_json() == two_layer_model.tokenizer.to_json()
    assert loaded.graph == two_layer_model.graph
    assert read_about(copy)["training"] == {"loss": 0.5}


def test_a_checkpoint_in_bfloat16_stays_one(two_layer_model: Model, tmp_path: Path):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), two_layer_model.params)
    digest = save_model(tmp_path / "checkpoint-final", two_layer_model._replace(params=narrow))
    found = load_model(tmp_path / "checkpoint-final")
    assert found.weights_sha256 == digest == tree_digest(narrow) and found.graph == two_layer_model.graph


def test_f36_a_flipped_byte_in_the_weights_is_refused(copy: Path):
    path = max((copy / "weights" / "arrays").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="copy/weights: "):
        load_model(copy)


def test_f38_weights_of_another_shape_are_refused_naming_the_leaf(copy: Path):
    about = read_about(copy)
    about["config"]["hidden_dim"] = 25
    write_json(copy / "model.json", sealed(about))
    with pytest.raises(
        RequestError, match=r"leaf \['layers'\]\[0\]\['feed_forward'\]\['down'\]: expected float32\[16,25\]"
    ):
        load_model(copy)


def test_f44_f50_what_is_no_checkpoint_of_a_known_format_is_refused(copy: Path, tmp_path: Path):
    np.save(tmp_path / "model.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(RequestError, match="not a checkpoint"):
        load_model(tmp_path)
    (copy / "model.json").write_text(json.dumps(read_about(copy) | {"format_version": "2.0"}))
    with pytest.raises(RequestError, match="format_version '2.0' is not known, only '1.0'"):
        load_model(copy)
    (copy / "model.json").write_text("{")
    with pytest.raises(Exception, match="model.json: damaged"):
        load_model(copy)


def test_a_model_from_scratch_is_a_function_of_its_seed(dataset):
    first, again, other = (base_model("tiny", seed, dataset.tokenizer_file) for seed in (1, 1, 2))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert first.config == replace(PRESETS["tiny"], vocab_size=first.tokenizer.vocab_size)
    assert first.params["embedding"].shape == (first.tokenizer.vocab_size, 128)
    narrow = base_model("tiny", 1, dataset.tokenizer_file, jnp.bfloat16)
    assert narrow.weights_sha256 == tree_digest(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), first.params))


def test_f29_weights_that_memory_is_not_enough_for_are_one_line(dataset: Dataset, monkeypatch):
    def short(*given):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    monkeypatch.setattr(weights, "base_model", short)
    config = Config("toy", DatasetConfig("toy", "v1"), model=ModelConfig(name="tiny"))
    with pytest.raises(RetraceError, match="reading the weights of tiny ran out of memory .*; take a smaller"):
        configured_base(config, dataset.tokenizer_file)


def test_weights_drawn_at_once_are_those_that_each_matrix_would_draw():
    config = replace(PRESETS["tiny"], vocab_size=100, num_layers=1, **GENERATIONS[3], sliding_window=8)
    one_by_one = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(Gemma(config, nnx.Rngs(key)))))(jax.random.key(1))
    assert tree_digest(_fresh_weights(config, 1)) == tree_digest(one_by_one)


def test_a_model_says_briefly_what_it_is(small_model):
    assert repr(small_model) == f"Model('toy', 1 layers, vocabulary {small_model.config.vocab_size})"


def test_a_host_that_jax_was_told_to_leave_out_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    def unknown(backend: str):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", unknown)
    with pytest.raises(RequestError, match="JAX_PLATFORMS=cuda,cpu"):
        weights._read_by(object(), "google/gemma-2b-it")
