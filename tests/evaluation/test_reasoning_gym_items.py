"""Eval sets from reasoning-gym: what is left out and why, how they are scored, and that every process makes the same.

The ordinary tests ask a stand-in of a few lines; those marked `reasoning_gym` every generator of the package itself.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lib.__main__ import main
from lib.config import EvaluationConfig, load_config
from lib.data.importing import import_files
from lib.data.store import Store
from lib.errors import RequestError
from lib.evaluation import evaluate
from lib.evaluation.evalsets import EvalItem, EvalSet, load_eval_set, write_eval_set
from lib.evaluation.reasoning_gym_items import not_again, reasoning_gym_items
from lib.evaluation.results import read_results
from lib.evaluation.scoring import score_item
from lib.experiments.stages import reserved_questions, store
from lib.files import repository_root, sha256_file
from lib.model.sampler import Completion
from lib.tasks import group_keys, reasoning_gym
from lib.trace import make_trace

WHEN = "2026-11-22T00:00:00Z"
MAKE = ["eval", "make", "--seed", "40"]


def toy(kind: str = "sum", count: int = 3) -> list[EvalItem]:
    return reasoning_gym_items("toy", {"kind": kind}, count, seed=40).items


def test_an_item_holds_all_that_it_is_made_again_from(gym: str):
    made = reasoning_gym_items("toy", {"kind": "templates"}, 3, seed=40)
    assert made.draws == 3 and made.left_out == Counter()
    assert made.items[1] == EvalItem(
        "toy-000001", "40 + 1?", "41", "toy", "medium", scorer="reasoning_gym", group="toy 7", task="reasoning_gym",
        state={"generator": "toy", "config": '{"kind": "templates", "seed": 40, "size": 6}', "index": "1",
               "version": "0.1.25"},
    )  # fmt: skip


LEFT_OUT = {
    "empty": "6 of them: its question is empty",
    "none": "6 of them: it has no answer of its own",
    "long": "6 of them: it is longer than 50000 characters",
    "two lines": "6 of them: its answer has several lines",
    "same": "its question was drawn before",
    "refuses": "6 of them: its verifier refuses its answer",
    "credulous": "6 of them: its verifier accepts the answer to another question",
    "any number": "6 of them: its verifier accepts the answer to another question",
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_where_fewer_than_half_are_sound_the_generator_is_refused_with_the_reasons(gym: str, kind: str):
    with pytest.raises(RequestError, match=f"^toy: 6 draws hold [01] sound items, not 3 .*{LEFT_OUT[kind]}"):
        toy(kind)


def test_what_is_left_out_is_counted_and_the_next_ones_are_taken(gym: str):
    made = reasoning_gym_items("toy", {"kind": "odd fails"}, 3, seed=40)
    assert [item.prompt for item in made.items] == ["40 + 0?", "40 + 2?", "40 + 4?"]
    assert made.draws == 5 and made.left_out == {"IndexError: no more": 2}


def test_an_answer_may_end_in_an_empty_line(gym: str):
    assert [item.expected_answer for item in toy("lines")] == ["40\n", "41\n", "42\n"]


def test_the_verifier_is_asked_what_the_extractor_finds(gym: str):
    item = toy()[2]
    assert score_item(item, "Reasoning:\n1. 40 + 2 = 42\nAnswer: **42**", truncated=False)[:3] == (1, "correct", "42")
    assert score_item(item, "Answer: 41", truncated=False) == (0, "wrong", "41", "the verifier of toy gives '41' 0.5")
    assert score_item(item, "It is 42.", truncated=False).verdict == "unscored"
    assert score_item(item, "Answer: 42", truncated=True).verdict == "truncated"
    failed = score_item(item, "Answer: raise", truncated=False)
    assert failed == (None, "unscored", "raise", "the verifier of toy failed: ValueError: odd answer")


def test_an_item_of_an_eval_set_needs_its_state(gym: str, tmp_path: Path):
    [item, *_] = toy()
    for state in ({}, {"generator": "toy"}):
        with pytest.raises(
            RequestError, match="field state: expected generator, config, index, version with the scorer"
        ):
            write_eval_set(tmp_path / "e.jsonl", [EvalItem(**{**as_dict(item), "state": state})], "toy", WHEN)


def as_dict(item: EvalItem) -> dict:
    return {name: getattr(item, name) for name in item.__struct_fields__}


def test_a_changed_question_is_refused_and_not_scored(gym: str):
    [item, *_] = toy()
    with pytest.raises(RequestError, match="makes another question here than in the eval set"):
        score_item(EvalItem(**{**as_dict(item), "prompt": "41 + 0?"}), "Answer: 40", truncated=False)


def test_a_model_is_scored_by_the_verifier_and_a_failure_of_it_is_told(
    gym: str, small_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said = ["Answer: 40", "Answer: 40", "Answer: raise", "42"]
    items = tuple(toy(count=4))
    tokens = [small_model.tokenizer.encode(text) for text in said]
    assert [small_model.tokenizer.decode(ids) for ids in tokens] == said
    monkeypatch.setattr(evaluate, "_complete", lambda *_: [Completion(ids, False, -1.0) for ids in tokens])
    records = evaluate.answer_eval_set(
        small_model, EvalSet("toy", tmp_path, "0" * 64, items), EvaluationConfig(), "toy (base)"
    )
    assert [record["verdict"] for record in records] == ["correct", "wrong", "unscored", "unscored"]
    told = [record["meta"].get("unscored") for record in records]
    assert told == [None, None, "the verifier of toy failed: ValueError: odd answer", None]
    evaluate.write_results(tmp_path / "o.jsonl", records)
    assert [item.verdict for item in read_results(tmp_path / "o.jsonl").items] == [r["verdict"] for r in records]
    assert import_files(Store(tmp_path / "store"), [tmp_path / "o.jsonl"]).added == 4


def test_where_nothing_could_be_scored_nothing_is_begun(
    gym: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    eval_set = write_eval_set(tmp_path / "toy_v1.jsonl", toy(), "toy", WHEN)
    smoke = str(repository_root() / "configs" / "smoke.yaml")
    commands = [
        ["run", smoke, "--set", f"evaluation.eval_set={eval_set.path}"],
        ["eval", "generate", "--model", "base", "--config", smoke, "--eval-set", str(eval_set.path), "--output", "o"],
    ]
    monkeypatch.setenv(reasoning_gym.VARIABLE, "/nowhere")
    for command in commands:
        assert main(command) == 2
        assert "/nowhere: no interpreter for reasoning-gym" in capsys.readouterr().err
    assert not home.exists()


def make(output: Path, *words: str) -> int:
    return main([*MAKE, "--generator", "reasoning_gym:toy", "--count", "3", "--output", str(output), *words])


def test_the_verb_writes_the_set_and_says_how_it_was_made(gym: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "toy_v1.jsonl"
    assert make(path, "--option", "kind=odd fails") == 0
    said = capsys.readouterr().out
    assert "left out: 2 of 5 draws: IndexError: no more" in said and "toy_v1: 3 items, sha256 " in said
    eval_set = load_eval_set(path)
    manifest = json.loads((tmp_path / "toy_v1.manifest.json").read_text())
    assert manifest["sha256"] == eval_set.sha256 and manifest["count"] == len(eval_set.items) == 3
    assert manifest["origin"] == {
        "command": "python -m lib eval make --generator reasoning_gym:toy --count 3 --seed 40 "
        "--option 'kind=odd fails' --output toy_v1.jsonl",
        "generator": "reasoning_gym:toy", "version": "0.1.25", "options": {"kind": "odd fails"}, "seed": 40, "draws": 5,
        "left_out": {"IndexError: no more": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--generator", "toy"], "--generator: expected reasoning_gym:NAME, got 'toy'"),
        (["--generator", "reasoning_gym:tox"], "reasoning-gym has no generator 'tox'; it has gsm_symbolic, toy"),
        (["--count", "0"], "--count: expected at least 1, got 0"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--option", "shift"], "--option 'shift': expected KEY=VALUE"),
        (["--option", "shift=1", "--option", "shift=2"], "--option shift: given twice"),
        (["--option", "shift=-1"], "refuses the options"),
        (["--reasoning-gym-python", "/nowhere"], "/nowhere: no interpreter for reasoning-gym"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line_and_writes_nothing(
    gym: str, tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
):
    assert make(tmp_path / "toy_v1.jsonl", *words) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not list(tmp_path.glob("toy_v1*"))


def test_another_ending_than_jsonl_is_refused(gym: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert make(tmp_path / "toy_v1.json") == 2
    assert "expected a name that ends in .jsonl" in capsys.readouterr().err


def hashes(tmp_path: Path, generator: str, *words: str) -> list[str]:
    """The sha256 of the same eval set, made by three processes with three hash seeds."""
    found = []
    for hash_seed in ("0", "1", "random"):
        output = tmp_path / hash_seed / "set_v1.jsonl"
        output.parent.mkdir()
        command = [sys.executable, "-m", "lib", *MAKE, "--generator", f"reasoning_gym:{generator}", "--count", "8"]
        subprocess.run(
            [*command, "--output", str(output), *words], cwd=repository_root(), check=True, capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )  # fmt: skip
        found.append(sha256_file(output))
    return found


def test_every_process_makes_the_same_set_whatever_its_hash_seed(gym: str, tmp_path: Path):
    assert len(set(hashes(tmp_path, "toy", "--option", "kind=hashed"))) == 1


def test_no_question_of_the_configured_set_is_trained_on(gym: str, tmp_path: Path):
    eval_set = write_eval_set(tmp_path / "toy_v1.jsonl", toy(), "toy", WHEN)
    reserved = reserved_questions(str(eval_set.path))
    assert {reserved[key] for item in eval_set.items for key in group_keys(item.prompt)} == {"toy_v1"}
    asked = [("40 + 1?", "41"), ("40  +  2?", "42"), ("90 + 1?", "91")]
    store().add(
        make_trace(prompt, [("step", "so")], answer, {"source": "mine"}, created_at=WHEN) for prompt, answer in asked
    )
    assert kept(str(eval_set.path)) == ["90 + 1?"]


def kept(eval_set: str) -> list[str]:
    """The questions of the dataset that a run with this eval set would train on."""
    from lib.experiments.stages import make_dataset

    config = load_config(
        str(repository_root() / "configs" / "smoke.yaml"),
        [
            "traces.game=''",
            "traces.count=0",
            "dataset.filters={}",
            "dataset.limit=null",
            f"evaluation.eval_set={eval_set}",
        ],
    )
    return sorted(trace.prompt for trace in make_dataset(config).traces)


# The package itself.

# Why a generator is refused: what all of its items are left out for.
REFUSED = {
    "its answer has several lines": "arc_agi binary_matrix futoshiki kakurasu manipulate_matrix mini_sudoku "
    "modulo_grid n_queens pool_matrix rearc rotate_matrix sudoku survo tower_of_hanoi",
    "it has no answer of its own": "boxnet graph_color propositional_logic rubiks_cube rush_hour",
    "its verifier accepts the answer to another question": "game_of_life_halting puzzle24",
    "refuses the options": "composite",
}


@pytest.mark.reasoning_gym
def test_truth_is_correct_and_another_answer_wrong_for_every_generator_or_it_is_refused():
    from benchmarks.reasoning_gym import main as survey

    found = survey([], count=20, seed=42, worked=5000)
    rows = {row.generator: row for row in found.rows}
    refused = {name: reason for reason, names in REFUSED.items() for name in names.split()}
    assert len(rows) == 106
    assert {name for name, row in rows.items() if not row.usable} == refused.keys()
    for name, reason in refused.items():
        assert reason in rows[name].refused or rows[name].left_out[reason] >= 8
    assert all(row.again == row.sound for row in rows.values())
    assert {name: row.sound for name, row in rows.items() if 0 < row.sound < 20 and row.usable} == {"gsm_symbolic": 17}
    worked = sum(found.worked.left_out.values(), Counter())
    assert worked == {"": 4645, "a false equation": 274, "an answer that no equation gives": 81}
    assert found.worked.steps == {"true": 15613, "false": 287, "without an equation": 1536}


# Those that vary with the hash seed of their process, and one that does not.
@pytest.mark.reasoning_gym
@pytest.mark.parametrize(
    "generator", ["isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder", "basic_arithmetic"]
)
def test_the_real_sets_are_the_same_whatever_the_hash_seed(generator: str, tmp_path: Path):
    assert len(set(hashes(tmp_path, generator))) == 1


@pytest.mark.reasoning_gym
def test_a_known_set_is_made_byte_for_byte(tmp_path: Path):
    """Equal today, here and in a year: the hash is of a set made once, on another day."""
    made = reasoning_gym_items("time_intervals", {}, 50, seed=42)
    assert write_eval_set(tmp_path / "times_v1.jsonl", made.items, "", WHEN).sha256 == TIMES
    assert not not_again(made.items)


TIMES = "4f8514cf427e51dc95f7fb9a3cdb97e8d07a61ac07bb58275fadcdab2cc6b891"


@pytest.mark.reasoning_gym
@pytest.mark.parametrize("generator", ["spiral_matrix", "string_insertion", "countdown", "simple_integration"])
def test_an_answer_to_a_real_verifier_is_no_program(generator: str, tmp_path: Path):
    [item] = reasoning_gym_items(generator, {}, 1, seed=42).items
    for deed in (f"open('{tmp_path}/made', 'w')", f"__import__('os').system('touch {tmp_path}/made')"):
        assert score_item(item, f"Answer: {deed}", truncated=False).value != 1
        assert score_item(item, f"Answer: [{deed}]", truncated=False).value != 1
    assert not (tmp_path / "made").exists()


@pytest.mark.reasoning_gym
def test_the_worked_traces_hold_and_those_left_out_are_counted():
    made = reasoning_gym.generate(500, seed=42, created_at=WHEN)
    assert len(made.traces) == 500 and len({trace.id for trace in made.traces}) == 500
    assert made.left_out == {"a false equation": 39, "an answer that no equation gives": 12}
    again = reasoning_gym.generate(50, seed=42, created_at=WHEN)
    assert again.traces == made.traces[:50]
    for trace in made.traces:
        drawn = reasoning_gym.draw(trace.meta["state"])
        assert (trace.prompt, trace.final_answer) == (drawn.question, drawn.answer)
