"""config.json of a released Gemma: the shape it states, and a refusal of every field that gemma.py computes otherwise.

    read_config(folder) == PRESETS["gemma3-270m"]
    config_fields(PRESETS["gemma3-270m"])           # {"model_type": "gemma3_text", "hidden_size": 640, …}

Read are model_type gemma, gemma2, gemma3_text, and of gemma3 the text_config, as transformers 4 and 5 write them.
Written are the first three, in the words of both.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib.errors import RequestError
from lib.model.gemma import GENERATIONS, LOCAL_ROPE_BASE, NORM_EPSILON, GemmaConfig

MODEL_TYPES = {"gemma": 1, "gemma2": 2, "gemma3_text": 3}

SIZES = {
    "vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "embed_dim": "hidden_size",
    "hidden_dim": "intermediate_size", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}  # fmt: skip
LATER_SIZES = {"sliding_window": "sliding_window", "query_pre_attn_scalar": "query_pre_attn_scalar"}  # from Gemma 2 on
# The text part of google/gemma-3-4b-it leaves these out.
LEFT_OUT = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "query_pre_attn_scalar": 256,
}  # fmt: skip

# Fields that choose a computation, and the values that choose the one that gemma.py has; so does their absence.
FIXED: dict[str, tuple] = {
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "rms_norm_eps": (NORM_EPSILON,),
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False, None),
}
FIXED_IN: dict[int, dict[str, tuple]] = {
    1: {"hidden_act": ("gelu_pytorch_tanh", "gelu", None)},  # the first releases say gelu, and mean its approximation
    2: {
        "attn_logit_softcapping": (GENERATIONS[2]["attention_cap"],),
        "final_logit_softcapping": (GENERATIONS[2]["logit_cap"],),
    },
    3: {
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "sliding_window_pattern": (GENERATIONS[3]["global_every"],),
        "_sliding_window_pattern": (GENERATIONS[3]["global_every"],),
    },
}
ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"}
# Fields that change no number of the text model.
BESIDE = {
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "initializer_range",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation",
    "_name_or_path", "_attn_implementation_autoset",
}  # fmt: skip
BESIDE_VISION = {
    "vision_config", "mm_tokens_per_image", "image_token_index", "image_token_id", "boi_token_index", "boi_token_id",
    "eoi_token_index", "eoi_token_id",
}  # fmt: skip


# ---- reading --------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> GemmaConfig:
    """The shape that config.json states. Raises RequestError, naming the field, where gemma.py computes otherwise."""
    where = f"{folder}/config.json"
    found = json_object(folder / "config.json")
    if is_nested(folder):
        _refuse_unknown(where, found, {"text_config", "tie_word_embeddings"} | BESIDE | BESIDE_VISION)
        _check_fixed(where, found, {"tie_word_embeddings": FIXED["tie_word_embeddings"]})
        where, found = f"{where}: text_config", _object(where, found, "text_config")
    generation = MODEL_TYPES.get(found.get("model_type"))
    if generation is None:
        known = ", ".join(repr(name) for name in [*MODEL_TYPES, "gemma3"])
        raise RequestError(f"{where}: model_type {found.get('model_type')!r} is not read, only {known}")
    return _text_config(where, found, generation)


def is_nested(folder: Path) -> bool:
    """Whether the text model is a part of a model that reads pictures, too."""
    return json_object(folder / "config.json").get("model_type") == "gemma3"


def _text_config(where: str, found: dict[str, Any], generation: int) -> GemmaConfig:
    fixed = FIXED | FIXED_IN[generation]
    if generation == 2:  # google/gemma-2-9b says its window twice, of which transformers reads the first
        fixed |= {"sliding_window_size": (found.get("sliding_window"), None)}
    names = SIZES if generation == 1 else SIZES | LATER_SIZES
    _refuse_unknown(where, found, {*fixed, *names.values(), "layer_types"} | ROPE | BESIDE)
    _check_fixed(where, found, fixed)
    left_out = LEFT_OUT if generation == 3 else {}
    sizes = {ours: _size(where, left_out | found, theirs) for ours, theirs in names.items()}
    if sizes["num_heads"] % sizes["num_kv_heads"] or sizes["head_dim"] % 2:
        raise RequestError(f"{where}: expected an even head_dim, and num_key_value_heads to divide num_attention_heads")
    if sizes.get("query_pre_attn_scalar") == sizes["head_dim"]:
        del sizes["query_pre_attn_scalar"]
    config = GemmaConfig(**sizes, **GENERATIONS[generation], rope_scale=_rope_scale(where, found, generation))
    _check_layer_types(where, found.get("layer_types"), config)
    return config


def _check_fixed(where: str, found: dict[str, Any], fixed: dict[str, tuple]) -> None:
    for name, values in fixed.items():
        if name in found and found[name] not in values:
            raise RequestError(f"{where}: {name}: expected {values[0]!r}, got {_shown(found[name])}")


def _refuse_unknown(where: str, found: dict[str, Any], known: set[str]) -> None:
    """A field that is not known may change numbers, unless it says null or false."""
    for name in sorted(found.keys() - known):
        if found[name] is not None and found[name] is not False:
            raise RequestError(
                f"{where}: {name}: is not known and may change the computation; got {_shown(found[name])}"
            )


def _size(where: str, found: dict[str, Any], name: str) -> int:
    value = found.get(name)
    if not _is_number(value) or value < 1 or value != int(value):
        raise RequestError(f"{where}: {name}: expected a whole number above 0, got {_shown(value)}")
    return int(value)


def _layer_types(config: GemmaConfig) -> list[str]:
    return ["sliding_attention" if config.is_local(layer) else "full_attention" for layer in range(config.num_layers)]


def _check_layer_types(where: str, found: Any, config: GemmaConfig) -> None:
    if found is not None and found != _layer_types(config):
        raise RequestError(
            f"{where}: layer_types: expected {config.num_layers} layers, full_attention every {config.global_every} "
            f"and sliding_attention between, got {_shown(found)}"
        )


def _rope_scale(where: str, found: dict[str, Any], generation: int) -> float:
    """What divides the places in the global layers; the bases are checked. As transformers 4 or 5 spells it."""
    rope, scaling = _object(where, found, "rope_parameters"), _object(where, found, "rope_scaling")
    theta = {"rope_theta": found["rope_theta"]} if "rope_theta" in found else {}
    if generation < 3:
        return _checked_rope(f"{where}: rope_parameters", theta | rope | scaling, 10_000.0, ("default",))
    if strange := sorted(rope.keys() - {"full_attention", "sliding_attention"}):
        raise RequestError(f"{where}: rope_parameters: expected full_attention and sliding_attention, got {strange[0]}")
    local = {"rope_theta": found["rope_local_base_freq"]} if "rope_local_base_freq" in found else {}
    local |= _object(f"{where}: rope_parameters", rope, "sliding_attention")
    _checked_rope(f"{where}: rope_parameters: sliding_attention", local, 10_000.0, ("default",))
    far = theta | _object(f"{where}: rope_parameters", rope, "full_attention") | scaling
    return _checked_rope(f"{where}: rope_parameters: full_attention", far, 1_000_000.0, ("default", "linear"))


def _checked_rope(where: str, rope: dict[str, Any], base: float, kinds: tuple[str, ...]) -> float:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        raise RequestError(f"{where}: rope_type: expected {' or '.join(kinds)}, got {_shown(kind)}")
    if rope.get("rope_theta", base) != base:
        raise RequestError(f"{where}: rope_theta: expected {base:g}, got {_shown(rope['rope_theta'])}")
    known = {"rope_type", "type", "rope_theta"} | ({"factor"} if kind == "linear" else set())
    if strange := sorted(rope.keys() - known):
        raise RequestError(f"{where}: {strange[0]}: is not known of positions of kind {kind}")
    factor = rope.get("factor", None if kind == "linear" else 1.0)
    if not _is_number(factor) or factor < 1:
        raise RequestError(f"{where}: factor: expected a number of 1 or more, got {_shown(factor)}")
    return float(factor)


def _object(where: str, found: dict[str, Any], name: str) -> dict[str, Any]:
    value = found.get(name)
    if value is not None and not isinstance(value, dict):
        raise RequestError(f"{where}: {name}: expected an object, got {_shown(value)}")
    return value or {}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises RequestError."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not readable ({error})") from None
    if not isinstance(found, dict):
        raise RequestError(f"{path} is not readable (expected an object)")
    return found


# ---- writing --------------------------------------------------------------------------------------------------

ARCHITECTURES = {1: "GemmaForCausalLM", 2: "Gemma2ForCausalLM", 3: "Gemma3ForCausalLM"}
# As released. It bounds nothing that is computed, in gemma.py or in transformers; some servers ask for it.
CONTEXT = {1: 8_192, 2: 8_192, 3: 32_768}
LONG_CONTEXT = 131_072  # of the models whose positions are divided


def config_fields(config: GemmaConfig) -> dict[str, Any]:
    """What config.json says of this shape. Raises RequestError where no released Gemma has such a one."""
    generation = generation_of(config)
    names = SIZES if generation == 1 else SIZES | LATER_SIZES
    sizes = asdict(config) | {"query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim}
    kind = next(name for name, number in MODEL_TYPES.items() if number == generation)
    fields = {"architectures": [ARCHITECTURES[generation]], "model_type": kind}
    fields |= {theirs: sizes[ours] for ours, theirs in names.items()}
    fields |= {name: values[0] for name, values in (FIXED | FIXED_IN[generation]).items()}
    if generation > 1:
        fields["layer_types"] = _layer_types(config)
    fields |= {"max_position_embeddings": LONG_CONTEXT if config.rope_scale > 1 else CONTEXT[generation]}
    fields |= _rope_fields(config, generation)
    if _text_config("the shape", fields, generation) != config:
        raise RequestError(f"model: no {kind} of transformers has its shape, {config}")
    return fields


def generation_of(config: GemmaConfig) -> int:
    return 3 if config.qk_norm else 2 if config.post_norms else 1


def _rope_fields(config: GemmaConfig, generation: int) -> dict[str, Any]:
    """The positions twice: `rope_parameters` is what transformers 5 writes, the others are what 4 reads."""
    plain = {"rope_type": "default"}
    scaling = {"rope_type": "linear", "factor": config.rope_scale} if config.rope_scale > 1 else None
    fields = {"rope_theta": config.rope_base, "rope_scaling": scaling}
    if generation < 3:
        return fields | {"rope_parameters": plain | {"rope_theta": config.rope_base}}
    ropes = {
        "full_attention": (scaling or plain) | {"rope_theta": config.rope_base},
        "sliding_attention": plain | {"rope_theta": LOCAL_ROPE_BASE},
    }
    return fields | {"rope_local_base_freq": LOCAL_ROPE_BASE, "rope_parameters": ropes}
