"""A model answers an eval set: one trace a completion, with the raw text and its score beside it.

    results = answer_eval_set(model, eval_set, config.evaluation, label="tiny (base)")
    write_results(run / "eval_before.jsonl", results)

The same weights, configuration and seed give the same text; the output imports back as traces. Where the configuration
asks for several samples, an item has as many lines, and `meta.sample` counts them from 0.

The control is the same items answered again, in reverse and in batches of another size, of which no answer may know.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lib.config import EvaluationConfig
from lib.data.renderer import encode_prompt, render_prompt
from lib.evaluation.evalsets import EvalItem, EvalSet
from lib.evaluation.scoring import reasoning_steps, score_item
from lib.files import atomic_write
from lib.model.gemma import in_dtype
from lib.model.processes import explained
from lib.model.sampler import Completion, generate
from lib.model.weights import Model
from lib.progress import progress
from lib.trace import TRACE_VERSION

NO_ANSWER = "(no answer)"
NO_TEXT = "(nothing)"
STEP_CHARACTERS = 20_000


def answer_eval_set(
    model: Model, eval_set: EvalSet, config: EvaluationConfig, label: str, system_instruction: str = ""
) -> list[dict[str, Any]]:
    """The evaluation output of the first `config.limit` items, in their order; `label` says whose answers they are."""
    return _answers(model, eval_set, eval_set.items[: config.limit], config, label, system_instruction)


def answer_control(
    model: Model, eval_set: EvalSet, config: EvaluationConfig, label: str, system_instruction: str = ""
) -> list[dict[str, Any]]:
    """The first `config.control_limit` of these items, in their order, asked in reverse and in other batches."""
    items = eval_set.items[: config.limit][: config.control_limit]
    other = replace(config, batch_size=config.batch_size // 2 or 2)
    asked: dict[str, list[EvalItem]] = {}  # together where one prompt is asked twice: its answers are drawn in turn
    for item in items:
        asked.setdefault(item.prompt, []).append(item)
    reverse = [item for prompt in reversed(asked) for item in asked[prompt]]
    records = _answers(model, eval_set, reverse, other, label, system_instruction)
    places = {item.id: place for place, item in enumerate(items)}
    return sorted(records, key=lambda record: places[record["meta"]["eval_id"]])


def _answers(
    model: Model,
    eval_set: EvalSet,
    items: Sequence[EvalItem],
    config: EvaluationConfig,
    label: str,
    system_instruction: str,
) -> list[dict[str, Any]]:
    asked = [(item, sample) for item in items for sample in range(config.sampling.samples)]
    completions = _complete(model, [item for item, _ in asked], config, system_instruction)
    about = {
        "source": "evaluation",
        "model": label,
        "weights_sha256": model.weights_sha256,
        "eval_set": eval_set.name,
        "eval_set_sha256": eval_set.sha256,
        "decoding": {
            "max_new_tokens": config.max_new_tokens, "system_instruction": system_instruction,
            **asdict(config.sampling),
        },
        **({"tuned_from": model.tuned_from} if model.tuned_from else {}),
    }  # fmt: skip
    return [
        _record(
            item,
            model.tokenizer.decode(completion.tokens).replace("\0", "\N{REPLACEMENT CHARACTER}"),
            completion,
            about | {"sample": sample},
        )
        for (item, sample), completion in zip(asked, completions, strict=True)
    ]


def write_results(path: Path, records: list[dict[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _complete(
    model: Model, items: Sequence[EvalItem], config: EvaluationConfig, system_instruction: str
) -> list[Completion]:
    prompts = [encode_prompt(render_prompt(item.prompt, system_instruction), model.tokenizer) for item in items]
    with progress(len(items), "answering", "items") as bar, explained("answering", "halve evaluation.batch_size"):
        return generate(
            model.graph, in_dtype(model.params, model.dtype), prompts,
            (model.tokenizer.end_of_turn_id, model.tokenizer.eos_id), config.max_new_tokens, config.batch_size,
            config.sampling, on_done=bar.update,
        )  # fmt: skip


def _record(item: EvalItem, text: str, completion: Completion, about: dict[str, Any]) -> dict[str, Any]:
    """A trace of what the model said; where the completion has no steps or no answer, the trace says that."""
    scored = score_item(item, text, completion.truncated)
    steps = [("step", step) for step in reasoning_steps(text)] or [("completion", text or NO_TEXT)]
    meta = about | {"eval_id": item.id, "category": item.category, "expected_answer": item.expected_answer}
    meta |= {name: value for name in ("scorer", "tolerance") if (value := getattr(item, name))}
    if item.task:
        meta |= {"task": item.task, "state": item.state}
    if item.group:
        meta["group"] = item.group
    if scored.verdict == "unscored" and scored.answer is not None:
        meta["unscored"] = scored.explanation
    return {
        "trace_version": TRACE_VERSION,
        "prompt": item.prompt,
        "steps": [{"i": i, "type": kind, "content": step[:STEP_CHARACTERS]} for i, (kind, step) in enumerate(steps)],
        "final_answer": scored.answer or NO_ANSWER,
        "meta": meta,
        "completion": text,
        "score": scored.value,
        "verdict": scored.verdict,
        "num_tokens": len(completion.tokens),
        "logprob": completion.logprob,
    }
