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

from lib.data.renderer import chat_template
from lib.data.tokenizer import Tokenizer
from lib.files import write_json
from lib.model.released_config import config_fields
from lib.model.released_weights import write_weights
from lib.model.weights import Model

DTYPES = ("float32", "bfloat16")


def write_released(folder: Path, model: Model, system_instruction: str = "", dtype: str = "") -> None:
    """Fill the folder; weights of `dtype`, or as they are. Raises RequestError where the shape is no released one's."""
    config = config_fields(model.config) | special_ids(model.tokenizer) | dtype_fields(dtype or weights_dtype(model))
    write_json(folder / "config.json", config)
    model.tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", tokenizer_fields(system_instruction))
    write_json(folder / "generation_config.json", generation_fields(model.tokenizer))
    write_weights(folder, model.config, model.params, dtype)


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
