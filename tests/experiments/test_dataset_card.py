"""The card of a dataset: every value of the manifest, nothing else, and nothing in it that acts."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import PAYLOADS
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from msgspec.structs import replace

from lib.__main__ import main
from lib.config import DatasetConfig, TracesConfig
from lib.data.dataset import Dataset, build_dataset, load_dataset, read_manifest
from lib.data.export import FORMATS, export_lines
from lib.data.selection import NOT_PLAYED
from lib.data.store import Store
from lib.experiments.dataset_card import Export, dataset_card, exports_in
from lib.tasks import high_card_duel

HEADINGS = [
    "Where the traces come from", "How they were chosen", "What was left out", "Split", "Statistics", "Tokens",
    "Provenance", "Use", "Build it again", "Licence",
]  # fmt: skip


@pytest.fixture
def duel(home: Path) -> Dataset:
    """Thirty of forty episodes, one question of which is reserved."""
    store = Store(home / "store")
    traces = list(high_card_duel.generate(40, seed=0, created_at="2025-01-01T00:00:00Z"))
    store.add(traces)
    request = DatasetConfig(
        "duel", "v1", filters={"game": ["high_card_duel", 'no: "&x']}, limit=30, selection_strategy="random", seed=7
    )
    reserved = {f"prompt: {' '.join(traces[3].prompt.casefold().split())}": "duels_v1"}
    return build_dataset(store, request, reserved, home / "datasets")


def plain(text: str) -> str:
    """The card without the escapes of Markdown."""
    return re.sub(r"\\(.)", r"\1", text)


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in plain(text).splitlines()
             if line.startswith("| ")]  # fmt: skip
    return {first: rest for first, *rest in cells}


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def test_every_value_of_the_manifest_is_on_the_card(duel: Dataset):
    manifest = duel.manifest | {"session_id": "s-17", "provenance": duel.manifest["provenance"] | {"parents": ["p-1"]}}
    text = plain(dataset_card(manifest, []))
    told = {name: value for name, value in manifest.items() if name != "trace_ids"}
    told["lengths"] = {name: told["lengths"][name] for name in told["lengths"] if name not in ("counts", "longest")}
    sections = {"trace_count", "split", "stats", "files", "provenance", "lengths", "dropped", "filters", "sources"}
    for value in [value for value in leaves(told) if value not in sections | {"sha256", "bytes", "dataset_key"}]:
        shown = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        assert shown in text or json.dumps(shown) in text, value
    assert f"# {duel.key}\n" in text and "s-17" in text and '["p-1"]' in text


def test_what_is_here_and_what_was_left_out_are_all_that_matched(duel: Dataset):
    found = rows(dataset_card(duel.manifest, []))
    assert found["**here**"] == ["30"] and found["over the limit"] == ["9"]
    assert found["asked in eval set duels_v1"] == ["1"] and found["**all that match**"] == ["40"]
    assert found["builtin"] == ["30", "100.0 %"]
    assert sum(int(found[side][0]) for side in ("train", "held_out")) == 30
    assert "Nothing: all 30 traces that match are here." in dataset_card(duel.manifest | {"dropped": {}}, [])


def test_the_tokens_are_counted_in_bands_and_against_limits(duel: Dataset):
    text, lengths = dataset_card(duel.manifest, []), duel.manifest["lengths"]
    found = rows(text)
    limits = {int(name): int(*rest) for name, rest in found.items() if name.isdigit() and len(rest) == 1}
    assert limits[lengths["max"]] == 0 and max(limits) >= lengths["max"] and len(limits) > 1
    for limit, over in limits.items():
        assert over == sum(count for length, count in lengths["counts"].items() if int(length) > limit)


def test_the_header_is_one_the_hub_reads_and_invents_nothing(duel: Dataset):
    found = DatasetCard(dataset_card(duel.manifest, [Export("a.jsonl", "messages")])).data.to_dict()
    assert found == {
        "pretty_name": "duel v1", "size_categories": ["n<1K"], "task_categories": ["text-generation"],
        "tags": ["reasoning-traces", "sft", "retrace"],
        "configs": [{"config_name": "a", "data_files": [{"split": "train", "path": "a.jsonl"}]}],
    }  # fmt: skip
    assert "configs" not in DatasetCard(dataset_card(duel.manifest, [])).data.to_dict()


@pytest.mark.parametrize(
    "count, said", [(999, "n<1K"), (1_000, "1K<n<10K"), (99_999, "10K<n<100K"), (10_000_000, "10M<n<100M")]
)
def test_the_size_is_in_the_words_of_the_hub(count: int, said: str, duel: Dataset):
    text = dataset_card(duel.manifest | {"trace_count": count}, [])
    assert DatasetCard(text).data.to_dict()["size_categories"] == [said]


def test_a_file_beside_the_card_is_named_where_it_is_the_whole_dataset(duel: Dataset, tmp_path: Path):
    for format in FORMATS:
        (tmp_path / f"{format}.jsonl").write_bytes(b"".join(export_lines(duel.traces, format)))
    whole = (tmp_path / "messages.jsonl").read_bytes().splitlines(keepends=True)
    others = {
        "part": whole[:-1], "more": [*whole, whole[0]], "order": whole[::-1], "empty": [], "bad": [b"{", *whole[1:]],
        "list": [b"[]\n", *whole[1:]], "mixed": [*whole[:-1], *(tmp_path / "trace.jsonl").open("rb").readlines()[-1:]],
        "answers": export_lines(duel.traces, "messages", "answer_sft_v1"),
        "shuffled": export_lines(duel.traces, "messages", "shuffled_answers"), "name with *": whole, "-v": whole,
    }  # fmt: skip
    for name, lines in others.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "traces.parquet").write_bytes(b"another")
    assert exports_in(tmp_path, duel) == [Export(f"{format}.jsonl", format) for format in sorted(FORMATS)]
    shutil.copy(duel.folder / "traces.parquet", tmp_path)
    assert exports_in(tmp_path, duel)[-1] == Export("traces.parquet", "parquet")


def test_the_request_on_the_card_builds_the_dataset_again(duel: Dataset, tmp_path: Path):
    text = dataset_card(duel.manifest, [])
    [request] = [block for block in re.findall(r"```text\n(.*?)\n```", text, re.DOTALL) if "dataset_name: " in block]
    (tmp_path / "request.yaml").write_text(request)
    shutil.move(duel.folder, tmp_path / "kept")
    assert "python -m lib dataset build --request request.yaml" in text
    assert main(["dataset", "build", "--request", str(tmp_path / "request.yaml")]) == 0
    again, names = read_manifest(duel.folder.parent, "duel-v1"), ("filters", "limit", "seed", "selection_strategy")
    assert {name: again[name] for name in names} == {name: duel.manifest[name] for name in names}


def test_of_a_dataset_that_a_run_built_the_card_says_that_only_the_run_builds_it(duel: Dataset, home: Path):
    generated = TracesConfig(game="high_card_duel", count=20, seed=0)
    built = build_dataset(Store(home / "store"), DatasetConfig("run", "v1"), {}, home / "datasets", generated)
    assert "only that run builds the same" in dataset_card(built.manifest, [])
    assert "It was built by a run" not in dataset_card(duel.manifest, [])


def test_of_what_a_run_may_have_played_at_several_times_the_card_promises_no_more_than_is_so(home: Path):
    store, config = Store(home / "store"), DatasetConfig("twice", "v1", limit=10)
    store.add(high_card_duel.generate(30, seed=0, created_at="2025-01-01T00:00:00Z"))
    store.add(high_card_duel.generate(60, seed=0, created_at="2025-02-01T00:00:00Z"))
    generated = TracesConfig(game="high_card_duel", count=60, seed=0)
    by_run = build_dataset(store, config, {}, home / "datasets", generated)
    by_hand = build_dataset(store, config, {}, home / "others")
    assert NOT_PLAYED not in by_run.manifest["dropped"]
    assert by_run.manifest["content_sha256"] != by_hand.manifest["content_sha256"]
    assert "only that run builds the same" in dataset_card(by_run.manifest, [])


def test_the_command_prints_the_card_or_writes_it(duel: Dataset, tmp_path: Path, capfdbinary):
    assert main(["dataset", "card", "duel-v1"]) == 0
    printed = capfdbinary.readouterr().out.decode()
    assert printed == dataset_card(duel.manifest, [Export("traces.parquet", "parquet")])
    assert main(["dataset", "card", "duel-v1", "--output", str(tmp_path / "out" / "README.md")]) == 0
    assert (tmp_path / "out" / "README.md").read_text("utf-8") == dataset_card(duel.manifest, [])
    assert main(["dataset", "card", "absent-v1"]) == 2


def test_what_others_wrote_is_no_markup_on_the_card(home: Path, tmp_path: Path):
    hostile = "\n".join(PAYLOADS.values())
    manifest = build_hostile(home, hostile).manifest
    manifest |= {"dataset_key": hostile, "dataset_name": hostile, "dataset_version": hostile, "session_id": hostile}
    manifest |= {"filters": {hostile: [hostile, 1]}, "dropped": {hostile: 3}, hostile: {hostile: hostile}}
    manifest["provenance"] |= {hostile: hostile, "parents": [{hostile: hostile}]}
    text = dataset_card(manifest, [Export("x.jsonl", "messages")])
    header, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(header)["pretty_name"] == f"{hostile} {hostile}"
    assert set(yaml.safe_load(header)) == {"pretty_name", "size_categories", "task_categories", "tags", "configs"}
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    within = {child.type for token in tokens for child in token.children or []}
    assert within <= {"text", "softbreak", "strong_open", "strong_close", "code_inline"}
    marks = [(mark.tag, after.content) for mark, after in zip(tokens, tokens[1:], strict=False)
             if mark.type == "heading_open"]  # fmt: skip
    assert [content for tag, content in marks if tag == "h2"] == HEADINGS and len(marks) == 1 + len(HEADINGS)
    assert not {token.type for token in tokens} & {"html_block", "code_block", "blockquote_open", "bullet_list_open"}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def build_hostile(home: Path, text: str) -> Dataset:
    """One trace whose source is the text."""
    [trace] = high_card_duel.generate(1, seed=0)
    store = Store(home / "store")
    store.add([replace(trace, meta={"source": text}, id="hostile")])
    build_dataset(store, DatasetConfig("hostile", "v1"), {}, home / "datasets")
    return load_dataset(home / "datasets", "hostile-v1")
