"""A model as the folder that Hugging Face libraries load: what `base_model` reads, written.

    write_released(folder, model)
    AutoModelForCausalLM.from_pretrained(folder)         # of transformers: the same logits
    AutoTokenizer.from_pretrained(folder)                # the same token ids, by its chat template too

Weights in safetensors, config.json, tokenizer.json as it is, and two small files of what the code knows here: which
token is which and how a chat is written (tokenizer_config.json), and at which tokens an answer ends
(generation_config.json). `<bos>` is written by the chat template, and by nothing else.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from lib.data.renderer import chat_template
from lib.data.tokenizer import Tokenizer
from lib.files import write_json
from lib.model.lora import BLOCKS, split
from lib.model.released_config import config_fields
from lib.model.released_weights import LINEAR, place, write_weights
from lib.model.weights import Model

DTYPES = ("float32", "bfloat16")
NESTED = "model.language_model."  # where transformers has the text model of a base that reads pictures, too


def write_released(folder: Path, model: Model, system_instruction: str = "", dtype: str = "") -> None:
    """Fill the folder, of a model without adapters; weights of `dtype`, or as they are.

    Raises RequestError where the shape is no released one's.
    """
    config = config_fields(model.config) | special_ids(model.tokenizer) | dtype_fields(dtype or weights_dtype(model))
    write_json(folder / "config.json", config)
    model.tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", tokenizer_fields(system_instruction))
    write_json(folder / "generation_config.json", generation_fields(model.tokenizer))
    write_weights(folder, model.config, model.params, dtype)


def write_adapters(folder: Path, model: Model, nested: bool = False) -> None:
    """Fill the folder as peft's `PeftModel.from_pretrained(base, folder)` reads it: adapters and no other weight.

    `nested` where the base is the text part of a model that reads pictures, too.
    """
    found = jax.tree_util.tree_leaves_with_path(split(model.params).adapters)
    prefix = NESTED if nested else "model."
    tensors = dict(_peft_tensor(tuple(entry.key for entry in path), leaf, model, prefix) for path, leaf in found)
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", adapter_fields(model, nested))


def adapter_fields(model: Model, nested: bool) -> dict[str, Any]:
    """adapter_config.json; the scale alpha / rank means the same there.

    target_modules are names, or a pattern where the same names stand in the part for pictures, which has no adapters.
    """
    names = sorted(LINEAR[f"{BLOCKS[name]}.{name}"].split(".")[1] for name in model.lora.projections)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf".*language_model\..*\.({'|'.join(names)})" if nested else names,
        "inference_mode": True,
    }


def _peft_tensor(path: tuple[str | int, ...], leaf: jax.Array, model: Model, prefix: str) -> tuple[str, np.ndarray]:
    """Name and tensor: A is stored [R, in] and B [out, R], beside the place of their projection.

    (…, 3, "attention", "adapters", "query", "a")  →  base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight
    """
    *block, _, name, kind = path
    own = place((*block, name), model.params["layers"][path[1]][path[2]][name].shape, model.config, prefix).name
    rank = model.lora.rank
    matrix = np.asarray(leaf).reshape((rank, -1) if kind == "a" else (-1, rank))
    return f"base_model.model.{own.removesuffix('.weight')}.lora_{kind.upper()}.weight", matrix


def weights_dtype(model: Model) -> str:
    """The type of most of its weights."""
    return str(model.params["embedding"].dtype)


def dtype_fields(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "torch_dtype": dtype}  # the second is what transformers before 4.56 reads


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def tokenizer_fields(system_instruction: str) -> dict[str, Any]:
    """The class is the one that takes tokenizer.json as it is; Gemma's own would build another from its parts."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add one that Gemma refuses
        "chat_template": chat_template(system_instruction),
    }


def generation_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """Greedy, and over where our sampler ends an answer."""
    stop = [tokenizer.end_of_turn_id, tokenizer.eos_id]
    return special_ids(tokenizer) | {"eos_token_id": stop, "do_sample": False}
