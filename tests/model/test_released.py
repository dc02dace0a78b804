"""Released folders: what loads is what was written, and what is anything else is refused by name, in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.flax import load_file, save_file

from lib.data.tokenizer import Tokenizer
from lib.errors import RequestError
from lib.files import repository_root
from lib.model import released_weights
from lib.model.gemma import GENERATIONS, PRESETS, Gemma, GemmaConfig
from lib.model.released_config import config_fields, read_config
from lib.model.released_weights import read_weights, write_weights
from lib.model.storage import tree_digest
from lib.model.weights import Model, base_model, check_released

# ---- config.json ----------------------------------------------------------------------------------------------

# As they are published on huggingface.co, but for the licence and what is said about pictures.
GEMMA_1 = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
    "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GEMMA_2 = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
    "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GEMMA_3 = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
NESTED = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}  # fmt: skip
LAYERS_270M = (["sliding_attention"] * 5 + ["full_attention"]) * 3
# The same in the words of transformers 5.
ROPES_4B = {
    "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}


def stated(folder: Path, about: dict) -> GemmaConfig:
    (folder / "config.json").write_text(json.dumps(about))
    return read_config(folder)


def with_text(**fields) -> dict:
    return NESTED | {"text_config": NESTED["text_config"] | fields}


@pytest.mark.parametrize(
    "preset, about",
    [
        ("gemma-2b", GEMMA_1),
        ("gemma-2b", GEMMA_1 | {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("gemma-7b", GEMMA_1 | {"hidden_size": 3072, "intermediate_size": 24576, "num_attention_heads": 16,
                                "num_hidden_layers": 28, "num_key_value_heads": 16}),
        ("gemma2-2b", GEMMA_2),
        ("gemma2-9b", GEMMA_2 | {"hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
                                 "num_hidden_layers": 42, "num_key_value_heads": 8, "sliding_window_size": 4096}),
        ("gemma3-270m", GEMMA_3 | {"_sliding_window_pattern": 6, "hidden_size": 640, "intermediate_size": 2048,
                                   "num_hidden_layers": 18, "layer_types": LAYERS_270M,
                                   "use_bidirectional_attention": False}),
        ("gemma3-1b", GEMMA_3),
        ("gemma3-4b", NESTED),
        ("gemma3-4b", with_text(rope_scaling=None, rope_parameters=ROPES_4B)),
    ],
)  # fmt: skip
def test_a_published_configuration_is_the_preset(preset: str, about: dict, tmp_path: Path):
    assert stated(tmp_path, about) == PRESETS[preset]


def test_the_27b_models_scale_their_scores_by_another_number(tmp_path: Path):
    assert stated(tmp_path, GEMMA_2 | {"query_pre_attn_scalar": 144}).query_pre_attn_scalar == 144


@pytest.mark.parametrize("preset", PRESETS)
def test_the_configuration_of_a_preset_is_read_back_as_that_preset(preset: str, tmp_path: Path):
    assert stated(tmp_path, config_fields(PRESETS[preset])) == PRESETS[preset]


def test_each_spelling_of_what_is_written_suffices(tmp_path: Path):
    """Transformers 4 reads what 5 does not write any more, and the other way round."""
    for preset in ("gemma-2b", "gemma2-2b", "gemma3-270m", "gemma3-4b"):
        fields = config_fields(PRESETS[preset])
        for absent in (["rope_parameters", "layer_types"], ["rope_theta", "rope_scaling", "rope_local_base_freq"]):
            kept = {name: value for name, value in fields.items() if name not in absent}
            assert stated(tmp_path, kept) == PRESETS[preset]


@pytest.mark.parametrize("changed", [{"logit_cap": 20.0}, {"rope_base": 2e4}, {"query_pre_attn_scalar": 7.5}])
def test_a_shape_that_no_released_model_has_is_not_written(changed: dict):
    with pytest.raises(RequestError, match="has its shape|the shape: rope_parameters"):
        config_fields(replace(PRESETS["tiny"], **changed))


FULL, LINEAR = "rope_parameters: full_attention: ", {"rope_type": "linear"}
REFUSED = [
    (GEMMA_1, {"model_type": "gemma4"}, "model_type 'gemma4' is not read, only 'gemma', 'gemma2', 'gemma3_text', "),
    (GEMMA_1, {"model_type": None}, "model_type None is not read"),
    (GEMMA_1, {"hidden_act": "silu"}, "hidden_act: expected 'gelu_pytorch_tanh', got 'silu'"),
    (GEMMA_1, {"hidden_activation": "gelu"}, "hidden_activation: expected 'gelu_pytorch_tanh', got 'gelu'"),
    (GEMMA_2, {"hidden_act": "gelu"}, "hidden_act: expected 'gelu_pytorch_tanh', got 'gelu'"),
    (GEMMA_1, {"rms_norm_eps": 1e-5}, "rms_norm_eps: expected 1e-06, got 1e-05"),
    (GEMMA_1, {"attention_bias": True}, "attention_bias: expected False, got True"),
    (GEMMA_1, {"attention_dropout": 0.1}, "attention_dropout: expected 0.0, got 0.1"),
    (GEMMA_1, {"tie_word_embeddings": False}, "tie_word_embeddings: expected True, got False"),
    (NESTED, {"tie_word_embeddings": False}, "tie_word_embeddings: expected True, got False"),
    (GEMMA_1, {"use_bidirectional_attention": True}, "use_bidirectional_attention: expected False, got True"),
    (GEMMA_1, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: is not known and may change the computation"),
    (GEMMA_2, {"attn_logit_softcapping": None}, "attn_logit_softcapping: expected 50.0, got None"),
    (GEMMA_2, {"final_logit_softcapping": 20.0}, "final_logit_softcapping: expected 30.0, got 20.0"),
    (GEMMA_3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping: expected None, got 30.0"),
    (GEMMA_2, {"quantization_config": {"bits": 4}}, "quantization_config: is not known and may change"),
    (NESTED, {"quantization_config": {"bits": 4}}, "quantization_config: is not known and may change"),
    (GEMMA_1, {"rope_theta": 500000.0}, "rope_parameters: rope_theta: expected 10000, got 500000.0"),
    (GEMMA_2, {"rope_scaling": LINEAR | {"factor": 8}}, "rope_parameters: rope_type: expected default, got 'linear'"),
    (GEMMA_3, {"rope_theta": 10000}, f"{FULL}rope_theta: expected 1e+06, got 10000"),
    (GEMMA_3, {"rope_local_base_freq": 1e6}, "sliding_attention: rope_theta: expected 10000, got 1000000.0"),
    (GEMMA_3, {"rope_scaling": {"rope_type": "yarn", "factor": 8}}, f"{FULL}rope_type: expected default or linear, "),
    (GEMMA_3, {"rope_scaling": LINEAR}, f"{FULL}factor: expected a number of 1 or more, got None"),
    (GEMMA_3, {"rope_scaling": LINEAR | {"factor": 0}}, f"{FULL}factor: expected a number of 1 or more, got 0"),
    (GEMMA_3, {"rope_scaling": {"factor": 8}}, f"{FULL}factor: is not known of positions of kind default"),
    (GEMMA_3, {"rope_scaling": [8]}, "rope_scaling: expected an object, got [8]"),
    (GEMMA_3, {"rope_parameters": LINEAR}, "rope_parameters: expected full_attention and sliding_attention, got rope"),
    (GEMMA_3, {"sliding_window_pattern": 4}, "sliding_window_pattern: expected 6, got 4"),
    (GEMMA_3, {"layer_types": LAYERS_270M}, "layer_types: expected 26 layers, full_attention every 6 and sliding_"),
    (GEMMA_2, {"sliding_window": None}, "sliding_window: expected a whole number above 0, got None"),
    (GEMMA_2, {"sliding_window_size": 2048}, "sliding_window_size: expected 4096, got 2048"),
    (GEMMA_3, {"sliding_window_size": 512}, "sliding_window_size: is not known and may change the computation"),
    (GEMMA_1, {"head_dim": None}, "head_dim: expected a whole number above 0, got None"),
    (GEMMA_1, {"hidden_size": True}, "hidden_size: expected a whole number above 0, got True"),
    (GEMMA_1, {"num_hidden_layers": 1.5}, "num_hidden_layers: expected a whole number above 0, got 1.5"),
    (GEMMA_1, {"vocab_size": float("nan")}, "vocab_size: expected a whole number above 0, got nan"),
    (GEMMA_1, {"num_key_value_heads": 3}, "num_key_value_heads to divide num_attention_heads"),
    (NESTED, {"text_config": 3}, "text_config: expected an object, got 3"),
    (NESTED, {"text_config": {"model_type": "llama"}}, "text_config: model_type 'llama' is not read"),
]


@pytest.mark.parametrize("about, changed, fault", REFUSED)
def test_a_field_that_means_another_computation_is_refused_by_name(
    about: dict, changed: dict, fault: str, tmp_path: Path
):
    with pytest.raises(RequestError) as caught:
        stated(tmp_path, about | changed)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(caught.value)
    assert fault in str(caught.value)


def test_a_field_that_is_off_changes_nothing(tmp_path: Path):
    assert stated(tmp_path, GEMMA_1 | {"another": None, "one_more": False}) == PRESETS["gemma-2b"]


@pytest.mark.parametrize("content", ["{", "[]", "", "[" * 100_000, '{"model_type": "gemma"}'])
def test_what_is_no_configuration_is_refused(content: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RequestError, match="config.json"):
        read_config(tmp_path)


# ---- weights --------------------------------------------------------------------------------------------------

TYPES = {1: "gemma", 2: "gemma2", 3: "gemma3_text"}
VISION = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": jnp.ones((3, 2)),
    "multi_modal_projector.mm_input_projection_weight": jnp.ones((3, 2)),
}


@pytest.fixture(scope="module", params=[1, 2, 3])
def toy(request: pytest.FixtureRequest, two_layer_model: Model) -> Model:
    """A toy of each generation."""
    generation = request.param
    later = {"sliding_window": 8, "query_pre_attn_scalar": 12} if generation > 1 else {}
    return drawn(replace(two_layer_model.config, **GENERATIONS[generation], **later), two_layer_model.tokenizer)


def drawn(config: GemmaConfig, tokenizer: Tokenizer) -> Model:
    """A model with weights, and scales in its norms, that numpy draws: in no time."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0))))
    source = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(source.normal(0, 0.2, leaf.shape), leaf.dtype), state)
    return Model("toy", config, graph, nnx.to_pure_dict(params), tokenizer)


def tensors(model: Model) -> dict[str, jax.Array]:
    """The weights under the names and in the layout of Hugging Face: linear layers are [out, in], of one axis each."""
    config, found = model.config, {"model.embed_tokens.weight": model.params["embedding"]}
    found["model.norm.weight"] = model.params["final_norm"]["scale"]
    for number, layer in model.params["layers"].items():
        own, attention, mlp = f"model.layers.{number}.", layer["attention"], layer["feed_forward"]
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            found[f"{own}self_attn.{theirs}_proj.weight"] = attention[ours].reshape(-1, config.embed_dim)
        found[f"{own}self_attn.o_proj.weight"] = attention["output"].reshape(config.embed_dim, -1)
        for name in ("gate", "up", "down"):
            found[f"{own}mlp.{name}_proj.weight"] = mlp[name]
        found[f"{own}input_layernorm.weight"] = layer["attention_norm"]["scale"]
        before_feed_forward = "pre_feedforward" if config.post_norms else "post_attention"
        found[f"{own}{before_feed_forward}_layernorm.weight"] = layer["feed_forward_norm"]["scale"]
        if config.post_norms:
            found[f"{own}post_attention_layernorm.weight"] = layer["attention_post_norm"]["scale"]
            found[f"{own}post_feedforward_layernorm.weight"] = layer["feed_forward_post_norm"]["scale"]
        if config.qk_norm:
            found[f"{own}self_attn.q_norm.weight"] = attention["query_norm"]["scale"]
            found[f"{own}self_attn.k_norm.weight"] = attention["key_norm"]["scale"]
    return {name: jnp.array(tensor) for name, tensor in found.items()}


def sizes(config: GemmaConfig) -> dict:
    found = {
        "vocab_size": config.vocab_size, "num_hidden_layers": config.num_layers, "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
    }  # fmt: skip
    later = {"sliding_window": config.sliding_window, "query_pre_attn_scalar": config.query_pre_attn_scalar}
    return found | (later if config.post_norms else {})


def released(folder: Path, model: Model, *shards: dict[str, jax.Array], index: bool = False, **about) -> Path:
    """A folder as `hf download` leaves it."""
    folder.mkdir(exist_ok=True)
    generation = 3 if model.config.qk_norm else 2 if model.config.post_norms else 1
    stated = {"model_type": TYPES[generation]} | sizes(model.config) | about
    (folder / "config.json").write_text(json.dumps(stated))
    names = {}
    for number, shard in enumerate(shards or [tensors(model)], 1):
        save_file(shard, folder / f"model-{number}.safetensors")
        names |= dict.fromkeys(shard, f"model-{number}.safetensors")
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    model.tokenizer.save(folder / "tokenizer.json")
    return folder


def halves(whole: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    names = sorted(whole)
    return {name: whole[name] for name in names[:5]}, {name: whole[name] for name in names[5:]}


def loaded(folder: Path) -> Model:
    return base_model(str(folder), seed=0, tokenizer_file=Path("none"))


def refusal(folder: Path) -> str:
    """Of the folder, the same whether it is loaded or only checked."""
    with pytest.raises(RequestError) as caught:
        loaded(folder)
    with pytest.raises(RequestError) as checked:
        check_released(str(folder))
    assert str(caught.value) == str(checked.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_released_folder_loads_as_the_model_it_was_written_from(toy: Model, tmp_path: Path):
    found = loaded(released(tmp_path / "gemma", toy))
    assert found.weights_sha256 == toy.weights_sha256
    assert (found.config, found.graph) == (toy.config, toy.graph)
    assert found.tokenizer.to_json() == toy.tokenizer.to_json()


@pytest.mark.parametrize("index", [False, True])
def test_shards_half_precision_and_a_stored_head_make_no_difference(toy: Model, tmp_path: Path, index: bool):
    whole = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors(toy).items()}
    head = {"lm_head.weight": jnp.array(whole["model.embed_tokens.weight"])}
    first, second = halves(whole)
    found = loaded(released(tmp_path / "gemma", toy, first, second | head, index=index))
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), toy.params)
    assert tree_digest(found.params) == tree_digest(rounded)


def test_the_dtype_is_what_is_asked_for(toy: Model, tmp_path: Path):
    folder = released(tmp_path / "gemma", toy)
    check_released(str(folder))
    found = base_model(str(folder), seed=0, tokenizer_file=Path("none"), dtype=jnp.bfloat16)
    assert tree_digest(found.params) == tree_digest(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy.params))


@pytest.mark.parametrize("old, new", [("model.", "language_model.model."), ("model.", "model.language_model.")])
def test_of_a_model_that_sees_the_part_that_reads_is_taken(two_layer_model: Model, old: str, new: str, tmp_path: Path):
    later = {"sliding_window": 8, "rope_scale": 8.0, "query_pre_attn_scalar": 12}
    config = replace(two_layer_model.config, **GENERATIONS[3], **later)
    model = drawn(config, two_layer_model.tokenizer)
    own = {name.replace(old, new, 1): tensor for name, tensor in tensors(model).items()}
    vision = {name if new.startswith("language") else f"model.{name}": tensor for name, tensor in VISION.items()}
    text = sizes(config) | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    folder = released(tmp_path / "gemma", model, own | vision)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    found = loaded(folder)
    assert (found.config, found.weights_sha256) == (config, model.weights_sha256)


def test_parts_for_pictures_have_no_place_in_a_model_that_only_reads(two_layer_model: Model, tmp_path: Path):
    folder = released(tmp_path / "gemma", two_layer_model, tensors(two_layer_model) | VISION)
    assert f"{folder}: 2 tensors have no place in the model: multi_modal_projector." in refusal(folder)


def test_a_missing_and_a_left_over_tensor_are_named(toy: Model, tmp_path: Path):
    whole, name = tensors(toy), "model.layers.1.mlp.up_proj.weight"
    folder = released(tmp_path / "gemma", toy, {other: whole[other] for other in whole if other != name})
    assert refusal(folder) == f"{folder}: no tensor {name} in its safetensors files"
    folder = released(tmp_path / "gemma", toy, whole | {"model.layers.2.mlp.up_proj.weight": jnp.zeros((2, 2))})
    fault = "1 tensors have no place in the model: model.layers.2.mlp.up_proj.weight"
    assert refusal(folder) == f"{folder}: {fault}"


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.up_proj.weight", "layers.0.self_attn.o_proj.weight"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(toy: Model, name: str, tmp_path: Path):
    whole = tensors(toy)
    tensor = whole[f"model.{name}"]
    other = tensor[:-1] if tensor.ndim == 1 else jnp.array(tensor.T)
    folder = released(tmp_path / "gemma", toy, whole | {f"model.{name}": other})
    fault = f"tensor model.{name} has shape {other.shape}, expected {tensor.shape}"
    assert refusal(folder) == f"{folder}/model-1.safetensors: {fault}"


def test_the_weights_of_another_generation_are_refused(two_layer_model: Model, tmp_path: Path):
    later = {"sliding_window": 8, "query_pre_attn_scalar": 8}
    folder = released(tmp_path / "gemma", two_layer_model, model_type="gemma2", **later)
    norms = "pre_feedforward_layernorm.weight, model.layers.0.post_feedforward_layernorm.weight"
    assert f"{folder}: no tensor model.layers.0.{norms}, model.layers.1." in refusal(folder)


def test_another_head_and_other_numbers_are_refused(two_layer_model: Model, tmp_path: Path):
    whole = tensors(two_layer_model)
    head = whole["model.embed_tokens.weight"].at[3, 4].add(1e-3)
    folder = released(tmp_path / "a", two_layer_model, whole | {"lm_head.weight": head})
    assert "tensor lm_head.weight is not the embedding" in refusal(folder)
    whole["model.norm.weight"] = jnp.zeros(16, jnp.int8)
    folder = released(tmp_path / "b", two_layer_model, whole)
    assert "tensor model.norm.weight holds I8; read are F32, BF16 and F16" in refusal(folder)


def test_damaged_and_absent_files_are_named(two_layer_model: Model, tmp_path: Path):
    folder = released(tmp_path / "gemma", two_layer_model, *halves(tensors(two_layer_model)), index=True)
    shard, index = folder / "model-2.safetensors", folder / "model.safetensors.index.json"
    whole = shard.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 50, b"version https://git-lfs"):
        shard.write_bytes(damaged)
        assert refusal(folder).startswith(f"{shard}: not readable as safetensors (")
    shard.unlink()
    assert refusal(folder) == f"{index}: names model-2.safetensors, which is not there; fetch the model again"
    index.unlink()
    assert f"{folder}: no tensor model." in refusal(folder)
    (folder / "model-1.safetensors").unlink()
    assert refusal(folder) == f"{folder}: no .safetensors file; other formats are not read"


def test_an_index_that_is_wrong_is_refused(two_layer_model: Model, tmp_path: Path):
    folder = released(tmp_path / "gemma", two_layer_model, *halves(tensors(two_layer_model)), index=True)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    for wrong, fault in [
        (
            names | {"model.norm.weight": "model-1.safetensors"},
            "puts tensor model.norm.weight into model-1.safetensors",
        ),
        (names | {"model.other.weight": "model-1.safetensors"}, "puts tensor model.other.weight into"),
        (names | {"model.norm.weight": "../x.safetensors"}, "expected a weight_map from tensors to file names"),
        ([], "expected a weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": wrong}))
        assert fault in refusal(folder)


def test_a_tensor_that_stands_twice_is_refused(two_layer_model: Model, tmp_path: Path):
    whole = tensors(two_layer_model)
    folder = released(tmp_path / "gemma", two_layer_model, whole, {"model.norm.weight": whole["model.norm.weight"]})
    assert "tensor model.norm.weight stands in model-1.safetensors too" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_opened(two_layer_model: Model, name: str, tmp_path: Path):
    folder = released(tmp_path / "gemma", two_layer_model)
    (folder / "model-1.safetensors").rename(folder / name)
    assert refusal(folder).startswith(f"{folder}: {name} may be a pickle, which runs code when it is read")


def test_a_tokenizer_larger_than_the_embedding_is_refused(two_layer_model: Model, tmp_path: Path):
    folder = released(tmp_path / "gemma", two_layer_model, vocab_size=two_layer_model.config.vocab_size - 1)
    size = two_layer_model.config.vocab_size
    assert f"its tokenizer has {size} tokens, its embedding {size - 1}; {folder} does not" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert f"{folder}/tokenizer.json: no tokenizer there" in refusal(folder)


# ---- writing --------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_bit_for_bit(toy: Model, tmp_path: Path):
    write_weights(tmp_path, toy.config, toy.params)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert tree_digest(read_weights(tmp_path, toy.config, toy.params)) == toy.weights_sha256


def test_what_is_written_has_the_names_and_the_layout_of_hugging_face(toy: Model, tmp_path: Path):
    write_weights(tmp_path, toy.config, toy.params)
    found, expected = load_file(tmp_path / "model.safetensors"), tensors(toy)
    assert found.keys() == expected.keys()
    assert all(jnp.array_equal(found[name], tensor) for name, tensor in expected.items())
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_large_weights_are_written_in_shards_with_an_index(toy: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(released_weights, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(released_weights, "BLOCK_BYTES", 1_000)
    write_weights(tmp_path, toy.config, toy.params)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(toy.params))
    embedding = toy.params["embedding"].nbytes  # the one leaf that is larger than a shard, and has one of its own
    assert sorted(path.stat().st_size > 12_000 for path in shards) == [False] * (len(shards) - 1) + [embedding > 12_000]
    assert tree_digest(read_weights(tmp_path, toy.config, toy.params)) == toy.weights_sha256


def test_weights_are_written_as_bfloat16_where_it_is_asked_for(toy: Model, tmp_path: Path):
    write_weights(tmp_path, toy.config, toy.params, "bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy.params)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == jnp.bfloat16
    assert tree_digest(read_weights(tmp_path, toy.config, toy.params, jnp.bfloat16)) == tree_digest(rounded)
    (tmp_path / "again").mkdir()
    write_weights(tmp_path / "again", toy.config, rounded)
    written = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "again")]
    assert written[0] == written[1]


# ---- memory ---------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import lib, jax, jax.numpy as jnp
from flax import nnx
from lib.model.gemma import Gemma
from lib.model.released_weights import read_weights, write_weights
from lib.model.released_config import read_config

def kilobytes(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)

folder = Path(sys.argv[1])
config = read_config(folder)
shapes = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0))))[1])
jnp.zeros(3).block_until_ready()
before = kilobytes("VmRSS")
params = read_weights(folder, config, shapes, getattr(jnp, sys.argv[2]))
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print((kilobytes("VmHWM") - before) * 1024 / weights)
Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
before = kilobytes("VmRSS")
write_weights(folder, config, params, sys.argv[3])
print((kilobytes("VmHWM") - before) * 1024 / weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by Linux's /proc")
@pytest.mark.parametrize("stored, dtype", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_loading_and_writing_need_little_more_memory_than_the_weights(stored: str, dtype: str, dataset, tmp_path: Path):
    """Two thirds of the weights are the embedding, as in Gemma 3 270M."""
    config = GemmaConfig(32_000, 4, 640, 2048, 4, 1, 256, sliding_window=512, **GENERATIONS[3])
    folder = random_folder(tmp_path, config, jnp.dtype(stored))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, dtype, stored], cwd=repository_root(), capture_output=True, text=True
    )
    reading, writing = map(float, done.stdout.split())
    print(f"{stored} to {dtype}: peak {reading:.2f} times the weights; written again, {writing:.2f} times beside them")
    # The same megabytes stand beside any weights: a block of them in the making, the code that reads.
    assert reading < 1.2 and writing < 0.3


def random_folder(folder: Path, config: GemmaConfig, dtype: jnp.dtype) -> Path:
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0))))
    source = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(source.random(leaf.shape, np.float32), dtype), nnx.to_pure_dict(state)
    )
    about = sizes(config) | {"model_type": "gemma3_text", "query_pre_attn_scalar": 256}
    (folder / "config.json").write_text(json.dumps(about))
    save_file(tensors(Model("random", config, graph, params, None)), folder / "model.safetensors")
    return folder
