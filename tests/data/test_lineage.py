"""Every trace leads back to the file and line that it was read from, or to the game and seed it was played with."""

import json
from pathlib import Path

import pytest

from lib.__main__ import main
from lib.config import DatasetConfig
from lib.data.dataset import build_dataset
from lib.data.importing import import_files
from lib.data.lineage import origins_in_dataset, origins_in_store
from lib.data.store import Store
from lib.experiments.stages import find_traces, store
from lib.tasks import high_card_duel
from lib.trace import make_trace, to_json


def line(number: int) -> str:
    trace = make_trace(f"{number}?", [("s", "it is")], str(number), {"source": "lab"}, id=f"t{number:03}")
    return to_json(trace).decode()


def test_each_trace_leads_to_its_line_whatever_stands_between(tmp_path: Path):
    """Blank and bad lines count, the second file begins anew, and of content that came twice the first counts."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(f"{line(0)}\n\n{line(1)}\nnot json\n{line(2)}\n")
    second.write_text("[" + ",\n".join(line(n) for n in (1, 3)) + "]")
    place = Store(tmp_path / "store")
    import_files(place, [first, second], "quarantine")
    import_files(place, [second])
    place.add(high_card_duel.generate(1, seed=5))
    expected = {
        "t000": f"{first}:1", "t001": f"{first}:3", "t002": f"{first}:5", "t003": f"{second}:2",
    }  # fmt: skip
    found = {origin.trace.id: str(origin) for origin in origins_in_store(place, "")}
    assert {id: found.pop(id) for id in expected} == expected
    assert list(found.values()) == ["high_card_duel, seed 5, episode 0, by builtin"]
    dataset = build_dataset(place, DatasetConfig("toy", "v1"), {}, tmp_path / "datasets")
    chosen = origins_in_dataset(dataset, ["t003", "t001", "absent"])
    assert {id: str(origin) for id, origin in chosen.items()} == {id: expected[id] for id in ("t001", "t003")}


def test_many_thousand_lines_keep_their_numbers(tmp_path: Path):
    file, place = tmp_path / "a.jsonl", Store(tmp_path / "store")
    file.write_text("".join(f"{line(n)}\n" if n % 7 else "\n" for n in range(9_000)))
    import_files(place, [file])
    origins = origins_in_store(place, "t")
    assert len(origins) == 9_000 - 1286
    assert all(origin.line == int(origin.trace.final_answer) + 1 for origin in origins)


def test_traces_show_tells_the_trace_and_where_it_is_from(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "a.jsonl").write_text(f"{line(0)}\n{line(1)}\n")
    import_files(store(), [tmp_path / "a.jsonl"])
    assert main(["traces", "show", "t001"]) == 0
    said = capsys.readouterr().out
    assert f"from {tmp_path}/a.jsonl:2\n1?\n1. it is\nAnswer: 1\n" in said
    assert main(["traces", "show", "t00", "--json"]) == 0
    assert [json.loads(one)["line"] for one in capsys.readouterr().out.splitlines()] == [1, 2]
    assert main(["traces", "show", "t00"]) == 2
    assert "2 ids begin so" in capsys.readouterr().err
    assert main(["traces", "show", "absent"]) == 2
    assert "holds none whose id begins so" in capsys.readouterr().err
    assert len(find_traces("t")) == 2


def test_a_whole_id_is_that_trace_though_others_begin_so(capsys: pytest.CaptureFixture):
    store().add(make_trace(f"{id}?", [("s", "it is")], id, {}, id=id) for id in ("q1", "q10", "q11"))
    assert [origin.trace.id for origin in find_traces("q1")] == ["q1"]
    assert len(find_traces("q")) == 3
    assert main(["traces", "show", "q1"]) == 0
    assert "Answer: q1\n" in capsys.readouterr().out
