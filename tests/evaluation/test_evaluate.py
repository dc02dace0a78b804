"""A model answers an eval set: real decoding by a random model, whose output is a file of traces."""

import json
from pathlib import Path

import jax
import pytest

from lib.config import EvaluationConfig, SamplingConfig
from lib.data.importing import Accepted, import_files, read_traces
from lib.data.store import Store
from lib.evaluation.evalsets import EvalItem, EvalSet, high_card_duel_items, write_eval_set
from lib.evaluation.evaluate import NO_ANSWER, answer_control, answer_eval_set, write_results
from lib.evaluation.results import read_results
from lib.evaluation.scoring import score
from lib.model.weights import Model

CONFIG = EvaluationConfig(batch_size=4, max_new_tokens=6)
WHEN = "2026-11-22T00:00:00Z"


@pytest.fixture(scope="module")
def eval_set(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    """Four deals, whose steps can be checked, and a general question."""
    general = EvalItem("sum-1", "1 + 1?", "2", "sums", "easy", scorer="number", group="one and one")
    path = tmp_path_factory.mktemp("evalsets") / "toy_v1.jsonl"
    return write_eval_set(path, [*high_card_duel_items(4, seed=1), general], "toy", WHEN)


@pytest.fixture(scope="module")
def talker(small_model: Model) -> Model:
    """The small model with a louder layer: else it would repeat its last token whatever it was asked."""
    layers = jax.tree.map(lambda leaf: leaf * 5, small_model.params["layers"])
    return small_model._replace(params=small_model.params | {"layers": layers})


@pytest.fixture(scope="module")
def records(talker: Model, eval_set: EvalSet) -> list[dict]:
    found = answer_eval_set(talker, eval_set, CONFIG, "toy (base)")
    assert len({record["completion"] for record in found}) > 1
    return found


@pytest.fixture(scope="module")
def nul_model(small_model: Model) -> Model:
    """One that writes nothing but the byte 0: its embedding is twice every other, and no layer adds to it."""
    zero = small_model.tokenizer.encode("\0")
    assert len(zero) == 1
    embedding = small_model.params["embedding"]
    scale = jax.numpy.ones(small_model.config.embed_dim)
    same = jax.numpy.broadcast_to(scale, embedding.shape).at[zero[0]].mul(2)
    return small_model._replace(params=jax.tree.map(lambda leaf: leaf * 0, small_model.params) | {"embedding": same})


def test_every_item_is_answered_once_in_order_with_its_score(records, eval_set, talker):
    assert [record["meta"]["eval_id"] for record in records] == [item.id for item in eval_set.items]
    for record, item in zip(records, eval_set.items, strict=True):
        truncated = record["verdict"] == "truncated"
        scored = score(record["completion"], item.expected_answer, truncated)
        assert (record["score"], record["verdict"]) == (scored.value, scored.verdict)
        assert record["final_answer"] == (scored.answer or NO_ANSWER)
        assert record["num_tokens"] <= CONFIG.max_new_tokens
        assert record["prompt"] == item.prompt and record["meta"]["expected_answer"] == item.expected_answer
        assert record["meta"]["weights_sha256"] == talker.weights_sha256
        assert record["meta"]["eval_set_sha256"] == eval_set.sha256


def test_the_group_of_an_item_goes_with_its_answer_to_the_comparison(records, tmp_path):
    assert [record["meta"].get("group") for record in records] == [None] * 4 + ["one and one"]
    write_results(tmp_path / "out.jsonl", records)
    assert [item.group for item in read_results(tmp_path / "out.jsonl").items] == [""] * 4 + ["one and one"]


def test_the_output_imports_back_as_traces_that_keep_the_scores(records, tmp_path):
    write_results(tmp_path / "out.jsonl", records)
    read = list(read_traces(tmp_path / "out.jsonl"))
    assert all(isinstance(record, Accepted) for record in read) and len(read) == len(records)
    for record, found in zip(records, read, strict=True):
        trace = found.trace
        assert (trace.prompt, trace.final_answer) == (record["prompt"], record["final_answer"])
        assert [step.content for step in trace.steps] == [step["content"] for step in record["steps"]]
        assert trace.meta["source"] == "evaluation" and trace.meta["completion"] == record["completion"]
        assert trace.meta["verdict"] == record["verdict"] and trace.meta["score"] == record["score"]
    report = import_files(Store(tmp_path / "store"), [tmp_path / "out.jsonl"])
    assert (report.accepted, report.rejected) == (len(records), 0)


def test_the_output_reads_back_for_the_comparison(records, tmp_path):
    write_results(tmp_path / "out.jsonl", records)
    results = read_results(tmp_path / "out.jsonl")
    assert (results.model, results.eval_set) == ("toy (base)", "toy_v1")
    assert [item.completion for item in results.items] == [record["completion"] for record in records]
    assert [bool(item.checks) for item in results.items] == [True] * 4 + [False]


def test_the_same_call_twice_writes_the_same_bytes(records, talker, eval_set, tmp_path):
    write_results(tmp_path / "one.jsonl", records)
    write_results(tmp_path / "two.jsonl", answer_eval_set(talker, eval_set, CONFIG, "toy (base)"))
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes() != b""


@pytest.mark.parametrize("limit, answered", [(1, 1), (3, 3), (5, 5), (9, 5), (None, 5)])
def test_the_limit_takes_the_head_of_the_set_and_changes_no_answer(
    records, talker, eval_set, limit: int | None, answered: int
):
    config = EvaluationConfig(limit=limit, batch_size=4, max_new_tokens=6)
    assert answer_eval_set(talker, eval_set, config, "toy (base)") == records[:answered]


def test_the_control_draws_the_same_answers_where_a_prompt_is_asked_twice(talker, tmp_path):
    twice = [EvalItem(f"sum-{number}", f"{number % 2} + 1?", "2", "sums", "easy") for number in range(5)]
    asked = talker, write_eval_set(tmp_path / "twice_v1.jsonl", twice, "twice", WHEN)
    config = EvaluationConfig(batch_size=4, max_new_tokens=6, sampling=SamplingConfig(temperature=1.0, samples=2))
    records = answer_eval_set(*asked, config, "toy (base)")
    assert len({record["completion"] for record in records if record["prompt"] == "0 + 1?"}) > 1
    assert answer_control(*asked, config, "toy (base)") == records


def test_f8_nul_never_appears_and_what_has_no_answer_says_so(nul_model, eval_set, tmp_path):
    found = answer_eval_set(nul_model, eval_set, CONFIG, "nul")
    assert {record["completion"] for record in found} == {"\N{REPLACEMENT CHARACTER}" * CONFIG.max_new_tokens}
    assert {record["verdict"] for record in found} == {"truncated"} and {r["final_answer"] for r in found} == {
        NO_ANSWER
    }
    write_results(tmp_path / "out.jsonl", found)
    written = (tmp_path / "out.jsonl").read_bytes()
    assert b"\0" not in written and b"\\u0000" not in written
    assert all(isinstance(record, Accepted) for record in read_traces(tmp_path / "out.jsonl"))


def test_the_system_instruction_reaches_the_model(talker, eval_set, records):
    told = answer_eval_set(talker, eval_set, CONFIG, "toy (base)", "Reason step by step, and then once more.")
    assert [record["prompt"] for record in told] == [record["prompt"] for record in records]
    assert told != records


def test_output_is_one_json_object_a_line(records, tmp_path: Path):
    told = records[0] | {"completion": "a\nb\u2028c"}
    write_results(tmp_path / "out.jsonl", [told, records[1]])
    lines = (tmp_path / "out.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [told, records[1]] and lines[-1] == b""
