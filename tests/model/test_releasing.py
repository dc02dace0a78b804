"""A model as a folder for Hugging Face: it is ours again where we read it, and the same model where transformers does.

What transformers makes of it is computed by load_exported.py, in the tests marked `parity`, by the interpreter that
RETRACE_PARITY_PYTHON names.
"""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from lib.config import PROJECTIONS, LoraConfig
from lib.data.renderer import chat_template, encode_prompt, render_prompt
from lib.data.tokenizer import Tokenizer
from lib.model import released_weights
from lib.model.gemma import GENERATIONS, Gemma, GemmaConfig, causal_mask, positions
from lib.model.lora import join, split
from lib.model.released_config import read_config
from lib.model.released_weights import read_weights
from lib.model.releasing import write_adapters, write_released
from lib.model.sampler import Completion, generate
from lib.model.storage import tree_digest
from lib.model.weights import Model, abstract, base_model, with_lora

LATER = {"sliding_window": 8, "query_pre_attn_scalar": 12}
SHAPES = {
    "gemma": {"num_layers": 2},
    "gemma2": {"num_layers": 4} | LATER | GENERATIONS[2],
    "gemma3_text": {"num_layers": 7} | LATER | GENERATIONS[3],
    "gemma3_text, its positions divided": {"num_layers": 7, "rope_scale": 8.0} | LATER | GENERATIONS[3],
}
INSTRUCTION = 'Say "why",\nthen \\n {{ what }}. 😀'
CHATS = [
    [{"role": "user", "content": "2 + 3? "}],
    [{"role": "user", "content": "  You hold the queen of spades, value 12; \n\nnaïve 'quotes' {{ x }} 😀\u2028"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "who wins? " * 8}],
]


@pytest.fixture(scope="module", params=SHAPES)
def toy(request: pytest.FixtureRequest, two_layer_model: Model) -> Model:
    return drawn(replace(two_layer_model.config, **SHAPES[request.param]), two_layer_model.tokenizer)


def drawn(config: GemmaConfig, tokenizer: Tokenizer) -> Model:
    """Weights loud enough that the layers outweigh the embedding: else each token would be followed by itself."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma(config, nnx.Rngs(0))))
    source = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        behind = "feed_forward_post_norm" in jax.tree_util.keystr(path)
        return jnp.asarray(source.normal(2.0 if behind else 0.0, 0.35, leaf.shape), leaf.dtype)

    return Model("toy", config, graph, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state)), tokenizer)


def written(folder: Path, model: Model, **options: str) -> Path:
    folder.mkdir()
    write_released(folder, model, **options)
    return folder


def fields(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_bytes())


def test_a_folder_that_is_written_loads_as_the_same_model(toy: Model, tmp_path: Path):
    folder = written(tmp_path / "exported", toy)
    found = base_model(str(folder), seed=0, tokenizer_file=Path("none"))
    assert (found.config, found.graph, found.weights_sha256) == (toy.config, toy.graph, toy.weights_sha256)
    assert found.tokenizer.to_json() == toy.tokenizer.to_json()
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_an_answer_ends_where_ours_does_and_the_template_has_the_instruction(two_layer_model: Model, tmp_path: Path):
    folder, tokenizer = (
        written(tmp_path / "a", two_layer_model, system_instruction="Be brief."),
        two_layer_model.tokenizer,
    )
    generation = fields(folder, "generation_config.json")
    assert generation["eos_token_id"] == [tokenizer.end_of_turn_id, tokenizer.eos_id]
    about = fields(folder, "tokenizer_config.json")
    assert about["chat_template"] == chat_template("Be brief.")
    ids = fields(folder, "config.json")
    for name in ("bos", "eos", "pad"):
        assert tokenizer.encode(about[f"{name}_token"]) == [ids[f"{name}_token_id"]]


def test_the_dtype_is_stated_as_it_is_written(two_layer_model: Model, tmp_path: Path):
    for dtype, stated in (("", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        folder = written(tmp_path / f"as {dtype}", two_layer_model, dtype=dtype)
        about = fields(folder, "config.json")
        assert about["dtype"] == about["torch_dtype"] == stated
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), two_layer_model.params)
    found = fields(written(tmp_path / "half", two_layer_model._replace(params=halves)), "config.json")
    assert found["dtype"] == "bfloat16"


# ---- beside transformers --------------------------------------------------------------------------------------

LOGITS_CLOSE = 1e-4
NEW_TOKENS = 64


def in_transformers(folder: Path, chats: list, python: str, scratch: Path) -> dict[str, np.ndarray]:
    """What load_exported.py finds in the folder."""
    (scratch / "chats.json").write_text(json.dumps(chats))
    program = Path(__file__).parent / "load_exported.py"
    command = [python, str(program), str(folder), str(scratch / "chats.json"), str(scratch / "found.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(scratch / "found.npz") as file:
        return dict(file)


def prompts(model: Model, instruction: str) -> list[list[int]]:
    """The chats as we ask them, one question each, with the instruction where they have none of their own."""
    found = []
    for *system, question in CHATS:
        said = system[0]["content"] if system else instruction
        found.append(encode_prompt(render_prompt(question["content"], said), model.tokenizer))
    return found


def logits(model: Model, tokens: list[int]) -> np.ndarray:
    """[T, V]"""
    valid = jnp.ones((1, len(tokens)), bool)
    graph = nnx.merge(model.graph, model.params)
    hidden, _ = graph(jnp.asarray([tokens]), positions(valid), causal_mask(valid))
    return np.asarray(graph.logits(hidden))[0]


def answers(model: Model, asked: list[list[int]]) -> list[Completion]:
    stop = (model.tokenizer.end_of_turn_id, model.tokenizer.eos_id)
    return generate(model.graph, model.params, asked, stop, NEW_TOKENS, batch_size=1)


def until_stop(tokens: list[int], model: Model) -> list[int]:
    stop = (model.tokenizer.end_of_turn_id, model.tokenizer.eos_id)
    return tokens[:-1] if tokens[-1] in stop else tokens


def check(model: Model, folder: Path, instruction: str, python: str, scratch: Path) -> list[Completion]:
    """Token ids, logits and greedy answers of our model and of the folder in transformers are the same."""
    found, asked = in_transformers(folder, CHATS, python, scratch), prompts(model, instruction)
    differences = []
    for number, tokens in enumerate(asked):
        assert found[f"ids_{number}"].tolist() == tokens and tokens.count(model.tokenizer.bos_id) == 1
        differences.append(float(np.abs(found[f"logits_{number}"] - logits(model, tokens)).max()))
    ours = answers(model, asked)
    theirs = [until_stop(found[f"answer_{number}"].tolist(), model) for number in range(len(asked))]
    lengths = [len(answer.tokens) for answer in ours]
    print(f"{found['about']}: largest difference of a logit {max(differences):.1e}; answers of {lengths} tokens")
    assert max(differences) <= LOGITS_CLOSE
    assert theirs == [answer.tokens for answer in ours]
    assert [str(found[f"text_{n}"]) for n in range(len(ours))] == [model.tokenizer.decode(own.tokens) for own in ours]
    return ours


@pytest.mark.parity
def test_transformers_loads_the_same_model_tokens_and_answers(toy: Model, parity_python: str, tmp_path: Path):
    folder = written(tmp_path / "exported", toy, system_instruction=INSTRUCTION)
    found = check(toy, folder, INSTRUCTION, parity_python, tmp_path)
    assert all(len(set(answer.tokens)) > 5 for answer in found)


@pytest.mark.parity
@pytest.mark.parametrize("toy", ["gemma2"], indirect=True)
def test_shards_of_bfloat16_load_as_what_they_were_rounded_to(
    toy: Model, parity_python: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(released_weights, "SHARD_BYTES", 10_000)
    folder = written(tmp_path / "exported", toy, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), toy.params)
    assert len(list(folder.glob("*.safetensors"))) > 2 and tree_digest(rounded) != toy.weights_sha256
    check(toy._replace(params=rounded), folder, "", parity_python, tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("toy", ["gemma3_text"], indirect=True)
def test_an_answer_ends_at_the_end_of_a_turn(toy: Model, parity_python: str, tmp_path: Path):
    """The end of a turn is made more likely than a token that is written, by an embedding that is louder than its."""
    tokens = [token for answer in answers(toy, prompts(toy, "")) for token in answer.tokens]
    for token in sorted(set(tokens), key=tokens.count):
        louder = toy.params["embedding"].at[toy.tokenizer.end_of_turn_id].set(1.1 * toy.params["embedding"][token])
        model = toy._replace(params=toy.params | {"embedding": louder})
        if any(0 < len(answer.tokens) < NEW_TOKENS for answer in answers(model, prompts(model, ""))):
            break
    found = check(model, written(tmp_path / "exported", model), "", parity_python, tmp_path)
    assert not all(answer.truncated for answer in found)


@pytest.mark.parity
def test_a_released_tokenizer_that_adds_bos_by_itself_adds_no_second_one(
    two_layer_model: Model, parity_python: str, tmp_path: Path
):
    backend = Backend.from_str(two_layer_model.tokenizer.to_json())
    backend.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", two_layer_model.tokenizer.bos_id)]
    )
    model = drawn(two_layer_model.config, Tokenizer(backend, "with a post-processor"))
    check(model, written(tmp_path / "exported", model), "", parity_python, tmp_path)


# ---- adapters -----------------------------------------------------------------------------------------------

IN_PEFT = """
import sys
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapters, tokens, found = sys.argv[1:]
tokens = torch.tensor(np.load(tokens)[None])
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager").eval()
with torch.no_grad():
    before = model(tokens).logits[0].numpy()
    model = PeftModel.from_pretrained(model, adapters).eval()
    np.savez(found, before=before, after=model(tokens).logits[0].numpy())
"""


@pytest.fixture
def adapted(toy: Model) -> Model:
    return with_moved_adapters(toy)


@pytest.fixture
def nested(two_layer_model: Model) -> Model:
    """The text part of a model that reads pictures, too."""
    folder = Path(__file__).parent / "goldens" / "gemma3_nested"
    config = read_config(folder)
    graph, shapes = abstract(config)
    return Model(str(folder), config, graph, read_weights(folder, config, shapes), two_layer_model.tokenizer)


def with_moved_adapters(toy: Model) -> Model:
    """The toy with adapters as after some training."""
    lora, source = LoraConfig(rank=3, alpha=6.0, projections=list(PROJECTIONS)), np.random.default_rng(2)
    model = with_lora(toy, lora, seed=7)
    base, adapters = split(model.params)
    moved = jax.tree.map(lambda leaf: jnp.float32(source.normal(0, 0.2, leaf.shape)), adapters)
    return model._replace(params=join(base, moved))


def test_adapters_are_written_by_the_names_and_in_the_layout_of_peft(adapted: Model, tmp_path: Path):
    write_adapters(tmp_path, adapted)
    found, own = load_file(tmp_path / "adapter_model.safetensors"), adapted.params["layers"][1]
    prefix, query = "base_model.model.model.layers.1", own["attention"]["adapters"]["query"]
    N, H, D = own["attention"]["query"].shape
    assert np.array_equal(found[f"{prefix}.self_attn.q_proj.lora_A.weight"], query["a"])
    assert np.array_equal(found[f"{prefix}.self_attn.q_proj.lora_B.weight"], query["b"].reshape(N * H, 3))
    output = own["attention"]["adapters"]["output"]
    assert np.array_equal(found[f"{prefix}.self_attn.o_proj.lora_A.weight"], output["a"].reshape(3, N * H))
    assert found[f"{prefix}.mlp.down_proj.lora_B.weight"].shape == (D, 3)
    assert len(found) == 2 * 7 * adapted.config.num_layers
    fields = json.loads((tmp_path / "adapter_config.json").read_bytes())
    assert fields["r"] == 3 and fields["lora_alpha"] == 6.0
    assert fields["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_adapters_of_a_nested_base_are_for_its_text_part_alone(nested: Model, tmp_path: Path):
    write_adapters(tmp_path, with_moved_adapters(nested), nested=True)
    found = load_file(tmp_path / "adapter_model.safetensors")
    pattern = json.loads((tmp_path / "adapter_config.json").read_bytes())["target_modules"]
    modules = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in found}
    assert "model.language_model.layers.1.self_attn.q_proj" in modules and len(modules) == 7 * nested.config.num_layers
    assert all(re.fullmatch(pattern, module) for module in modules)
    assert not re.fullmatch(pattern, "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert not re.fullmatch(pattern, "model.language_model.layers.1.self_attn.q_norm")


@pytest.mark.parity
def test_peft_computes_with_the_adapters_what_we_do(toy: Model, adapted: Model, parity_python: str, tmp_path: Path):
    (tmp_path / "adapters").mkdir()
    write_adapters(tmp_path / "adapters", adapted)
    check_in_peft(adapted, written(tmp_path / "base", toy), prompts(toy, "")[0], parity_python, tmp_path)


@pytest.mark.parity
def test_peft_finds_the_text_part_of_a_nested_base(nested: Model, parity_python: str, tmp_path: Path):
    adapted = with_moved_adapters(nested)
    (tmp_path / "adapters").mkdir()
    write_adapters(tmp_path / "adapters", adapted, nested=True)
    check_in_peft(adapted, Path(nested.name), list(range(3, 60)), parity_python, tmp_path)


def check_in_peft(adapted: Model, base: Path, tokens: list[int], parity_python: str, tmp_path: Path) -> None:
    """With the adapters in the folder `adapters` peft computes what we do, and something else than the base."""
    np.save(tmp_path / "tokens.npy", tokens)
    words = [base, tmp_path / "adapters", tmp_path / "tokens.npy", tmp_path / "found.npz"]
    done = subprocess.run([parity_python, "-c", IN_PEFT, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as found:
        apart = np.abs(found["after"] - logits(adapted, tokens)).max()
        moved = np.abs(found["after"] - found["before"]).max()
    print(f"with adapters: largest difference of a logit {apart:.1e}; they move one by {moved:.1f}")
    assert apart <= 1e-4 and moved > 0.1
