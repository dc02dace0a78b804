"""Generation beside Tunix's sampler and transformers' generate: new tokens a second, and whether the text is the same.

    python benchmarks/generation.py --tunix PYTHON --torch PYTHON [--turns 5]

A peer that is not named is left out. All read the model of peers.py, and answer the same prompts greedily, 16 a batch:

    full     16 prompts of 40 tokens, 64 new tokens each
    ragged   64 prompts of 8 to 40 tokens, an answer ends with any of 43 tokens, after 64 at the latest

Peers get the prompts in the order of their lengths, 16 rows to a call, and no padding beyond the longest prompt. The
text is compared with that of a naive decoder, which reads everything again for each token, prompt by prompt.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: `datasets` is Hugging Face's, too
from benchmarks import peers  # noqa: E402

ROWS, NEW, BOS, NEVER = 16, 64, 2, -1
CHECKED = 16  # prompts of each work that the naive decoder answers, too

Answers = list[list[int]]
Decoder = Callable[[list[list[int]], list[int]], Answers]


def main(tunix: str, torch: str, turns: int) -> None:
    pythons = {"ours": sys.executable, "tunix": tunix, "transformers": torch}
    print(f"{peers.machine()}, {turns} turns", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peers.write_model(folder)
        works = write_works(folder)
        workers = {
            name: peers.Worker(__file__, name, python, folder, peers.ALLOCATOR)
            for name, python in pythons.items()
            if python
        }
        for work in works:
            compare(work, workers, turns)
        for worker in workers.values():
            worker.stop()


def compare(work: str, workers: dict[str, peers.Worker], turns: int) -> None:
    first = {name: worker.ask(work)["answers"] for name, worker in workers.items()}  # compiles
    naive = workers["ours"].ask(f"naive {work}")["answers"]
    found = peers.in_turn(workers, work, turns)
    speeds = {
        name: [sum(map(len, done["answers"])) / done["seconds"] for done in answered]
        for name, answered in found.items()
    }
    for name, own in speeds.items():
        assert all(done["answers"] == first[name] for done in found[name]), f"{name} answers otherwise another time"
        same = sum(answer == other for answer, other in zip(first[name], naive, strict=False))
        figure = f"{median(own):,.0f} new tokens/s; text of the naive decoder in {same} of {len(naive)}"
        peers.row(f"generation, {work}", name, figure, "" if name == "ours" else peers.ratio(speeds["ours"], own))


# ---- the work -------------------------------------------------------------------------------------------------


def write_works(folder: Path) -> list[str]:
    source = random.Random(1)

    def prompts(lengths: list[int]) -> list[list[int]]:
        return [[BOS, *(source.randrange(100, peers.VOCABULARY) for _ in range(length - 1))] for length in lengths]

    ends = source.sample(range(100, peers.VOCABULARY), 43)
    works = {
        "full": {"prompts": prompts([40] * ROWS), "ends": [NEVER]},
        "ragged": {"prompts": prompts([source.randrange(8, 41) for _ in range(4 * ROWS)]), "ends": ends},
    }
    (folder / "works.json").write_text(json.dumps(works))
    return list(works)


# ---- the processes --------------------------------------------------------------------------------------------


def work_on(name: str, folder: Path) -> None:
    works = json.loads((folder / "works.json").read_text())
    decoders = {"ours": ours, "tunix": by_length(tunix), "transformers": by_length(transformers)}
    decode = decoders[name](folder)
    for line in sys.stdin:
        *naively, work = line.split()
        prompts, ends = works[work]["prompts"], works[work]["ends"]
        start = time.perf_counter()
        answers = naive(folder)(prompts[:CHECKED], ends) if naively else decode(prompts, ends)
        print(json.dumps({"seconds": time.perf_counter() - start, "answers": answers}), flush=True)


def ours(folder: Path) -> Decoder:
    from lib.model.sampler import generate

    _, graph, params = peers.our_model(folder)

    def decode(prompts: list[list[int]], ends: list[int]) -> Answers:
        return [answer.tokens for answer in generate(graph, params, prompts, tuple(ends), NEW, ROWS)]

    return decode


def naive(folder: Path) -> Decoder:
    """Reads everything again for each token, one prompt after the other."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from lib.model.gemma import causal_mask, positions

    _, graph, params = peers.our_model(folder)

    @jax.jit
    def likeliest(tokens: jax.Array, length: jax.Array) -> jax.Array:
        model, valid = nnx.merge(graph, params), (jnp.arange(len(tokens)) < length)[None]
        hidden, _ = model(tokens[None], positions(valid), causal_mask(valid))
        return jnp.argmax(model.logits(hidden[0, length - 1]))

    def decode(prompts: list[list[int]], ends: list[int]) -> Answers:
        answers = []
        for prompt in prompts:
            tokens = np.zeros(max(map(len, prompts)) + NEW, np.int32)
            tokens[: len(prompt)] = prompt
            length = len(prompt)
            while length < len(prompt) + NEW and (token := int(likeliest(tokens, length))) not in ends:
                tokens[length], length = token, length + 1
            answers.append(tokens[len(prompt) : length].tolist())
        return answers

    return decode


def by_length(peer: Callable[[Path], Decoder]) -> Callable[[Path], Decoder]:
    """Prompts of about one length together, as many as there are rows: a batch waits for its longest."""

    def prepared(folder: Path) -> Decoder:
        batch_of = peer(folder)

        def decode(prompts: list[list[int]], ends: list[int]) -> Answers:
            order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
            answers: Answers = [[]] * len(prompts)
            for start in range(0, len(order), ROWS):
                chosen = order[start : start + ROWS]
                for index, answer in zip(chosen, batch_of([prompts[i] for i in chosen], ends), strict=True):
                    end = next((place for place, token in enumerate(answer) if token in ends), None)
                    answers[index] = answer[:end]
            return answers

        return decode

    return prepared


def tunix(folder: Path) -> Decoder:
    from tunix.generate.sampler import CacheConfig, Sampler

    class Numbers:
        """A tokenizer whose text is numbers; the sampler puts <bos> in front."""

        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, tokens: list[int]) -> str:
            return " ".join(map(str, tokens))

        def bos_id(self) -> int:
            return BOS

        def eos_id(self) -> int:
            return NEVER

        def pad_id(self) -> int:
            return 0

    model, shape = peers.tunix_model(folder), peers.SHAPE

    def decode(prompts: list[list[int]], ends: list[int]) -> Answers:
        longest = max(map(len, prompts))
        cache = CacheConfig(longest + NEW, shape["num_layers"], shape["num_kv_heads"], shape["head_dim"])
        if cache not in samplers:
            samplers[cache] = Sampler(model, Numbers(), cache)
        texts = [" ".join(map(str, prompt[1:])) for prompt in prompts]
        found = samplers[cache](texts, NEW, max_prompt_length=longest, eos_tokens=ends)
        return [tokens.tolist() for tokens in found.tokens]

    samplers: dict[CacheConfig, Sampler] = {}
    return decode


def transformers(folder: Path) -> Decoder:
    import torch

    model = peers.torch_model(folder).eval()

    def decode(prompts: list[list[int]], ends: list[int]) -> Answers:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        with torch.inference_mode():
            found = model.generate(
                tokens, attention_mask=(tokens > 0).long(), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                eos_token_id=None if ends == [NEVER] else ends,
            )  # fmt: skip
        return found[:, longest:].tolist()

    model.generation_config.eos_token_id = None
    return decode


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work_on(sys.argv[2], Path(sys.argv[3]))
        sys.exit()
    main(**vars(peers.arguments("Generation beside Tunix's and transformers'.").parse_args()))
