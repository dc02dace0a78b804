"""Hostile files to import, made by chance and always the same ones: each is accounted for, and nothing else happens.

A few hundred in `make test`; 10,000 where RETRACE_FAULTS=full is in the environment, as in `make test-faults`.
"""

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.data.export import FORMATS, export_lines
from lib.data.importing import import_files
from lib.data.store import Store
from lib.errors import RequestError
from lib.trace import make_trace, to_json

FULL = os.environ.get("RETRACE_FAULTS") == "full"
FILES = 10_000 if FULL else 300

TIME = "2025-01-01T00:00:00+02:00"
TRACES = [
    make_trace("2+2?", [("step", "two and two"), ("count", "make four")], "4", {"source": "lab"}, created_at=TIME),
    make_trace(
        '"a", [b] \\', [("step", "é 😀\n\t\\")], "{}", {"x": [1, -0.0, None, {"y": "z"}], "": True}, "mine", TIME
    ),
    make_trace("q", [("s", "c")], "a", {}, created_at=TIME),
]
EVALUATED = {"completion": "Answer: 4", "score": 1, "verdict": "correct", "num_tokens": 3, "logprob": -0.5}
RECORDS = [
    *map(to_json, TRACES),
    *(json.dumps(json.loads(to_json(trace)), indent=None if trace.id == "mine" else 1).encode() for trace in TRACES),
    *(line.rstrip(b"\n") for format in FORMATS for line in export_lines(TRACES[:2], format)),
    json.dumps(json.loads(to_json(TRACES[0])) | EVALUATED).encode(),
    b'{"steps":[{"i":9,"type":"t","content":"c"},{"i":2,"type":"t","content":"b"}],"prompt":"p","final_answer":"f",'
    b'"trace_version":"1.0"}',
    rb'{"question":"q","answer":"<<1+1=2>>s\n#### 2","metadata":{"source":"lab"}}',
    rb'{"id":"c","prompt":"p","completion":"s\nThe answer is \\boxed{2}."}',
    rb'{"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"},'
    rb'{"role":"assistant","content":"<think>t</think>a"}]}',
]

# What a record is replaced by, and what is put in place of one of its values or between its bytes.
INSTEAD = [
    b"",
    b" \t",
    b"\r",
    b"null",
    b"7",
    b"[]",
    b"{}",
    b'"x"',
    b"[" * 100_000,
    b'{"a":' * 5_000,
    b"\0\0",
    b"x" * 70_000,
]
INSTEAD += [b'{"prompt": "' + b"x" * ((1 << 20) + 5) + b'"}', b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xef\xbb\xbf"]
VALUES = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"%d" % 2**63,
    b"1" * 5_000,
    b"null",
    b"true",
    b"1.0",
    b"-1",
    b"[]",
    b'{"a":{}}',
]
VALUES += [
    b'""',
    rb'"\ud800"',
    rb'"\u0000"',
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b"[" * 200 + b"]" * 200,
    b'"%s"' % (b"x" * 50_001),
]
BETWEEN = [
    b"\0",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"prompt":"again",',
    b'"late":1,',
    b'"i":0,',
]


@st.composite
def records(draw: st.DrawFn) -> bytes:
    """One record, whole or spoilt in one way."""
    record = draw(st.sampled_from(RECORDS))
    kind = draw(st.sampled_from(["whole", "whole", "whole", "cut", "flipped", "between", "value", "instead"]))
    if kind == "instead":
        return draw(st.sampled_from(INSTEAD))
    at = draw(st.integers(0, len(record) - 1))
    if kind == "cut":
        return record[:at]
    if kind == "flipped":
        return record[:at] + bytes([record[at] ^ 1 << draw(st.integers(0, 7))]) + record[at + 1 :]
    if kind == "between":
        return record[:at] + draw(st.sampled_from(BETWEEN)) + record[at:]
    if kind == "value":
        places = [place for place in range(len(record)) if record[place : place + 1] == b":"]
        place = places[at % len(places)] + 1
        end = min((found for mark in (b",", b"}") if (found := record.find(mark, place)) >= 0), default=len(record))
        return record[:place] + draw(st.sampled_from(VALUES)) + record[end:]
    return record


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A kind of file, and its bytes."""
    kind = draw(st.sampled_from(["jsonl", "jsonl", "jsonl", "array", "traces", "described", "garbage"]))
    if kind == "garbage":
        source = random.Random(draw(st.integers(0, 2**32)))
        return kind, draw(
            st.sampled_from([b"", b"\x1f\x8b\x08\0", b"PK\x03\x04", b"[", b'{"traces":['])
        ) + source.randbytes(300)
    content = draw(st.lists(records(), max_size=6))
    bom = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"]))
    if kind == "jsonl":
        end = draw(st.sampled_from([b"\n", b"\r\n"]))
        return kind, bom + end.join(record.replace(b"\n", b" ") for record in content) + draw(
            st.sampled_from([b"", end, end * 3])
        )
    opening, closing = {
        "array": (b"[", b"]"),
        "traces": (b'{"traces": [', b"]}"),
        "described": (b'{"from": "a \\"lab\\"", "n": 3,\n"traces": [', b'], "whole": true}'),
    }[kind]
    closing = draw(st.sampled_from([closing, closing, closing + b"\n", closing[:-1], closing + b"]", b""]))
    return kind, bom + opening + draw(st.sampled_from([b",", b" ,\n"])).join(content) + closing


def test_f11_fuzzed_files_are_accounted_for_and_nothing_else_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    sums: Counter[str] = Counter()

    @settings(
        max_examples=FILES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(files())
    def check(file: tuple[str, bytes]) -> None:
        kind, content = file
        folder = tmp_path / str(sums["files"])
        sums.update(files=1, **{kind: 1})
        path = folder / "in" / "fuzzed.jsonl"
        path.parent.mkdir(parents=True)
        (tmp_path / "temporary").mkdir(exist_ok=True)
        path.write_bytes(content)
        before = listing(tmp_path, folder / "home")
        quarantined = outcome(folder / "home" / "quarantine", path, "quarantine")
        refused = outcome(folder / "home" / "refuse", path, "refuse")
        assert listing(tmp_path, folder / "home") == before
        sums.update(quarantined, refused=not quarantined)
        assert bool(refused) == bool(quarantined and not quarantined["rejected"])
        is_array = content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        if kind == "jsonl" and quarantined and not is_array:
            assert quarantined["lines"] == lines(content)
        if kind in ("array", "traces", "described") and quarantined and (expected := elements(content)) is not None:
            assert quarantined["lines"] == expected
            sums.update(whole=1)
        shutil.rmtree(folder)

    check()
    print(f"{sums['files']} files, {sums['refused']} of them refused whole: {sums['lines']} lines = "
          f"{sums['accepted']} accepted + {sums['rejected']} rejected + {sums['blank']} blank")  # fmt: skip
    met = ("accepted", "rejected", "blank", "refused", "garbage", "array", "whole")
    assert sums["files"] >= FILES and min(sums[what] for what in met) > FILES // 50


def elements(content: bytes) -> int | None:
    """How many elements the array has, or that under `traces`; None where the file is no JSON as a whole.

    A list of texts under `traces` is a field of a record, so such a file is one of lines.
    """
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if isinstance(whole, list):
        return len(whole)
    return lines(content) if isinstance(next(iter(whole["traces"]), None), str) else len(whole["traces"])


def lines(content: bytes) -> int:
    return content.count(b"\n") + (content[-1:] not in (b"\n", b""))


def outcome(home: Path, path: Path, on_bad_record: str) -> dict[str, int]:
    """What the import counted; nothing where it was refused, which must be in plain words and leave nothing."""
    store = Store(home / "store")
    try:
        report = import_files(store, [path], on_bad_record, home / "rejects")
    except RequestError as error:
        told = str(error).split("\n")
        assert len(told) <= 6 and all(line.isprintable() and len(line) < 1_000 for line in told), told
        assert all(str(path) in line or line.startswith("trace id") for line in (told[:-1] or told)), told
        left = {path.name for path in home.rglob("*") if path.is_file()} - {".lock"}
        assert store.count() == 0 and (on_bad_record == "quarantine" or not left)
        return {}
    assert report.added + report.duplicates == report.accepted and report.added == store.count()
    rejects = report.rejects_file.read_bytes().splitlines() if report.rejects_file else []
    assert len(rejects) == report.rejected and all(json.loads(line)["expected"] for line in rejects)
    return {name: getattr(report, name) for name in ("lines", "accepted", "rejected", "blank")}


def listing(folder: Path, without: Path) -> dict[Path, int]:
    """Every file under the folder and its size, but for those under `without`."""
    return {path: path.stat().st_size for path in folder.rglob("*") if without not in (path, *path.parents)}
