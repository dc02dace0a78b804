"""Tiny Gemmas of each generation by transformers, with what they compute: the reference that our model is held to.

    python tests/model/make_goldens.py                        # needs torch and transformers; writes goldens/
    python tests/model/make_goldens.py --output DIR --seed 2

Each folder is as `hf download` leaves one (config.json, safetensors), and beside them golden.npz holds

    tokens, valid [B, T], logits [B, T, V]     left-padded texts, most of them longer than the sliding window
    continuations [B, 64]                      greedy, of the same texts as prompts
    trained_on [B, T]                          which of the same tokens the loss of one training step asks for
    after.NAME                                 every tensor of the text model after that step of gradient descent
    about                                      versions, seed, learning rate, loss, rounding, margins

The weights are drawn so that every feature counts: each that is switched off must change a logit by more than FELT.
"""

import argparse
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
)

LENGTHS = (5, 21, 40)
NEW_TOKENS = 64
LEARNING_RATE = 0.005
FELT = 1e-3  # smallest change of a logit, and smallest margin between the two likeliest tokens
ROUNDING = 2e-5
QUIET = 7  # a token with an embedding so small that the epsilon of the norm behind it counts

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
LATER = SIZES | {"sliding_window": 8, "query_pre_attn_scalar": 12}
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "image_size": 28, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip

Change = dict | Callable[[nn.Module], None]  # other fields of the configuration, or what is done to the model


class Tiny(NamedTuple):
    """A tiny model: how it is made of a text configuration, its sizes, how it is saved, its features switched off."""

    make: Callable[..., nn.Module]
    text: dict
    dtype: torch.dtype
    shard_size: str
    without: dict[str, Change]


def ropes(local: float = 10_000.0, far: float = 1_000_000.0, factor: float = 1.0) -> dict:
    """The positions of Gemma 3, in its layers of either kind."""
    scaling = {"rope_type": "linear", "factor": factor} if factor > 1 else {"rope_type": "default"}
    return {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
            "full_attention": {"rope_theta": far} | scaling,
        }
    }


def removed(*names: str) -> Callable[[nn.Module], None]:
    """Takes the norms of these names out of every layer."""

    def remove(model: nn.Module) -> None:
        for module in list(model.modules()):
            for name in names:
                if isinstance(getattr(module, name, None), nn.Module) and "vision" not in type(module).__name__.lower():
                    setattr(module, name, nn.Identity())

    return remove


def swapped(first: str, second: str) -> Callable[[nn.Module], None]:
    """Puts two modules of every layer into each other's place."""

    def swap(model: nn.Module) -> None:
        for module in model.modules():
            if hasattr(module, first) and hasattr(module, second):
                one, other = getattr(module, first), getattr(module, second)
                setattr(module, first, other)
                setattr(module, second, one)

    return swap


def nested(**text: object) -> nn.Module:
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text), vision_config=VISION, mm_tokens_per_image=1, image_token_index=63,
        boi_token_index=62, eoi_token_index=61, attn_implementation="eager",
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


NORMAL: dict[str, Change] = {
    "the epsilon of the norm": {"rms_norm_eps": 1e-5},
    "the norm before attention": removed("input_layernorm"),
}
NORMAL_LATER = NORMAL | {
    "the tanh in gelu": {"hidden_activation": "gelu"},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 8},
    "the window": {"sliding_window": 1000},
    "one token of the window": {"sliding_window": 7},
    "the norm after attention": removed("post_attention_layernorm"),
    "the norm before feed-forward": removed("pre_feedforward_layernorm"),
    "the norm after feed-forward": removed("post_feedforward_layernorm"),
    "the order of these two": swapped("post_attention_layernorm", "pre_feedforward_layernorm"),
}
NORMAL_3 = NORMAL_LATER | {
    "the norms of queries and keys": removed("q_norm", "k_norm"),
    "the cap on logits that is not there": {"final_logit_softcapping": 30.0},
}

MODELS = {
    "gemma1": Tiny(
        lambda **text: GemmaForCausalLM(GemmaConfig(**text, attn_implementation="eager")),
        SIZES | {"num_hidden_layers": 2},
        torch.float32,
        "1GB",
        NORMAL
        | {
            "the tanh in gelu": {"hidden_act": "gelu_python"},
            "the rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
            "the norm before feed-forward": removed("post_attention_layernorm"),
        },
    ),
    "gemma2": Tiny(
        lambda **text: Gemma2ForCausalLM(Gemma2Config(**text, attn_implementation="eager")),
        LATER | {"num_hidden_layers": 4},
        torch.float32,
        "30KB",
        NORMAL_LATER
        | {
            "the rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
            "the cap on scores": {"attn_logit_softcapping": None},
            "the cap on logits": {"final_logit_softcapping": None},
        },
    ),
    "gemma3": Tiny(
        lambda **text: Gemma3ForCausalLM(Gemma3TextConfig(**text, attn_implementation="eager")),
        LATER | {"num_hidden_layers": 7} | ropes(),
        torch.float32,
        "1GB",
        NORMAL_3 | {"the local base": ropes(local=20_000.0), "the global base": ropes(far=10_000.0)},
    ),
    "gemma3_nested": Tiny(
        nested,
        LATER | {"num_hidden_layers": 6} | ropes(factor=8.0),
        torch.bfloat16,
        "1GB",
        NORMAL_LATER
        | {"the global base": ropes(far=10_000.0, factor=8.0), "the factor of the positions": ropes(factor=1.0)},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "goldens")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    for name, tiny in MODELS.items():
        print(f"{name}: {json.dumps(make_golden(tiny, asked.output / name, asked.seed))}", flush=True)


def make_golden(tiny: Tiny, folder: Path, seed: int) -> dict:
    """Write one folder, of the first seed from `seed` on that is telling; returns what `about` says in it."""
    while (drawn := draw(tiny, seed)) is None:
        seed += 1
    model, tokens, valid, continuations, quality = drawn
    logits = logits_of(model, tokens, valid)
    changes = {
        name: change_of(logits, switched(tiny, model, change), tokens, valid) for name, change in tiny.without.items()
    }
    assert min(changes.values()) > FELT, f"{folder.name}: not felt: {changes}"
    assert generated(model, tokens, valid) == continuations.tolist(), "generate() goes another way than the naive loop"
    save(tiny, model, folder)
    trained_on = valid & (np.cumsum(valid, axis=1) > 3)
    loss = descend(model, tokens, valid, trained_on)
    about = {
        "torch": torch.__version__, "transformers": transformers.__version__, "seed": seed,
        "learning_rate": LEARNING_RATE, "loss": loss, "changes": changes,
    } | quality  # fmt: skip
    np.savez_compressed(
        folder / "golden.npz", tokens=tokens, valid=valid, logits=logits, continuations=continuations,
        trained_on=trained_on, about=json.dumps(about), **after(model),
    )  # fmt: skip
    return about


def draw(tiny: Tiny, seed: int) -> tuple | None:
    """Model, tokens, valid, continuations and how good they are; None where they would make a poor reference.

    That is where rounding moves a logit by a good part of what we may differ by, where two tokens are as good as
    equally likely, and where the texts go on with the same few tokens for ever.
    """
    model = tiny.make(**tiny.text).eval()
    draw_weights(model, seed, tiny.dtype)
    tokens, valid = draw_texts(seed)
    if (rounding := rounding_of(model, tokens, valid)) > ROUNDING:
        return None
    continuations, margin = greedy(model, tokens, valid)
    different = sorted(len(set(row)) for row in continuations.tolist())
    if margin < FELT or different[1] < 5:
        return None
    return model, tokens, valid, continuations, {"rounding": rounding, "smallest_margin": margin, "tokens": different}


def rounding_of(model: nn.Module, tokens: np.ndarray, valid: np.ndarray) -> float:
    """How far logits in float32 are from those in float64, text by text."""
    exact = copy.deepcopy(model).double()
    texts = [(tokens[row : row + 1, own], valid[row : row + 1, own]) for row, own in enumerate(valid)]
    return max(float(np.abs(logits_of(model, *text) - logits_of(exact, *text)).max()) for text in texts)


def draw_weights(model: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Loud enough that scores and logits reach the bend of the caps, and rounded to what is saved.

    What the layers add outweighs the embedding that they add it to: else each token would be followed by itself.
    """
    source = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() == 1 or "embed_tokens" in name else 0.4
        centre = 1.5 if name.endswith((".norm.weight", "post_feedforward_layernorm.weight")) else 0.0
        drawn = source.normal(centre, spread, tuple(parameter.shape))
        if "embed_tokens" in name:
            drawn[QUIET] *= 0.02
        parameter.data = torch.tensor(drawn, dtype=torch.float32).to(dtype).float()
    model.tie_weights()


def draw_texts(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and valid, [B, T], padded on the left."""
    source, width = np.random.default_rng([seed, 1]), max(LENGTHS)
    tokens, valid = np.zeros((len(LENGTHS), width), np.int32), np.zeros((len(LENGTHS), width), bool)
    for row, length in enumerate(LENGTHS):
        tokens[row, width - length :] = source.integers(8, 60, length)
        tokens[row, width - length + 1] = QUIET
        valid[row, width - length :] = True
    return tokens, valid


def forward(model: nn.Module, tokens: np.ndarray, valid: np.ndarray) -> torch.Tensor:
    places = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    answer = model(
        input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(valid).long(),
        position_ids=torch.tensor(places).long(), use_cache=False,
    )  # fmt: skip
    return answer.logits


@torch.no_grad()
def logits_of(model: nn.Module, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return forward(model, tokens, valid).numpy()


def switched(tiny: Tiny, model: nn.Module, change: Change) -> nn.Module:
    """The same weights with one feature off."""
    if isinstance(change, dict):
        other = tiny.make(**(tiny.text | change)).eval()
        other.load_state_dict(model.state_dict())
        return other
    other = copy.deepcopy(model)
    change(other)
    return other


def change_of(logits: np.ndarray, other: nn.Module, tokens: np.ndarray, valid: np.ndarray) -> float:
    return float(np.abs(logits - logits_of(other, tokens, valid))[valid].max())


@torch.no_grad()
def greedy(model: nn.Module, tokens: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, float]:
    """Continuations [B, 64] by reading everything again for each token, and the smallest margin on the way."""
    given, margin = tokens.shape[1], np.inf
    ids, seen = tokens, valid
    for _ in range(NEW_TOKENS):
        best = forward(model, ids, seen)[:, -1].topk(2)
        margin = min(margin, float((best.values[:, 0] - best.values[:, 1]).min()))
        ids = np.concatenate([ids, best.indices[:, :1].numpy().astype(np.int32)], axis=1)
        seen = np.concatenate([seen, np.ones((len(seen), 1), bool)], axis=1)
    return ids[:, given:], margin


def generated(model: nn.Module, tokens: np.ndarray, valid: np.ndarray) -> list[list[int]]:
    """The same by transformers' own decoding, with its cache."""
    ids = model.generate(
        input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(valid).long(), do_sample=False,
        max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return ids[:, tokens.shape[1] :].tolist()


def descend(model: nn.Module, tokens: np.ndarray, valid: np.ndarray, trained_on: np.ndarray) -> float:
    """One step of gradient descent on the mean cross-entropy of the tokens that are trained on; returns the loss."""
    logits = forward(model, tokens, valid)[:, :-1]
    targets, wanted = torch.tensor(tokens[:, 1:]).long(), torch.tensor(trained_on[:, 1:])
    loss = nn.functional.cross_entropy(logits[wanted], targets[wanted])
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LEARNING_RATE * parameter.grad
    return loss.item()


def after(model: nn.Module) -> dict[str, np.ndarray]:
    """Every tensor of the text model, by its name behind `model.`."""
    text = model.model.language_model if hasattr(model.model, "language_model") else model.model
    return {f"after.model.{name}": parameter.detach().numpy() for name, parameter in text.named_parameters()}


def save(tiny: Tiny, model: nn.Module, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).to(tiny.dtype).save_pretrained(folder, max_shard_size=tiny.shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
