"""A dataset: chosen by its request alone, whole or not there, and never other content under the same key."""

import json
import os
import random
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from filelock import FileLock

from lib.config import CurationConfig, DatasetConfig, TracesConfig
from lib.data import dataset as module
from lib.data import frames, selection
from lib.data.dataset import (
    Dataset,
    build_dataset,
    list_datasets,
    load_dataset,
    sweep_datasets,
)
from lib.data.duplicates import jaccard, runs_of
from lib.data.export import FORMATS, NEEDED, export_lines
from lib.data.importing import import_files
from lib.data.lineage import origins_in_dataset
from lib.data.records import parse_record
from lib.data.renderer import encode_example, render_example
from lib.data.selection import (
    CONTROL,
    DUPLICATE,
    NAMED,
    NEAR_DUPLICATE,
    NOT_PLAYED,
    OVER_LIMIT,
    UNCHECKED,
    UNTRUE,
    is_held_out,
    select,
    trace_groups,
)
from lib.data.store import Store
from lib.data.tokenizer import load_tokenizer
from lib.errors import RequestError, RetraceError
from lib.experiments.dataset_card import dataset_card
from lib.files import repository_root, sha256_bytes, sha256_file
from lib.tasks import group_keys, high_card_duel
from lib.trace import Trace, content_sha256, make_trace, to_json


def toy(number: int, **changes) -> Trace:
    """Trace n is made n seconds after midnight and belongs to one of three games."""
    meta = {"game": "abc"[number % 3], "n": number, "even": number % 2 == 0}
    time = f"2025-01-01T00:00:{number:02}Z"
    return make_trace(f"{number}?", [("step", f"is {number}")], str(number), meta, created_at=time, **changes)


def toys(*numbers: int) -> list[Trace]:
    return [toy(number) for number in numbers]


def stored(folder: Path, *traces: Trace) -> Store:
    store = Store(folder / "store")
    store.add(traces)
    return store


def built(store: Store, reserved: dict[str, str] | None = None, version: str = "v1", **request) -> Dataset:
    folder = store.folder.parent / "datasets"
    return build_dataset(store, DatasetConfig("toy", version, **request), reserved or {}, folder)


def numbers(dataset: Dataset) -> list[int]:
    return [trace.meta["n"] for trace in dataset.traces]


def refusal(store: Store, **request) -> str:
    with pytest.raises(RequestError) as caught:
        built(store, **request)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is chosen ---------------------------------------------------------------------------------------


def test_latest_is_the_newest_first_and_ties_go_by_id(tmp_path: Path):
    store = stored(tmp_path, *toys(2, 5, 1), toy(7, id="b"))
    tied = make_trace("7!", [("s", "c")], "7", {"n": 70}, id="a", created_at="2025-01-01T00:00:07Z")
    store.add([tied])
    assert numbers(built(store)) == [70, 7, 5, 2, 1]


def test_the_limit_takes_the_head_and_counts_the_rest(tmp_path: Path):
    dataset = built(stored(tmp_path, *toys(*range(9))), limit=4)
    assert numbers(dataset) == [8, 7, 6, 5] and dataset.manifest["dropped"] == {"over the limit": 5}
    assert built(stored(tmp_path), version="v2", limit=9).manifest["dropped"] == {}


@pytest.mark.parametrize(
    "filters, found",
    [
        ({}, [5, 4, 3, 2, 1, 0]),
        ({"game": "a"}, [3, 0]),
        ({"game": ["a", "c"]}, [5, 3, 2, 0]),
        ({"game": ["a", "c"], "even": True}, [2, 0]),
        ({"n": 4}, [4]),
        ({"n": [1, "2", True]}, [1]),
    ],
)
def test_filters_are_equality_and_a_list_means_any_of_these(filters: dict, found: list[int], tmp_path: Path):
    assert numbers(built(stored(tmp_path, *toys(*range(6))), filters=filters)) == found


@pytest.mark.parametrize("filters", [{"n": "1"}, {"n": 1.0}, {"even": 1}, {"late": None}, {"game": "A"}, {"n": []}])
def test_a_filter_never_matches_a_value_of_another_type_or_none(filters: dict, tmp_path: Path):
    assert "none of 4 traces matches" in refusal(stored(tmp_path, *toys(*range(4))), filters=filters)


def test_an_empty_selection_names_what_the_store_does_hold(tmp_path: Path):
    assert "is empty; generate or import traces first" in refusal(Store(tmp_path / "store"), filters={"game": "z"})
    error = refusal(stored(tmp_path, *toys(0, 1, 2, 3)), filters={"game": ["z", "y"], "late": 1})
    assert error.endswith(
        "none of 4 traces matches game='z' or 'y', late=1; the store holds game: 'a', 'b', 'c'; "
        "no key late, only even, game, n"
    )
    tagged = make_trace("q", [("s", "c")], "a", {"tags": ["x"]})
    for count, shown in ((8, "n: 0, 1, 2, 3, 4, 5, 6, 7"), (9, "n: 0, 1, 2, 3, 4, 5, 6, 7, …")):
        error = refusal(stored(tmp_path / str(count), *toys(*range(count))), filters={"n": 99})
        assert error.endswith(f"the store holds {shown}")
    assert "the store holds tags: a list" in refusal(stored(tmp_path / "tagged", tagged), filters={"tags": "x"})


def test_ids_that_begin_alike_are_told_apart_by_their_ends(tmp_path: Path):
    prefix = "a name of more than sixteen letters "
    ids = [f"{prefix}{n}" for n in (3, 1, 2)] + [prefix, "a", "é", "z", prefix[:16], prefix[:15]]
    moments = ["2025-01-01T00:00:01Z", "2025-01-01T00:00:02Z"]
    traces = [
        make_trace(f"{id}{moment}", [("s", "c")], "1", {"n": 0}, id=f"{id}{number}", created_at=moment)
        for number, moment in enumerate(moments)
        for id in ids
    ]
    dataset = built(stored(tmp_path, *traces))
    expected = [sorted(trace.id for trace in traces if trace.created_at.startswith(f"{m[:-1]}")) for m in moments[::-1]]
    assert [trace.id for trace in dataset.traces] == expected[0] + expected[1] == dataset.manifest["trace_ids"]


@pytest.mark.parametrize("request_", [{}, {"limit": 17}, {"selection_strategy": "random", "seed": 3}])
def test_what_is_too_large_for_memory_comes_to_the_same(request_, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    traces = list(high_card_duel.generate(60, seed=0, created_at="2025-01-01T00:00:00Z"))
    reserved = dict.fromkeys(group_keys(traces[3].prompt), "x")
    whole = built(stored(tmp_path / "whole", *traces), reserved, **request_)
    parts = stored(tmp_path / "parts", *traces[:20])
    parts.add(traces[:10] + traces[30:])
    parts.add(traces[20:30])
    monkeypatch.setattr(frames, "PART_ROWS", 7)
    monkeypatch.setattr(frames, "PART_BYTES", 1)
    dealt = built(parts, reserved, **request_)
    for name in ("trace_ids", "content_sha256", "stats", "split", "matched", "dropped"):
        assert dealt.manifest[name] == whole.manifest[name], name
    assert list(dealt.traces) == list(whole.traces) and len(list(whole.traces)) == len(whole.traces)
    left_out = [pl.read_parquet(d.folder / "dropped.parquet").sort("id") for d in (dealt, whole)]
    assert left_out[0].equals(left_out[1]) and len(left_out[0]) == 60 - len(whole.traces)


def test_what_comes_to_the_store_meanwhile_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the names of the new segments, which are hashes: they stand before, between and after the others."""

    def slow(store, *rest):
        chosen = select(store, *rest)
        for number in range(40, 50):
            store.add(toys(number))
        return chosen

    alone = built(stored(tmp_path / "alone", *toys(*range(9))))
    monkeypatch.setattr(module, "select", slow)
    other = built(stored(tmp_path / "other", *toys(*range(9))))
    names = ("content_sha256", "provenance", "trace_count")
    assert [other.manifest[name] for name in names] == [alone.manifest[name] for name in names]
    assert list(other.traces) == list(alone.traces)


def test_what_has_no_room_to_be_put_in_order_says_where_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frames, "PART_ROWS", 7)
    rows = frames.in_order([pl.DataFrame({"text": ["x"] * 20})], np.arange(20, dtype=np.int32), tmp_path)
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, most))
    try:
        said = rf"temporary folder {tmp_path.parent}: cannot be written \(File too large\); set TMPDIR"
        with pytest.raises(RetraceError, match=said):
            list(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def test_random_depends_on_seed_and_content_alone(tmp_path: Path):
    first = stored(tmp_path / "one", *toys(*range(12)))
    other = stored(tmp_path / "other", *[toy(n, id=f"other-{n}") for n in (7, 3, 11)])
    for n in (0, 1, 2, 4, 5, 6, 8, 9, 10):
        trace = toy(n)
        other.add(
            [make_trace(trace.prompt, [("step", f"is {n}")], str(n), trace.meta, created_at="2020-01-01T00:00:00Z")]
        )
    chosen = {
        seed: built(first, version=f"v{seed}", selection_strategy="random", seed=seed, limit=6) for seed in (1, 2)
    }
    again = built(other, version="v1", selection_strategy="random", seed=1, limit=6)
    assert numbers(again) == numbers(chosen[1]) != numbers(chosen[2])
    assert again.manifest["content_sha256"] == chosen[1].manifest["content_sha256"]
    assert numbers(chosen[1]) not in (sorted(numbers(chosen[1])), sorted(numbers(chosen[1]), reverse=True))


def test_what_an_eval_set_asks_never_enters_and_is_counted(tmp_path: Path):
    episode = high_card_duel.deal(3)
    reworded = make_trace(
        "QS?", [("s", "c")], "win", {"game": high_card_duel.NAME, "state": high_card_duel.state_of(episode)}
    )
    store = stored(tmp_path, *toys(1, 2, 3), *high_card_duel.generate(5, seed=0), reworded)
    asked = group_keys(high_card_duel.question(episode), high_card_duel.NAME, high_card_duel.state_of(episode))
    reserved = dict.fromkeys(asked, "duels") | dict.fromkeys(group_keys("  2?"), "sums")
    dataset = built(store, reserved, limit=5)
    assert not any(trace_groups(trace) & reserved.keys() for trace in dataset.traces)
    assert dataset.manifest["dropped"] == {
        "asked in eval set duels": 2, "asked in eval set sums": 1, "over the limit": 1,
    }  # fmt: skip


def test_a_question_behind_an_instruction_is_that_of_the_eval_set(tmp_path: Path):
    asked = [{"role": "user", "content": "Red\n\nor  blue?"}, {"role": "assistant", "content": "Sky.\nAnswer: blue"}]
    turns = [{"role": "system", "content": "Be brief.\n\nUse words."}, *asked]
    chat = parse_record(json.dumps({"messages": turns}).encode())
    others = [make_trace(prompt, [("s", "c")], "a", {}) for prompt in ("Blue?", "Red or blue?\n\nOr green?")]
    dataset = built(stored(tmp_path, chat, *others), dict.fromkeys(group_keys("red or blue?"), "colours"))
    assert dataset.manifest["dropped"] == {"asked in eval set colours": 1}
    assert {trace.id for trace in dataset.traces} == {trace.id for trace in others}


def test_a_selection_that_is_asked_to_the_last_trace_is_refused(tmp_path: Path):
    store = stored(tmp_path, *toys(1, 2))
    with pytest.raises(RequestError, match=r"all 2 traces that match are left out \(2 asked in eval set sums\)"):
        built(store, dict.fromkeys(group_keys("1?") | group_keys("2?"), "sums"))


def test_a_dataset_of_a_run_holds_no_deal_that_the_run_does_not_play(tmp_path: Path):
    """The store is shared: what others played must not change what a configuration means."""
    store = stored(tmp_path, *high_card_duel.generate(30, seed=7), *high_card_duel.generate(30, seed=900), *toys(1))
    request = DatasetConfig("duel", "v1", selection_strategy="random", seed=1)
    played = TracesConfig(game="high_card_duel", count=20, seed=7)
    dataset = build_dataset(store, request, {}, tmp_path / "datasets", played)
    duels = [trace.meta["episode_index"] for trace in dataset.traces if trace.meta.get("game") == "high_card_duel"]
    assert sorted(duels) == list(range(20)) and len(dataset.traces) == 21
    assert dataset.manifest["dropped"] == {NOT_PLAYED: 40}


@pytest.mark.parametrize("index", ["3", None, 3.0, True, [3]])
def test_an_episode_index_that_is_no_whole_number_is_no_deal_that_the_run_plays(index, tmp_path: Path):
    meta = {"game": "high_card_duel", "source": "builtin", "seed": 7, "episode_index": index}
    foreign = make_trace("3?", [("step", "is 3")], "3", meta)
    played = TracesConfig(game="high_card_duel", count=5, seed=7)
    store = stored(tmp_path, *high_card_duel.generate(5, seed=7), foreign)
    dataset = build_dataset(store, DatasetConfig("duel", "v1"), {}, tmp_path / "datasets", played)
    assert len(dataset.traces) == 5 and dataset.manifest["dropped"] == {NOT_PLAYED: 1}


def test_what_a_run_plays_has_one_order_whatever_was_played_before(tmp_path: Path):
    request, played = DatasetConfig("duel", "v1", limit=8), TracesConfig(game="high_card_duel", count=20, seed=7)
    found = []
    for name, counts in {"at once": [20], "some before": [5, 20]}.items():
        store = Store(tmp_path / name / "store")
        for day, count in enumerate(counts, 1):
            store.add(high_card_duel.generate(count, seed=7, created_at=f"2025-01-{day:02}T00:00:00Z"))
        found.append(build_dataset(store, request, {}, tmp_path / name / "datasets", played).manifest["trace_ids"])
    assert found[0] == found[1] and len(found[0]) == 8


# ---- curation ----------------------------------------------------------------------------------------------


def curated(store: Store, version: str = "v1", limit: int | None = None, **rules) -> Dataset:
    """The dataset by these rules; every trace that matches is in it, or left out for one reason."""
    dataset = built(store, version=version, limit=limit, curation=CurationConfig(**rules))
    left_out = pl.read_parquet(dataset.folder / "dropped.parquet")
    ids = [trace.id for trace in dataset.traces]
    assert dict(left_out["reason"].value_counts().sort("reason").rows()) == dataset.manifest["dropped"]
    assert sorted([*ids, *left_out["id"]]) == sorted(trace.id for trace in store.scan())
    assert dataset.manifest["matched"] == store.count() == len(ids) + len(left_out)
    contents = {trace.id: content_sha256(trace) for trace in store.scan()}
    assert all(contents[id] == content for id, content in left_out.select("id", "content_sha256").rows())
    return dataset


def texts(*given: str) -> list[Trace]:
    """A trace for each text, the first the newest; the steps are its sentences, the last of them the answer."""
    return [
        make_trace(parts[0], [("s", part) for part in parts[1:-1]], parts[-1], {"n": number},
                   created_at=f"2025-01-01T00:00:{59 - number:02}Z")
        for number, parts in enumerate(text.split("|") for text in given)
    ]  # fmt: skip


def test_lengths_are_bounded_on_both_sides(tmp_path: Path):
    store = stored(tmp_path, *texts("12|4|6", "12|4|67", "12|4|678", "12|4|5|6", "12|4|5|6|7"))
    dataset = curated(store, min_characters=5, max_characters=5, min_steps=1, max_steps=2)
    assert numbers(dataset) == [1, 3]
    assert dataset.manifest["dropped"] == {"of fewer than 5 characters": 1, "of more than 5 characters": 2}
    dataset = curated(store, "v2", min_steps=2, max_steps=2)
    assert numbers(dataset) == [3]
    assert dataset.manifest["dropped"] == {"of fewer than 2 steps": 3, "of more than 2 steps": 1}


def test_text_in_another_script_is_left_out_by_its_share(tmp_path: Path):
    store = stored(tmp_path, *texts("abcd|ef|gh", "abcé|ef|gh", "сколько|будет|два"))
    assert numbers(curated(store, min_ascii=0.875)) == [0, 1]
    assert curated(store, "v2", min_ascii=1.0).manifest["dropped"] == {"of less than 1 ASCII characters": 2}


def test_text_in_a_script_that_is_not_named_is_left_out_by_its_letters(tmp_path: Path):
    traces = texts(
        "What is α?|an angle, 90°|世界",
        "世界|是|什么 42",
        "сколько|будет|2",
        "1 + 1|= 2|2",
        "カー|かな|漢字",
        "x𝑥ª|ë|e\u0301",
    )
    store = stored(tmp_path, *traces)
    assert numbers(curated(store, scripts=["Latin"])) == [3, 5]
    assert numbers(curated(store, "v2", scripts=["Latin", "Han"], min_in_scripts=0.94)) == [1, 3, 5]
    assert numbers(curated(store, "v3", scripts=["latin", "Hani"], min_in_scripts=0.93)) == [0, 1, 3, 5]
    japanese = curated(store, "v4", scripts=["Han", "Hiragana", "Katakana"], min_in_scripts=1.0)
    assert numbers(japanese) == [1, 3, 4]
    assert japanese.manifest["dropped"] == {"of less than 1 letters in Han or Hiragana or Katakana": 3}
    assert japanese.manifest["curation"]["scripts"] == ["Han", "Hiragana", "Katakana"]


@pytest.mark.parametrize("percent", [7, 55, 57, 99])
def test_a_share_of_letters_that_is_just_enough_is_enough(percent: int, tmp_path: Path):
    of = [(latin, 100 - latin) for latin in (percent - 1, percent, percent + 1)]
    store = stored(tmp_path, *texts(*(f"{'a' * (latin - 2)}|a|{'a' + 'я' * other}" for latin, other in of)))
    assert numbers(curated(store, scripts=["Latin"], min_in_scripts=percent / 100)) == [1, 2]


@pytest.mark.parametrize("script", ["Klingon", "Lu", "", "Latin}|.", "日本語"])
def test_what_is_no_script_is_refused_by_name(script: str, tmp_path: Path):
    store = stored(tmp_path, *toys(1))
    assert f"curation.scripts: {script!r} is no script" in refusal(store, curation=CurationConfig(scripts=[script]))


def test_a_dataset_from_before_there_were_scripts_is_found_again(tmp_path: Path):
    store = stored(tmp_path, *toys(1, 2))
    assert set(built(store).manifest["curation"]) == {
        "min_characters", "max_characters", "min_steps", "max_steps", "min_ascii", "verified", "unique",
        "near_duplicates",
    }  # fmt: skip
    with pytest.raises(RequestError, match="already built and never changed; curation"):
        built(store, curation=CurationConfig(scripts=["Latin"]))


def test_only_what_an_engine_finds_true_stays(tmp_path: Path):
    true = list(high_card_duel.generate(3, seed=0))
    steps = [(step.type, step.content) for step in true[0].steps]
    false = make_trace(true[0].prompt, steps[:-1] + [("comparison", "It is a win.")], "win", true[0].meta)
    store = stored(tmp_path, *true, false, *toys(1, 2))
    dataset = curated(store, verified=True)
    assert {trace.id for trace in dataset.traces} == {trace.id for trace in true}
    assert dataset.manifest["dropped"] == {UNCHECKED: 2, UNTRUE: 1}


def test_what_no_file_to_train_on_could_hold_is_left_out_and_what_is_chosen_can_be_exported(tmp_path: Path):
    traces = [
        make_trace('"created_at": "format":', [("step", '{"step_types": 1}')], "1", {"of": {"format": 1}}),
        *[make_trace(f"{name}?", [("step", "s")], "1", {name: "mine"}) for name in sorted(NEEDED)],
    ]
    dataset = built(stored(tmp_path, *traces))
    assert dataset.manifest["dropped"] == {NAMED: len(NEEDED)} and [trace.meta for trace in dataset.traces] == [
        {"of": {"format": 1}}
    ]
    for format in FORMATS:
        assert len(list(export_lines(dataset.traces, format))) == 1
    for trace in traces[1:]:
        with pytest.raises(RequestError, match="is a name that the export needs"):
            list(export_lines([trace], "tunix_sft"))


@pytest.mark.parametrize("key", ['"format" ', '"format"\t', '"form\\u0061t"', '"\\u0066ormat" '])
def test_a_key_that_the_export_needs_is_found_however_json_spells_it(key: str, tmp_path: Path):
    record = to_json(toy(1)).decode()
    (tmp_path / "own.jsonl").write_text(record.replace('"even"', key) + "\n" + to_json(toy(2)).decode() + "\n")
    store = Store(tmp_path / "store")
    assert import_files(store, [tmp_path / "own.jsonl"]).added == 2
    dataset = built(store)
    assert numbers(dataset) == [2] and dataset.manifest["dropped"] == {NAMED: 1}


def test_of_many_sources_the_engines_and_the_commonest_are_told_by_name(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(selection, "TOLD_SOURCES", 3)
    names = ["builtin", "b", "b", "c", "c", *"adef"]
    traces = [make_trace(f"{n}?", [("step", "s")], "1", {"source": name}) for n, name in enumerate(names)]
    store = stored(tmp_path, *traces)
    sources = built(store).manifest["provenance"]["sources"]
    assert list(sources.items()) == [("b", 2), ("builtin", 1), ("c", 2), ("4 others", 4)]
    few = built(store, version="v2", filters={"source": ["c", "a", "builtin"]})
    assert few.manifest["provenance"]["sources"] == {"a": 1, "builtin": 1, "c": 2}


def test_of_duplicates_the_first_in_order_stays(tmp_path: Path):
    store = stored(tmp_path, *texts("1|2|3", "1|2|4", "1|2|3", "1|2|3"))
    dataset = curated(store, unique=True)
    assert numbers(dataset) == [0, 1] and dataset.manifest["dropped"] == {DUPLICATE: 2}


def test_a_duplicate_differs_in_no_more_than_meta(tmp_path: Path):
    assert len(curated(stored(tmp_path, *texts("1|2|34", "12|3|4", "1|23|4", "1|2|3|4")), unique=True).traces) == 4


def test_near_duplicates_are_found_and_nothing_else_is(tmp_path: Path):
    """A hundred texts of random words, each beside one with a word changed (near) and one with many (not near)."""
    source = random.Random(6)
    words = [f"w{number}" for number in range(2_000)]
    given, near = [], set()
    for number in range(100):
        text = source.sample(words, 60)
        some, many = list(text), [source.choice(words) if source.random() < 0.2 else word for word in text]
        some[30] = "other"
        given += [" ".join(text), " ".join(some), " ".join(many)]
        near.add(3 * number + 1)
    traces = [
        make_trace(text, [("s", "same")], "same", {"n": number}, created_at=f"2025-01-01T{23 - number // 60:02}:"
                   f"{59 - number % 60:02}:00Z") for number, text in enumerate(given)
    ]  # fmt: skip
    dataset = curated(stored(tmp_path, *traces), near_duplicates=0.8)
    assert set(range(300)) - set(numbers(dataset)) == near
    assert dataset.manifest["dropped"] == {NEAR_DUPLICATE: 100}


def test_the_overlap_is_that_of_the_sets_of_three_words():
    one, other = texts("a b c d|e|f", "a b c d|e|g")
    # a b c, b c d, c d e, d e f against the same but d e g
    assert jaccard(runs_of(one), runs_of(other)) == 3 / 5
    assert jaccard(runs_of(one), runs_of(one)) == 1


def test_reasons_come_one_to_a_trace_and_the_limit_last(tmp_path: Path):
    store = stored(tmp_path, *texts("1|2|3", "1|2|3", "123456|7|8", "4|5|6", "7|8|9"))
    dataset = curated(store, limit=2, max_characters=4, unique=True)
    assert numbers(dataset) == [0, 3]
    assert dataset.manifest["dropped"] == {"of more than 4 characters": 1, DUPLICATE: 1, OVER_LIMIT: 1}


def test_other_rules_are_another_dataset(tmp_path: Path):
    store = stored(tmp_path, *toys(1, 2))
    built(store)
    assert "curation" in refusal(store, curation=CurationConfig(unique=True))


def test_each_trace_may_have_a_source_of_its_own(tmp_path: Path):
    count = 2**16 + 1
    traces = (make_trace("é", [("s", "a")], "d", {"source": f"page {number}"}) for number in range(count))
    assert built(stored(tmp_path, *traces), limit=1).manifest["trace_count"] == 1


# ---- what is built ----------------------------------------------------------------------------------------


def test_the_manifest_says_what_is_inside(tmp_path: Path):
    store = stored(tmp_path, *toys(1, 22), make_trace("é", [("s", "ab"), ("s", "c")], "d", {"source": "lab"}))
    dataset = built(store, filters={"n": [1, 22]}, limit=5)
    manifest = json.loads((dataset.folder / "manifest.json").read_bytes())
    assert manifest == dataset.manifest and dataset.key == "toy-v1"
    assert manifest["trace_ids"] == [toy(22).id, toy(1).id] and manifest["trace_count"] == 2
    assert manifest["stats"] == {
        "avg_step_count": 1.0, "min_step_count": 1, "max_step_count": 1, "avg_total_chars": (3 + 5 + 2 + 2 + 4 + 1) / 2,
    }  # fmt: skip
    assert (manifest["filters"], manifest["limit"], manifest["seed"]) == ({"n": [1, 22]}, 5, None)
    assert (manifest["dataset_schema_version"], manifest["selection_strategy"]) == ("1.0", "latest")
    assert manifest["provenance"]["store_content_sha256"] == store.content_hash()
    assert sum(manifest["split"].values()) == 2
    for name, recorded in manifest["files"].items():
        path = dataset.folder / name
        assert recorded == {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    assert sorted(path.name for path in dataset.folder.iterdir()) == [
        "dropped.parquet",
        "manifest.json",
        "tokenizer.json",
        "traces.parquet",
    ]


@pytest.mark.parametrize("name", ["lab [1]", "lab *", "lab ?"])
def test_a_folder_whose_name_looks_like_a_pattern_is_that_folder(name: str, tmp_path: Path):
    built(stored(tmp_path / "lab 1", toy(2)))
    store = stored(tmp_path / name, toy(1))
    dataset = built(store)
    assert [trace.id for trace in dataset.traces] == [trace.id for trace in store.scan()] == [toy(1).id]
    assert origins_in_dataset(dataset, [toy(1).id, toy(2).id]).keys() == {toy(1).id}


def test_what_is_loaded_is_what_was_built(tmp_path: Path):
    store = stored(tmp_path, *toys(*range(5)))
    dataset = built(store)
    again = load_dataset(dataset.folder.parent, "toy-v1")
    assert again == dataset and list(again.traces) == toys(4, 3, 2, 1, 0)
    tokenizer = load_tokenizer(again.tokenizer_file)
    assert tokenizer.decode(tokenizer.encode("4? is 4")) == "4? is 4"
    assert list_datasets(dataset.folder.parent) == ["toy-v1"]


def test_the_lengths_in_the_manifest_are_those_of_the_examples_by_its_own_tokenizer(tmp_path: Path):
    dataset = built(stored(tmp_path, *toys(*range(20))))
    tokenizer = load_tokenizer(dataset.tokenizer_file)
    encoded = {trace.id: encode_example(render_example(trace), tokenizer) for trace in dataset.traces}
    recorded = dataset.manifest["lengths"]
    counts = Counter(str(len(item.tokens)) for item in encoded.values())
    assert recorded["counts"] == counts and sum(counts.values()) == dataset.manifest["trace_count"]
    assert recorded["trained_tokens"] == sum(sum(item.loss_mask) for item in encoded.values())
    assert all(len(encoded[one["id"]].tokens) == one["tokens"] for one in recorded["longest"])


def test_of_a_large_dataset_the_lengths_are_those_of_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = stored(tmp_path, *toys(*range(20)))
    monkeypatch.setattr(module, "MEASURED", 4)
    dataset = built(store)
    spread, recorded = list(dataset.traces)[::5], dataset.manifest["lengths"]
    assert list(dataset.traces.spread(4)) == spread and list(dataset.traces.spread(30)) == list(dataset.traces)
    assert recorded["examples"] == 4 and sum(recorded["counts"].values()) == 4
    assert {one["id"] for one in recorded["longest"]} == {trace.id for trace in spread}
    assert "4 examples were measured, at even distances" in dataset_card(dataset.manifest, [])


@pytest.mark.parametrize("token", ["<eos>", "\\u003ceos>", "<\\u0065os\\u003E", "<eo\\u0073>"])
def test_a_text_with_a_control_token_is_left_out_however_json_spells_it(token: str, tmp_path: Path):
    plain, name = tmp_path / "own.jsonl", "the one"
    record = to_json(toy(1, id=name)).decode()
    plain.write_text(record.replace("is 1", f"is {token}") + "\n" + to_json(toy(2)).decode() + "\n")
    store = Store(tmp_path / "store")
    assert import_files(store, [plain]).added == 2
    dataset = built(store, limit=2)
    assert numbers(dataset) == [2] and dataset.manifest["dropped"] == {CONTROL: 1}
    assert pl.read_parquet(dataset.folder / "dropped.parquet").select("id", "reason").rows() == [(name, CONTROL)]


def test_the_same_request_twice_is_the_same_dataset(tmp_path: Path):
    store = stored(tmp_path, *toys(1, 2))
    first = built(store)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in first.folder.iterdir()}
    assert built(store) == first
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in first.folder.iterdir()} == before


def test_a_key_never_means_other_content(tmp_path: Path):
    store = stored(tmp_path, *toys(1, 2))
    first = built(store, limit=2)
    assert "already built and never changed; limit 2 there, 5 asked for" in refusal(store, limit=5)
    assert "selection_strategy latest there, random asked for" in refusal(store, selection_strategy="random", seed=1)
    rules = CurationConfig(min_steps=1, unique=True)
    assert "curation.min_steps 0 there, 1 asked for; curation.unique false there" in refusal(store, curation=rules)
    store.add(toys(3))
    error = refusal(store, limit=2)
    assert f"content_sha256 {first.manifest['content_sha256'][:12]}… there" in error and "dataset_version" in error
    assert load_dataset(first.folder.parent, "toy-v1") == first


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "x" * 101, "a\0"])
def test_f39_a_hostile_name_builds_nothing(name: str, tmp_path: Path):
    store = stored(tmp_path, *toys(1))
    with pytest.raises(RequestError, match="cannot become a file name"):
        build_dataset(store, DatasetConfig(name, "v1"), {}, tmp_path / "datasets")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_same_question_is_always_on_one_side():
    prompts = [high_card_duel.question(deal) for deal in high_card_duel.all_deals()]
    held = [prompt for prompt in prompts if is_held_out(prompt)]
    assert (len(held), len(prompts)) == (128, 2_652)  # a run that goes on trains on what it trained on before
    ace = "High Card Duel: you hold the ace of spades and your opponent reveals the {}. What is your result?"
    assert is_held_out(ace.format("nine of diamonds")) and not is_held_out(ace.format("two of spades"))


# ---- damage and concurrency -------------------------------------------------------------------------------


def test_f35_a_damaged_file_is_named_before_it_is_used(tmp_path: Path):
    dataset = built(stored(tmp_path, *toys(*range(5))))
    for name in ("traces.parquet", "tokenizer.json"):
        path = dataset.folder / name
        whole = path.read_bytes()
        for at in range(0, len(whole), len(whole) // 10):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(RetraceError, match=f"{name}: not what the manifest recorded"):
                load_dataset(dataset.folder.parent, "toy-v1")
        path.unlink()
        with pytest.raises(RetraceError, match=f"{name}: not what the manifest recorded"):
            load_dataset(dataset.folder.parent, "toy-v1")
        path.write_bytes(whole)
    assert load_dataset(dataset.folder.parent, "toy-v1") == dataset


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"dataset_schema_version": "1.0"}'])
def test_f37_a_damaged_manifest_is_named(content: str, tmp_path: Path):
    dataset = built(stored(tmp_path, *toys(1)))
    (dataset.folder / "manifest.json").write_text(content)
    with pytest.raises(RetraceError, match="manifest.json: damaged"):
        load_dataset(dataset.folder.parent, "toy-v1")


def test_f50_a_later_schema_is_refused_by_version(tmp_path: Path):
    dataset = built(stored(tmp_path, *toys(1)))
    (dataset.folder / "manifest.json").write_text(json.dumps(dataset.manifest | {"dataset_schema_version": "2.0"}))
    with pytest.raises(RequestError, match="dataset_schema_version '2.0' is not known, only '1.0'"):
        load_dataset(dataset.folder.parent, "toy-v1")


def test_a_dataset_that_is_not_built_is_told_from_those_that_are(tmp_path: Path):
    built(stored(tmp_path, *toys(1)))
    (tmp_path / "datasets" / ".half").mkdir()
    with pytest.raises(RequestError, match="dataset toy-v2: not built; datasets here: toy-v1"):
        load_dataset(tmp_path / "datasets", "toy-v2")
    with pytest.raises(RequestError, match="datasets here: none"):
        load_dataset(tmp_path / "elsewhere", "toy-v1")


def test_f23_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = stored(tmp_path, *toys(1))
    monkeypatch.setattr(module, "write_json", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        built(store)
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == [".lock"]


def test_f26_what_a_killed_build_left_is_swept_by_the_next(tmp_path: Path):
    stops = "from lib.data import dataset; dataset.write_json = lambda *_: os._exit(9)"
    killed = BUILD.replace("home =", f"{stops}\nhome =")
    store = stored(tmp_path, *toys(1, 2))
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path)], cwd=repository_root()).returncode == 9
    assert list((tmp_path / "datasets").glob(".*/traces.parquet"))
    built(store, version="v2")
    assert sorted(path.name for path in (tmp_path / "datasets").iterdir()) == [".lock", "toy-v2"]


def test_what_is_left_stays_while_somebody_builds(tmp_path: Path):
    sweep_datasets(tmp_path / "datasets")
    assert not (tmp_path / "datasets").exists()
    left = tmp_path / "datasets" / ".toy-v1.abcd_123.tmp"
    left.mkdir(parents=True)
    with FileLock(tmp_path / "datasets" / ".lock"):
        sweep_datasets(tmp_path / "datasets")
    assert left.is_dir()
    sweep_datasets(tmp_path / "datasets")
    assert not left.exists()


def test_a_hidden_folder_of_anybody_else_stays(tmp_path: Path):
    for name in (".git", ".dvc", ".toy-v1", ".cache.tmp"):
        (tmp_path / "datasets" / name).mkdir(parents=True)
    built(stored(tmp_path, *toys(1)))
    found = sorted(path.name for path in (tmp_path / "datasets").iterdir())
    assert found == [".cache.tmp", ".dvc", ".git", ".lock", ".toy-v1", "toy-v1"]


BUILD = """
import os, sys
from pathlib import Path
from lib.config import DatasetConfig
from lib.data.dataset import build_dataset
from lib.data.store import Store
home = Path(sys.argv[1])
print(build_dataset(Store(home / "store"), DatasetConfig("toy", "v1"), {}, home / "datasets").manifest["created_at"])
"""


def test_two_processes_building_at_once_end_with_one_dataset(tmp_path: Path):
    stored(tmp_path, *high_card_duel.generate(300, seed=0))
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    both = [subprocess.Popen(command, cwd=repository_root(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(said) == 1
    assert [path.name for path in (tmp_path / "datasets").glob("[!.]*")] == ["toy-v1"]


BY_COMMAND = """
import json, os, sys
from pathlib import Path
home, cores, *imports = json.loads(sys.argv[1])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, cores)
from lib.__main__ import main
from lib.data import frames
frames.PART_ROWS, frames.PART_BYTES = 40, 1  # as if there were many more
flags = {"latest": ["--unique", "--scripts", "Latin"], "random": ["--strategy", "random", "--seed", "3"]}
for files in imports:
    assert not main(["--home", home, "traces", "import", *files])
for name in flags:
    assert not main(["--home", home, "dataset", "build", "--name", name, "--version", "v1", *flags[name]])
    manifest = json.loads(Path(home, f"datasets/{name}-v1/manifest.json").read_bytes())
    told = ("content_sha256", "trace_ids", "stats", "split", "dropped", "lengths")
    print("told", json.dumps([manifest["files"]["tokenizer.json"], *(manifest[what] for what in told)]))
"""


def test_f48_shuffled_files_and_other_cores_make_the_same_dataset(tmp_path: Path):
    """By command: from one file on all cores, and from three with the lines shuffled, in two imports, on one core."""
    traces = list(high_card_duel.generate(300, seed=0, created_at="2025-01-01T00:00:00Z"))
    lines = [to_json(trace) + b"\n" for trace in traces]
    shuffled = random.Random(1).sample(lines, len(lines))
    for name, some in {"all": lines, "a": shuffled[:50], "b": shuffled[50:190], "c": shuffled[190:]}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(some))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # macOS pins no process
    imports = {"one": [["all"]], "other": [["c"], ["a", "b"]]}
    threads = {"one": {}, "other": {"POLARS_MAX_THREADS": "1"}}
    said = {}
    for home, names in imports.items():
        files = [[str(tmp_path / f"{name}.jsonl") for name in some] for some in names]
        asked = json.dumps([str(tmp_path / home), cores if home == "one" else cores[:1], *files])
        done = subprocess.run(
            [sys.executable, "-c", BY_COMMAND, asked],
            cwd=repository_root(), env=os.environ | threads[home], capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[home] = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("told ")]
    assert said["one"] == said["other"] and len(said["one"]) == 2
    assert said["one"][0][1] != said["one"][1][1]


def test_f48_the_content_hash_knows_no_clock_and_no_import_order(tmp_path: Path):
    hashes = set()
    for place, order in (("one", [0, 1, 2]), ("other", [2, 0, 1])):
        dataset = built(stored(tmp_path / place, *toys(*order)))
        assert dataset.manifest["content_sha256"] == sha256_bytes(
            "\n".join(map(content_sha256, dataset.traces)).encode()
        )
        hashes.add(
            (dataset.manifest["content_sha256"], dataset.manifest["build_id"], sha256_file(dataset.tokenizer_file))
        )
    assert len(hashes) == 1
