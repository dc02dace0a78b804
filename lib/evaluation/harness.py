"""Our model under EleutherAI's lm-evaluation-harness: its tasks, its scorer, its figures, as a second opinion.

    import lm_eval
    model = harness_model(load_model(Path("runs/mine/checkpoint-final")))
    lm_eval.simple_evaluate(model, tasks=["gsm8k"], limit=20)
    lm_eval.simple_evaluate(model, tasks=[harness_task(Path("evalsets/eval_v1.jsonl"))])

A context stands in the user's turn of the chat template, as a question does in training, and what is generated or
scored in the model's. Decoding is greedy, or drawn as a task asks for. It needs requirements-harness.txt, in the same
environment.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.config import SamplingConfig
from lib.data.renderer import encode_prompt, render_prompt
from lib.errors import RequestError
from lib.evaluation.evalsets import load_eval_set
from lib.evaluation.scoring import score_item
from lib.model.gemma import in_dtype
from lib.model.sampler import generate, likelihoods
from lib.model.weights import Model
from lib.tasks import reasoning_gym

MAX_NEW_TOKENS = 256
FILTER = r"(?im)^[ \t]*answer:[ \t]*(.+?)[ \t.]*$"


def harness_model(
    model: Model, system_instruction: str = "", batch_size: int = 64, max_new_tokens: int = MAX_NEW_TOKENS
) -> Any:
    """The model as an `lm_eval.api.model.LM`; `max_new_tokens` holds where a task does not say."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise RequestError(
            "lm-evaluation-harness is not installed: python -m pip install -r requirements-harness.txt"
        ) from None
    params = in_dtype(model.params, model.dtype)

    def asked(context: str) -> list[int]:
        return encode_prompt(render_prompt(context, system_instruction), model.tokenizer)

    def scored(prompts: list[list[int]], texts: Sequence[str]) -> list[tuple[float, bool]]:
        continuations = [model.tokenizer.encode(text) for text in texts]
        return [tuple(found) for found in likelihoods(model.graph, params, prompts, continuations, batch_size)]

    class Retrace(LM):
        def generate_until(self, requests: list) -> list[str]:
            answers = [""] * len(requests)
            for key in sorted({str(request.args[1]) for request in requests}):
                places = [place for place, request in enumerate(requests) if str(request.args[1]) == key]
                prompts = [asked(requests[place].args[0]) for place in places]
                for place, text in zip(places, self._written(prompts, requests[places[0]].args[1]), strict=True):
                    answers[place] = text
            return answers

        def _written(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
            stops = (model.tokenizer.end_of_turn_id, model.tokenizer.eos_id)
            count = options.get("max_gen_toks", max_new_tokens)
            done = generate(model.graph, params, prompts, stops, count, batch_size, _sampling(options))
            until = options.get("until", [])
            return [
                _until(model.tokenizer.decode(one.tokens), [until] if isinstance(until, str) else until) for one in done
            ]

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            contexts, texts = zip(*(request.args for request in requests), strict=True)
            return scored([asked(context) for context in contexts], texts)

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            prompts = [[model.tokenizer.bos_id] for _ in requests]
            return [logprob for logprob, _ in scored(prompts, [request.args[0] for request in requests])]

    return Retrace()


def harness_task(eval_set: Path) -> dict[str, Any]:
    """One of our eval sets as a task of the harness, which finds the answer and compares it by its own means.

    Its exact match knows one expected answer, and none of the equalities that `lib.evaluation.scoring` states. Items of
    reasoning-gym, whose questions may have many answers, are judged by their verifier here, too.
    """
    items = {item.id: item for item in load_eval_set(eval_set).items}
    task = _exact_match(eval_set)
    if any(item.scorer != reasoning_gym.NAME for item in items.values()):
        return task
    return task | {
        "filter_list": [{"name": "verified", "filter": [{"function": "take_first"}]}],
        "process_results": lambda item, said: {
            "acc": score_item(items[item["id"]], said[0], truncated=False).value or 0
        },
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _exact_match(eval_set: Path) -> dict[str, Any]:
    return {
        "task": eval_set.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(eval_set)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{expected_answer}}",
        "generation_kwargs": {"until": [], "do_sample": False},
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": FILTER, "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
        ],
        "metadata": {"version": 1.0},
    }


def _sampling(options: dict[str, Any]) -> SamplingConfig:
    temperature = options.get("temperature", 0.0) if options.get("do_sample", False) else 0.0
    return SamplingConfig(temperature=temperature, top_k=options.get("top_k", 0), top_p=options.get("top_p", 1.0))


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]
