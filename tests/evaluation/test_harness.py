"""lm-evaluation-harness runs our model and agrees with our own scores (make test-harness)."""

import math

import jax
import pytest
from standin_gym import interpreter

from lib.config import EvaluationConfig
from lib.evaluation.evalsets import EvalItem, high_card_duel_items, write_eval_set
from lib.evaluation.evaluate import answer_eval_set
from lib.evaluation.harness import harness_model, harness_task
from lib.evaluation.reasoning_gym_items import reasoning_gym_items
from lib.model.weights import Model
from lib.tasks import reasoning_gym

pytestmark = pytest.mark.harness
NEW = 12


@pytest.fixture(scope="module")
def talker(small_model: Model) -> Model:
    """The small model with a louder layer: else it would repeat its last token whatever it was asked."""
    layers = jax.tree.map(lambda leaf: leaf * 5, small_model.params["layers"])
    return small_model._replace(params=small_model.params | {"layers": layers})


def instances(*arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance("generate_until", {}, given, place) for place, given in enumerate(arguments)]


def test_what_it_generates_is_what_we_answer(talker, tmp_path):
    eval_set = write_eval_set(tmp_path / "toy_v1.jsonl", high_card_duel_items(5, seed=1), "toy", "2026-11-22T00:00:00Z")
    settings = EvaluationConfig(batch_size=4, max_new_tokens=NEW)
    ours = [record["completion"] for record in answer_eval_set(talker, eval_set, settings, "toy")]
    asked = instances(*((item.prompt, {"until": [], "max_gen_toks": NEW}) for item in eval_set.items))
    model = harness_model(talker, batch_size=4)
    assert model.generate_until(asked) == ours and len(set(ours)) > 1
    stop = ours[0][len(ours[0]) // 2 :]
    [cut] = model.generate_until(instances((eval_set.items[0].prompt, {"until": [stop], "max_gen_toks": NEW})))
    assert cut + stop == ours[0] or cut == ours[0].split(stop)[0]


def test_likelihoods_of_all_next_tokens_sum_to_one(talker):
    pieces = [(talker.tokenizer.decode([token]), token) for token in range(6, talker.config.vocab_size)]
    texts = [text for text, token in pieces if talker.tokenizer.encode(text) == [token]]
    found = harness_model(talker).loglikelihood(instances(*(("Who wins?", text) for text in texts)))
    assert 0.5 < sum(math.exp(logprob) for logprob, _ in found) <= 1.0001 and len(texts) > 100
    assert sum(greedy for _, greedy in found) <= 1


def test_a_run_of_the_harness_scores_our_eval_set_as_we_do(talker, tmp_path):
    """The general items and their answers are such that both rules agree: the text, whatever its case."""
    import lm_eval

    answers = ["yes", "No", "maybe"]
    items = [EvalItem(f"q-{n}", f"Question {n}?", answers[n % 3], "all", "easy") for n in range(9)]
    path = tmp_path / "general_v1.jsonl"
    write_eval_set(path, items, "toy", "2026-11-22T00:00:00Z")
    model = harness_model(talker, batch_size=4)
    model.generate_until = lambda requests: ["Reasoning:\n1. No.\nAnswer: no." for _ in requests]
    told = lm_eval.simple_evaluate(model, tasks=[harness_task(path)], bootstrap_iters=0)
    assert told["results"]["general_v1"]["exact_match,answer"] == pytest.approx(3 / 9)
    assert told["n-samples"]["general_v1"] == {"original": 9, "effective": 9}


def test_items_of_reasoning_gym_are_judged_by_their_verifier(talker, tmp_path, monkeypatch):
    import lm_eval

    monkeypatch.setenv(reasoning_gym.VARIABLE, interpreter(tmp_path))
    path = tmp_path / "sums_v1.jsonl"
    write_eval_set(path, reasoning_gym_items("toy", {}, 3, seed=40).items, "toy", "2026-11-22T00:00:00Z")
    model = harness_model(talker, batch_size=4)
    model.generate_until = lambda requests: ["Answer: **40**", "Answer: raise", "42"]
    told = lm_eval.simple_evaluate(model, tasks=[harness_task(path)], bootstrap_iters=0)
    assert told["results"]["sums_v1"]["acc,verified"] == pytest.approx(1 / 3)
    reasoning_gym.worker(reasoning_gym.python()).stop()


def test_a_real_generation_goes_through_the_whole_harness(talker, tmp_path):
    import lm_eval

    path = tmp_path / "toy_v2.jsonl"
    write_eval_set(path, high_card_duel_items(4, seed=1), "toy", "2026-11-22T00:00:00Z")
    told = lm_eval.simple_evaluate(harness_model(talker, batch_size=4, max_new_tokens=NEW), tasks=[harness_task(path)])
    assert told["results"]["toy_v2"]["exact_match,answer"] == 0
    assert all(len(sample["resps"][0][0]) > 0 for sample in told["samples"]["toy_v2"])
