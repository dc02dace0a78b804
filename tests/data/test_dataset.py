"""A dataset: chosen by its request alone, whole or not there, and never other content under the same key."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lib.config import DatasetConfig, TracesConfig
from lib.data import dataset as module
from lib.data.dataset import (
    NOT_PLAYED,
    Dataset,
    build_dataset,
    choose,
    is_held_out,
    list_datasets,
    load_dataset,
    trace_groups,
)
from lib.data.store import Store
from lib.data.tokenizer import load_tokenizer
from lib.errors import RequestError, RetraceError
from lib.files import repository_root, sha256_file
from lib.tasks import group_keys, high_card_duel
from lib.trace import Trace, content_sha256, make_trace


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


def test_a_selection_that_is_asked_to_the_last_trace_is_refused(tmp_path: Path):
    store = stored(tmp_path, *toys(1, 2))
    with pytest.raises(RequestError, match=r"all 2 traces that match are left out \(2 asked in eval set sums\)"):
        built(store, dict.fromkeys(group_keys("1?") | group_keys("2?"), "sums"))


def test_a_dataset_of_a_run_holds_no_deal_that_the_run_does_not_play(tmp_path: Path):
    """The store is shared: what others played must not change what a configuration means."""
    store = stored(tmp_path, *high_card_duel.generate(30, seed=7), *high_card_duel.generate(30, seed=900), *toys(1))
    request = DatasetConfig("duel", "v1", selection_strategy="random", seed=1)
    played = TracesConfig(game="high_card_duel", count=20, seed=7)
    traces, dropped = choose(store, request, {}, played)
    duels = [trace.meta["episode_index"] for trace in traces if trace.meta.get("game") == "high_card_duel"]
    assert sorted(duels) == list(range(20)) and len(traces) == 21
    assert dropped == {NOT_PLAYED: 40}


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
        "manifest.json",
        "tokenizer.json",
        "traces.parquet",
    ]


def test_what_is_loaded_is_what_was_built(tmp_path: Path):
    store = stored(tmp_path, *toys(*range(5)))
    dataset = built(store)
    again = load_dataset(dataset.folder.parent, "toy-v1")
    assert again == dataset and again.traces == toys(4, 3, 2, 1, 0)
    tokenizer = load_tokenizer(again.tokenizer_file)
    assert tokenizer.decode(tokenizer.encode("4? is 4")) == "4? is 4"
    assert list_datasets(dataset.folder.parent) == ["toy-v1"]


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
    assert 0.03 < len(held) / len(prompts) < 0.07
    assert held == [prompt for prompt in prompts if is_held_out(prompt)]


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
    left = tmp_path / "datasets" / ".toy-v0.abc123"
    left.mkdir(parents=True)
    (left / "traces.parquet").write_bytes(b"half")
    built(stored(tmp_path, *toys(1, 2)))
    assert sorted(path.name for path in (tmp_path / "datasets").iterdir()) == [".lock", "toy-v1"]


BUILD = """
import sys
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


def test_f48_the_content_hash_knows_no_clock_and_no_import_order(tmp_path: Path):
    hashes = set()
    for place, order in (("one", [0, 1, 2]), ("other", [2, 0, 1])):
        dataset = built(stored(tmp_path / place, *toys(*order)))
        assert dataset.manifest["content_sha256"] == module._sha("\n".join(map(content_sha256, dataset.traces)))
        hashes.add(
            (dataset.manifest["content_sha256"], dataset.manifest["build_id"], sha256_file(dataset.tokenizer_file))
        )
    assert len(hashes) == 1
