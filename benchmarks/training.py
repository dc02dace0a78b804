"""Training beside Tunix's PeftTrainer, TRL's SFTTrainer and a plain loop over transformers: useful tokens a second.

    python benchmarks/training.py --tunix PYTHON --torch PYTHON [--turns 5] [--steps 10]

All train the same model (see peers.py) with AdamW, in float32, 16 examples a step, on

    full      random tokens, every example 128 long
    ragged    traces of High Card Duel and of arithmetic, half and half: 96 to 157 tokens

Each is called as its users call it: Tunix with rows as long as the longest example, as it compiles one step; TRL and
the loop with rows as long as the longest of their batch, as their collators make them. Ours is there in its three
ways: `padded` does as Tunix does, `bucketed` and `packed` (rows of 256) as configured. Padding is not counted. Ours and
TRL train on the answers alone, as their users do; the others on all tokens, which is no other work for them. `peak` is
the share that a step's multiplications have of what the same process reaches in a product of two 2048 × 2048 matrices.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: `datasets` is Hugging Face's, too
from benchmarks import peers  # noqa: E402

ROWS, LENGTH, PACKED = 16, 128, 256
WAYS = ("padded", "bucketed", "packed")

Trainer = Callable[[int], tuple[int, float]]  # trains for so many steps; how many useful tokens it read, in seconds


def main(tunix: str, torch: str, turns: int, steps: int) -> None:
    pythons = {"ours": sys.executable, "tunix": tunix, "transformers": torch, "trl": torch}
    print(f"{peers.machine()}, {turns} turns of {steps} steps", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peers.write_model(folder, scale=0.02)
        write_works(folder)
        workers = {
            name: peers.Worker(__file__, name, python, folder, peers.ALLOCATOR)
            for name, python in pythons.items()
            if python
        }
        for work, ways in {"full": WAYS[:1], "ragged": WAYS}.items():
            compare(work, ways, workers, turns, steps)
        for worker in workers.values():
            worker.stop()


def compare(work: str, ways: tuple[str, ...], workers: dict[str, peers.Worker], turns: int, steps: int) -> None:
    asked = {f"ours, {way}": (workers["ours"], f"{work}-{way}") for way in ways}
    asked |= {name: (worker, work) for name, worker in workers.items() if name != "ours"}
    for worker, what in asked.values():
        worker.ask(f"{what} 25")  # compiles, in buckets several times
    speeds: dict[str, list[float]] = {name: [] for name in asked}
    peaks = []
    for turn in range(turns):
        peaks.append(workers["ours"].ask("matmul 0")["flops"])
        names = list(asked)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            worker, what = asked[name]
            done = worker.ask(f"{what} {steps}")
            speeds[name].append(done["tokens"] / done["seconds"])
    for name, own in speeds.items():
        figure = f"{median(own):,.0f} useful tokens/s"
        if work == "full":
            share = median(speed * flops_a_token() / peak for speed, peak in zip(own, peaks, strict=True))
            figure += f", {share:.0%} of the peak of {median(peaks) / 1e9:.0f} GFLOP/s"
        ratios = [f"{way} {peers.ratio(speeds[f'ours, {way}'], own)}" for way in ways if not name.startswith("ours")]
        peers.row(f"training, {work}", name, figure, "; ".join(ratios))


def flops_a_token() -> float:
    """Multiplications and additions that a trained token needs, forwards and backwards, at full length."""
    s = peers.SHAPE
    heads = s["num_heads"] * s["head_dim"]
    layer = s["embed_dim"] * (2 * heads + 2 * s["num_kv_heads"] * s["head_dim"] + 3 * s["hidden_dim"])
    weights = s["num_layers"] * layer + peers.VOCABULARY * s["embed_dim"]
    return 6 * weights + 12 * s["num_layers"] * LENGTH * heads


# ---- the work -------------------------------------------------------------------------------------------------


def write_works(folder: Path) -> None:
    """Two lists of examples: each is its tokens and from which place on they are trained on."""
    from lib.data.dataset import dataset_tokenizer
    from lib.data.renderer import encode_example, render_example
    from lib.tasks import arithmetic, high_card_duel

    source = random.Random(1)
    traces = [*high_card_duel.generate(200, seed=1), *arithmetic.generate(200, seed=1)]
    source.shuffle(traces)
    rendered = [render_example(trace) for trace in traces]
    tokenizer = dataset_tokenizer(rendered)
    encoded = [encode_example(example, tokenizer) for example in rendered]
    full = [([source.randrange(100, peers.VOCABULARY) for _ in range(LENGTH + 1)], 0) for _ in range(20 * ROWS)]
    ragged = [(example.tokens, example.loss_mask.index(True)) for example in encoded]
    (folder / "works.json").write_text(json.dumps({"full": full, "ragged": ragged}))


def work_on(name: str, folder: Path) -> None:
    works = json.loads((folder / "works.json").read_text())
    make = {"ours": ours, "tunix": tunix, "transformers": transformers, "trl": trl}[name](folder)
    trainers: dict[str, Trainer] = {}
    for line in sys.stdin:
        what, steps = line.split()
        if what == "matmul":
            print(json.dumps({"seconds": 0, "flops": matmul_peak()}), flush=True)
            continue
        if what not in trainers:
            trainers[what] = make(works[what.partition("-")[0]], what.partition("-")[2])
        tokens, seconds = trainers[what](int(steps))
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


def matmul_peak(size: int = 2048) -> float:
    """The most floating-point operations a second of twenty products."""
    import jax
    import jax.numpy as jnp

    product, matrix = jax.jit(jnp.matmul), jnp.ones((size, size), jnp.float32)
    product(matrix, matrix).block_until_ready()
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def timed(train: Callable[[int], int]) -> Trainer:
    def run(steps: int) -> tuple[int, float]:
        start = time.perf_counter()
        tokens = train(steps)
        return tokens, time.perf_counter() - start

    return run


def batches_of(examples: list[tuple[list[int], int]]) -> Iterator[list[list[int]]]:
    """Sixteen examples at a time, in another order each epoch, for ever; the inputs of each."""
    source, order = random.Random(2), list(range(len(examples)))
    while True:
        source.shuffle(order)
        for start in range(0, len(order) - ROWS + 1, ROWS):
            yield [examples[index][0][:-1] for index in order[start : start + ROWS]]


# ---- the processes --------------------------------------------------------------------------------------------


def ours(folder: Path) -> Callable[[list, str], Trainer]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lib.config import TrainingConfig
    from lib.data.batches import Batches
    from lib.data.renderer import EncodedExample
    from lib.training.optimizer import make_optimizer
    from lib.training.step import TrainState, make_train_step

    _, graph, weights = peers.our_model(folder)

    def make(examples: list[tuple[list[int], int]], way: str) -> Trainer:
        encoded = [
            EncodedExample(tokens, [place >= start for place in range(len(tokens))]) for tokens, start in examples
        ]
        rows = ROWS // 2 if way == "packed" else ROWS
        config = TrainingConfig(batching=way, per_device_batch_size=rows, num_steps=10_000)
        batches, (optimizer, _) = Batches(encoded, config, PACKED), make_optimizer(config)
        step = make_train_step(graph, optimizer)
        params = jax.tree.map(jnp.array, weights)  # a copy: the step uses its state up
        state = [TrainState(jnp.int32(0), params, optimizer.init(params))]
        done = [0]

        def run(steps: int) -> int:
            tokens, batch = 0, batches[done[0]]
            for _ in range(steps):
                state[0], metrics = step(state[0], {}, batch)
                tokens += int(np.count_nonzero(batch.segments))
                done[0] += 1
                batch = batches[done[0]]
                float(metrics.loss)
            return tokens

        return timed(run)

    return make


def tunix(folder: Path) -> Callable[[list, str], Trainer]:
    import numpy as np
    import optax
    from tunix.sft import utils
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

    def make(examples: list[tuple[list[int], int]], _: str) -> Trainer:
        trainer = PeftTrainer(peers.tunix_model(folder), optax.adamw(1e-5), TrainingConfig(eval_every_n_steps=10**9))
        trainer.is_managed_externally = True  # each call goes on where the one before ended
        trainer = trainer.with_gen_model_input_fn(
            lambda given: {
                "input_tokens": given.input_tokens,
                "input_mask": given.input_mask,
                "positions": utils.build_positions_from_mask(given.input_mask),
                "attention_mask": utils.make_causal_attn_mask(given.input_mask),
            }
        )
        longest, source = max(len(tokens) for tokens, _ in examples) - 1, batches_of(examples)

        def padded(rows: list[list[int]]) -> TrainingInput:
            tokens = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
            mask = np.array([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
            return TrainingInput(input_tokens=tokens, input_mask=mask)

        def run(steps: int) -> int:
            batches = [next(source) for _ in range(steps)]
            trainer.train([padded(rows) for rows in batches])
            return sum(len(row) for rows in batches for row in rows)

        return timed(run)

    return make


def transformers(folder: Path) -> Callable[[list, str], Trainer]:
    import torch

    def make(examples: list[tuple[list[int], int]], _: str) -> Trainer:
        model = peers.torch_model(folder).train()
        optimizer, source = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), batches_of(examples)

        def run(steps: int) -> int:
            useful = 0
            for _ in range(steps):
                rows = next(source)
                longest = max(map(len, rows))
                tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
                mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
                labels = tokens.masked_fill(mask == 0, -100)
                loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                loss.item()
                useful += sum(map(len, rows))
            return useful

        return timed(run)

    return make


def trl(folder: Path) -> Callable[[list, str], Trainer]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    words = {"<pad>": 0, "<eos>": 1} | {str(number): number for number in range(2, peers.VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )

    class Clock(TrainerCallback):
        """The moments when steps ended, and the tokens seen until then."""

        def __init__(self) -> None:
            self.ends: list[tuple[float, int]] = []

        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            self.ends.append((time.perf_counter(), int(state.num_input_tokens_seen)))

    def make(examples: list[tuple[list[int], int]], _: str) -> Trainer:
        rows = [
            {"input_ids": tokens[:-1], "completion_mask": [int(place >= begin) for place in range(len(tokens) - 1)]}
            for tokens, begin in examples
        ]
        data = Dataset.from_list(rows)

        def run(steps: int) -> tuple[int, float]:
            clock = Clock()
            with tempfile.TemporaryDirectory() as output:
                config = SFTConfig(
                    output_dir=output, max_steps=steps + 1, per_device_train_batch_size=ROWS, learning_rate=1e-5,
                    report_to="none", save_strategy="no", use_cpu=True, bf16=False, max_length=None,
                    include_num_input_tokens_seen="non_padding", disable_tqdm=True, gradient_checkpointing=False,
                )  # fmt: skip
                SFTTrainer(
                    peers.torch_model(folder), config, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
                ).train()
            (began, before), (ended, after) = clock.ends[0], clock.ends[-1]
            return after - before, ended - began

        return run

    return make


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work_on(sys.argv[2], Path(sys.argv[3]))
        sys.exit()
    parser = peers.arguments("Training beside Tunix's, TRL's and a loop over transformers.")
    parser.add_argument("--steps", type=int, default=10)
    main(**vars(parser.parse_args()))
