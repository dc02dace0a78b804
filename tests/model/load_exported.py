"""What transformers makes of a folder that we wrote, as an array file: run by the interpreter of the parity tests.

    python tests/model/load_exported.py FOLDER CHATS.json OUT.npz

CHATS.json holds a list of chats, each a list of messages. OUT.npz holds of chat N ids_N (its prompt, by the chat
template), logits_N [T, V] of that prompt and answer_N (64 tokens at most, greedy, as `generate` ends them), and about:
versions, classes and the dtype that the folder has.
"""

import json
import sys

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, chats: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    about = {"dtype": str(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    about |= {"transformers": transformers.__version__, "model": type(model).__name__}
    about |= {"tokenizer": type(tokenizer).__name__}
    found = {"about": json.dumps(about)}
    for number, chat in enumerate(json.load(open(chats))):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = prompt["input_ids"]
        with torch.no_grad():
            found[f"logits_{number}"] = model(**prompt, use_cache=False).logits[0].numpy()
            written = model.generate(**prompt, max_new_tokens=64)[0, ids.shape[1] :]
        found[f"ids_{number}"], found[f"answer_{number}"] = ids[0].numpy(), written.numpy()
        found[f"text_{number}"] = tokenizer.decode(written, skip_special_tokens=True)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
