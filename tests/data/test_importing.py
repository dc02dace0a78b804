"""Importing: three kinds of file, every line accounted for, all or nothing unless quarantine is asked for."""

import json
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import importing, json_files
from lib.data.export import FORMATS, export_lines
from lib.data.importing import Accepted, Blank, Rejected, import_files, read_traces
from lib.data.renderer import CONTROL_TOKENS
from lib.data.store import Added, Store
from lib.errors import RequestError
from lib.files import repository_root
from lib.trace import Trace, content_sha256, make_trace, parse_trace, to_json

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0"
CONVERSATION = (
    "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n"
    "Reasoning:\n1. two and two\n2. make four\nAnswer: 4<end_of_turn>"
)
META = {"source": "lab", "seed": 7}
METADATA = {"created_at": "2025-01-01T00:00:00.000000Z", "trace_version": "1.0", **META}


def toy(number: int = 0, **changes) -> dict:
    return {
        "trace_version": "1.0",
        "prompt": f"{number}+1?",
        "steps": [{"i": 0, "type": "step", "content": f'"{number}, [1]" \\'}],
        "final_answer": str(number + 1),
        "meta": {"source": "lab"},
    } | changes


def lines(count: int) -> list[bytes]:
    return [json.dumps(toy(number)).encode() for number in range(count)]


def written(folder: Path, content: bytes, name: str = "toy.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def refusal(folder: Path, content: bytes) -> str:
    """The error of an import that must leave no store behind."""
    store = Store(folder / "store")
    with pytest.raises(RequestError) as caught:
        import_files(store, [written(folder, content)])
    assert not store.folder.exists()
    return str(caught.value)


def test_an_id_that_is_taken_is_told_with_its_file_and_line(tmp_path: Path):
    store, first = Store(tmp_path / "store"), toy(1, id="mine")
    import_files(store, [written(tmp_path, json.dumps(first).encode())])
    before = store.content_hash()
    taken, other = (json.dumps(toy(number, id="mine")).encode() for number in (2, 3))
    for content in (b"\n".join([*lines(1), b"", taken]), b"\n\n" + other + b"\n" + taken):
        more = written(tmp_path, content, "more.jsonl")
        with pytest.raises(RequestError) as caught:
            import_files(store, [more])
        assert str(caught.value).startswith(f"{more}:3: trace id 'mine' is taken by other content; ")
    assert store.content_hash() == before


def imported(folder: Path, content: bytes) -> tuple[str, int]:
    store = Store(folder / f"store-{random.getrandbits(64):x}")
    report = import_files(store, [written(folder, content)])
    return store.content_hash(), report.accepted


# ---- faults of a record -----------------------------------------------------------------------------------


def test_f01_cut_line_is_rejected_with_its_line(tmp_path: Path):
    good = lines(3)
    error = refusal(tmp_path, b"\n".join([good[0], good[1][:40], good[2]]))
    assert error.startswith(f"{tmp_path}/toy.jsonl:2: field record: expected valid JSON, got Unterminated string")
    assert "\n" not in error and "nothing was imported" in error


def test_f02_wrong_type_at_line_250_is_refused(tmp_path: Path):
    content = lines(300)
    content[249] = content[249].replace(b'"i": 0', b'"i": "x"')
    assert "toy.jsonl:250: field steps[0].i: expected int, got 'x';" in refusal(tmp_path, b"\n".join(content))


def test_f03_late_key_at_line_250_is_refused_and_late_meta_key_is_kept(tmp_path: Path):
    content = lines(300)
    content[249] = json.dumps(toy(249, meta={"late": [1]})).encode()
    records = list(read_traces(written(tmp_path, b"\n".join(content))))
    assert records[249].trace.meta == {"late": [1]}
    content[249] = json.dumps(toy(249, late=1)).encode()
    assert "toy.jsonl:250: field late: expected no such field, got 1" in refusal(tmp_path, b"\n".join(content))


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("f04", b'"lab"', b"NaN"),
        ("f04", b'"lab"', b"1e999"),
        ("f05", b'"lab"', b"9223372036854775808"),
        ("f06", b'"prompt":', b'"prompt": "first", "prompt":'),
        ("f08", b"lab", b"\xff"),
        ("f08", b"lab", rb"\ud800"),
        ("f08", b"lab", rb"\u0000"),
    ],
)
def test_f04_f05_f06_f08_bad_values_are_rejected_in_every_kind_of_file(name, old, new, tmp_path: Path):
    good, bad = lines(2)[0], lines(2)[1].replace(old, new)
    for content in (b"%s\n%s\n", b"[%s,\n%s]", b'{"traces": [%s,\n%s]}'):
        assert "toy.jsonl:2: field " in refusal(tmp_path, content % (good, bad)), name


def test_refusal_shows_five_records_and_counts_the_rest(tmp_path: Path):
    error = refusal(tmp_path, b'{"prompt": 1}\n' * 12).split("\n")
    assert [line.split(":")[1] for line in error[:5]] == list("12345")
    assert error[5].startswith("and 7 more bad records; nothing was imported")


# ---- kinds of file ----------------------------------------------------------------------------------------


def test_f07_bom_crlf_and_no_final_newline_leave_the_same_content(tmp_path: Path):
    content = b"\n".join(lines(3))
    plain = imported(tmp_path, content + b"\n")
    for same in (
        content,
        b"\xef\xbb\xbf" + content,
        content.replace(b"\n", b"\r\n"),
        content + b"\n\r\n  \n",
    ):
        assert imported(tmp_path, same) == plain


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 16])
def test_f07_lines_are_the_same_wherever_the_file_is_cut_while_it_is_read(chunk, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(json_files, "LINES_CHUNK", chunk)
    good = lines(3)
    content = b"\xef\xbb\xbf" + b"\r\n".join([good[0], b"", good[1][:40], b" \t", good[2]])
    kinds = [(type(record), record.line) for record in read_traces(written(tmp_path, content))]
    assert kinds == [(Accepted, 1), (Blank, 2), (Rejected, 3), (Blank, 4), (Accepted, 5)]
    assert list(read_traces(written(tmp_path, content + b"\n"))) == list(read_traces(written(tmp_path, content)))


def test_a_file_in_one_go_and_one_line_at_a_time_make_the_same_store(tmp_path: Path, monkeypatch):
    records = [toy(n, **({"id": f"t{n}"} if n % 3 else {})) for n in range(400)]
    records[7] |= {"created_at": "2025-01-01T02:00:00+02:00", "meta": {"b": 1, "a": -0.0}}
    records[8]["steps"] = [{"i": i, "type": "step", "content": str(i)} for i in (5, 1)]
    path = written(tmp_path, b"\n".join(json.dumps(record).encode() for record in records))
    monkeypatch.setattr(importing, "utc_now", lambda: "2025-01-01T00:00:00.000000Z")
    at_once, singly = Store(tmp_path / "at once"), Store(tmp_path / "singly")
    import_files(at_once, [path])
    monkeypatch.setattr(importing, "read_entries", lambda lines, now: None)
    import_files(singly, [path])
    assert list(at_once.scan()) == list(singly.scan()) and at_once.content_hash() == singly.content_hash()
    given = [parse_trace(json.dumps(record).encode()) for record in records]
    assert [trace.id for trace in at_once.scan()] == [trace.id for trace in given]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_array_and_wrapped_files_hold_the_same_content(chunk, indent, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    records = [json.loads(line) for line in lines(3)]
    plain = imported(tmp_path, b"\n".join(lines(3)))
    assert imported(tmp_path, json.dumps(records, indent=indent).encode()) == plain
    assert imported(tmp_path, b"\xef\xbb\xbf\r\n" + json.dumps(records, indent=indent).encode() + b"\n") == plain
    assert imported(tmp_path, json.dumps({"traces": records}, indent=indent).encode()) == plain
    described = {"from": 'a "lab"', "count": 3, "traces": records, "whole": True}
    assert imported(tmp_path, json.dumps(described, indent=indent).encode()) == plain


def test_records_of_an_array_know_the_line_where_they_begin(tmp_path: Path):
    content = b"[\n\n  " + b",\n".join(json.dumps(toy(n), indent=1).encode() for n in range(3)) + b"\n]\n"
    found = [record.line for record in read_traces(written(tmp_path, content))]
    assert found == [3, 18, 33]
    assert [content.split(b"\n")[line - 1] for line in found] == [b"  {", b"{", b"{"]


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"[%s,\n%s", "toy.jsonl:2: field record: expected the array's closing ], got the end of the file"),
        (b"[%s,\n%.40s", "toy.jsonl:2: field record: expected the array's closing ]"),
        (b"[%s,\n%s,]", "toy.jsonl:2: field record: expected a trace between the commas, got nothing"),
        (b"[%s,\n%s]]", "toy.jsonl:2: field record: expected the end of the file after the array, got ']'"),
        (b"[%s,\n%s}", "toy.jsonl:2: field record: expected the array's closing ], got '}'"),
        (b"[%s\n%s]", "toy.jsonl:1: field record: expected valid JSON"),
        (b'{"traces": [%s,\n%s]', "toy.jsonl:2: field record: expected the end of the file after the array"),
        (b'{"traces": [%s,\n%s], "more": [1]}', "toy.jsonl:2: field record: expected the end of the file"),
    ],
)
def test_f01_cut_or_broken_array_is_rejected_with_its_line(content: bytes, fault: str, tmp_path: Path):
    assert fault in refusal(tmp_path, content % tuple(lines(2)))


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf", b"[]", b'{"traces": []}'])
def test_f09_file_without_a_trace_is_a_clear_error(content: bytes, tmp_path: Path):
    assert "toy.jsonl: holds no trace; expected JSONL" in refusal(tmp_path, content)


@pytest.mark.parametrize("content", [PNG, "[1]".encode("utf-16"), b"\x1f\x8b\x08\0\0\0\0\0"])
def test_f09_binary_file_is_a_clear_error(content: bytes, tmp_path: Path):
    assert "toy.jsonl: is no UTF-8 text" in refusal(tmp_path, content)


def test_f09_folder_and_missing_file_are_clear_errors(tmp_path: Path):
    for path, fault in (
        (tmp_path, "is a folder"),
        (tmp_path / "none", "does not exist"),
        (Path("x" * 300), "cannot"),
    ):
        with pytest.raises(RequestError, match=fault):
            import_files(Store(tmp_path / "store"), [path])
    assert list(tmp_path.iterdir()) == []


# VmHWM, as ru_maxrss would count the memory of the process that started this one.
MEASURE = """
import re, sys
from pathlib import Path
from lib.data.importing import Accepted, read_traces
records = list(read_traces(Path(sys.argv[1])))
print(sum(isinstance(record, Accepted) for record in records), records[0].field, records[0].expected)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""
HUGE = 100_000_000


@pytest.mark.parametrize(
    "opening, filling, closing, accepted",
    [
        (b"", b"x", b"\nGOOD\n", 1),
        (b'{"prompt": "', b"x", b'"}\nGOOD\n', 1),
        (b'[{"prompt": "', b"x", b'"},\nGOOD]', 1),
        (b'{"traces": [{"prompt": "', b"\\\\", b'"},GOOD]}', 1),
        (b"[", b"[", b"", 0),
        (b"", b"[", b"", 0),
        (b'{"a": ', b"[", b"\nGOOD", 1),
    ],
)
def test_f10_huge_record_is_rejected_at_the_cap_in_little_memory(opening, filling, closing, accepted, tmp_path):
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as file:
        file.write(opening)
        for _ in range(100):
            file.write(filling * (HUGE // 100 // len(filling)))
        file.write(closing.replace(b"GOOD", lines(1)[0]))
    assert _measured(path) == (accepted, "record")
    path.unlink()


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("over", [0, 1])
def test_f10_the_cap_is_one_mebibyte_of_line_blanks_included(over: int, end: bytes, tmp_path: Path):
    good = lines(1)[0]
    path = written(tmp_path, good + b" " * ((1 << 20) - len(good) + over) + end + (end and good))
    [record, *others] = read_traces(path)
    assert (isinstance(record, Accepted), len(others)) == (not over, 1 if end else 0)
    if over:
        assert record.expected == "at most 1 MiB" and len(record.raw) == len(good)
        assert "toy.jsonl:1: field record: expected at most 1 MiB" in refusal(tmp_path, path.read_bytes())


PEAK = """
import re, sys
from pathlib import Path
from lib.data.importing import import_files
from lib.data.store import Store
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
store = Store(Path(sys.argv[2]))
added = import_files(store, [Path(sys.argv[1])]).added
print(peak())
assert added == store.count() == sum(1 for trace in store.scan()) and store.content_hash()
print(peak())
"""


def test_f10_a_larger_file_takes_hardly_more_memory(tmp_path: Path):
    """Of each trace only keys are held: 112 MB more of file, not half of that more memory. Reading holds no more."""
    peaks, text = [], "x" * 1_300
    for count in (10_000, 90_000):
        records = (json.dumps(toy(number, final_answer=f"{number} {text}")).encode() for number in range(count))
        path = written(tmp_path, b"\n".join(records))
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"store-{count}")]
        done = subprocess.run(command, cwd=repository_root(), capture_output=True, text=True, check=True)
        peaks.append([int(megabytes) for megabytes in done.stdout.split()])
    assert peaks[1][0] - peaks[0][0] < 56 and max(peaks[1]) < 300


@pytest.mark.parametrize("opening, closing", [(b'{"meta": {"x": ', b"}}"), (b"[", b"]"), (b'{"traces": [', b"]}")])
def test_f10_nesting_100_000_deep_is_rejected(opening: bytes, closing: bytes, tmp_path: Path):
    path = written(tmp_path, opening + b"[" * 100_000 + b"]" * 100_000 + closing)
    assert _measured(path) == (0, "record")


def _measured(path: Path) -> tuple[int, str]:
    """How many records of the file are accepted, and the field at fault in the first; in under 300 MB."""
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, cwd=repository_root(), capture_output=True, text=True, check=True)
    found, megabytes = done.stdout.splitlines()
    assert int(megabytes) < 300
    return int(found.split()[0]), found.split()[1]


# ---- accounting -------------------------------------------------------------------------------------------


def test_f11_every_one_of_10_000_fuzzed_lines_is_accounted_for(tmp_path: Path):
    random_source = random.Random(11)
    fuzzed = [lines(1)[0], *(_fuzzed(line, random_source) for line in lines(9_999))]
    path, store = written(tmp_path, b"\n".join(fuzzed) + b"\n"), Store(tmp_path / "store")
    report = import_files(store, [path], "quarantine", tmp_path / "rejects")
    assert report.accepted + report.rejected + report.blank == report.lines == 10_000
    assert min(report.accepted, report.rejected, report.blank) > 100
    assert report.added + report.duplicates == report.accepted and store.count() == report.added
    rejects = [json.loads(line) for line in report.rejects_file.read_bytes().splitlines()]
    assert len(rejects) == report.rejected
    for reject in rejects:
        assert reject["file"] == str(path) and 1 <= reject["line"] <= 10_000 and reject["expected"]
        assert len(reject["got"]) <= 80 and reject["got"].isprintable()


def _fuzzed(line: bytes, source: random.Random) -> bytes:
    """The line with up to three bytes changed, cut, doubled or emptied; never with a line end in it."""
    if source.random() < 0.05:
        return b" " * source.randrange(3)
    for _ in range(source.randrange(3)):
        at, to = source.randrange(len(line) + 1), source.randrange(len(line) + 1)
        byte = bytes([source.choice([*range(10), *range(11, 256), *b'"{}[]:,\\'])])
        line = source.choice([line[:at] + byte + line[at + 1 :], line[:at] + byte + line[at:], line[:at] + line[to:]])
    return line


def test_f11_records_of_arrays_are_accounted_for_too(tmp_path: Path):
    source, whole = random.Random(12), 0
    for _ in range(300):
        some = lines(source.randrange(2, 6))
        some[source.randrange(len(some))] = _fuzzed(some[-1], source)
        content = b"[" + b", ".join(some) + b"]"
        records = list(read_traces(written(tmp_path, content)))
        with suppress(ValueError):  # no JSON as a whole, so there is nothing to compare with
            assert len(records) == len(json.loads(content))
            whole += 1
    assert whole > 75


def test_quarantine_keeps_the_good_and_says_why_of_the_bad(tmp_path: Path):
    good = lines(2)
    path = written(tmp_path, b"\n".join([good[0], b'{"prompt": 5}', b"", good[1]]))
    store = Store(tmp_path / "store")
    report = import_files(store, [path], "quarantine", tmp_path / "rejects")
    assert (report.accepted, report.rejected, report.blank, report.lines) == (2, 1, 1, 4)
    [reject] = [json.loads(line) for line in report.rejects_file.read_bytes().splitlines()]
    assert (reject["line"], reject["field"], reject["raw"]) == (2, "prompt", '{"prompt": 5}')
    assert import_files(store, [path], "quarantine", tmp_path / "rejects").rejects_file == report.rejects_file


def test_one_bad_record_in_the_second_file_keeps_out_the_first(tmp_path: Path):
    first, second = written(tmp_path, lines(1)[0], "a.jsonl"), written(tmp_path, b"{}", "b.jsonl")
    store = Store(tmp_path / "store")
    with pytest.raises(RequestError, match=r"b\.jsonl:1: field trace_version"):
        import_files(store, [first, second])
    assert store.count() == 0 and not store.folder.exists()
    assert import_files(store, [first]).rejects_file is None


def test_one_bad_record_at_the_end_of_a_long_file_keeps_out_all_before_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    content = b"\n".join([*lines(12_000), b'{"prompt": 1}'])
    assert "toy.jsonl:12001: field prompt: expected str, got 1" in refusal(tmp_path, content)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.jsonl"]


def test_unknown_choice_for_bad_records_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="expected refuse or quarantine, got 'skip'"):
        import_files(Store(tmp_path / "store"), [], "skip")


def test_f12_the_same_file_twice_adds_nothing(tmp_path: Path):
    path, store = written(tmp_path, b"\n".join(lines(20))), Store(tmp_path / "store")
    first = import_files(store, [path])
    before = sorted(file.name for file in store.folder.iterdir()), store.content_hash()
    second = import_files(store, [path])
    assert (first.added, first.duplicates, second.added, second.duplicates) == (20, 0, 0, 20)
    assert (sorted(file.name for file in store.folder.iterdir()), store.content_hash()) == before


IMPORT = """
import sys
from pathlib import Path
from lib.data.importing import import_files
from lib.data.store import Store
print(import_files(Store(Path(sys.argv[1])), [Path(sys.argv[2])]).added)
"""


def test_f12_the_same_file_imported_by_two_processes_at_once_is_there_once(tmp_path: Path):
    path, store = written(tmp_path, b"\n".join(lines(2_000))), Store(tmp_path / "store")
    command = [sys.executable, "-c", IMPORT, str(store.folder), str(path)]
    both = [subprocess.Popen(command, cwd=repository_root(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(int(process.communicate()[0]) for process in both) == [0, 2_000]
    alone = Store(tmp_path / "alone")
    import_files(alone, [path])
    assert store.count() == 2_000 and store.content_hash() == alone.content_hash()


def test_f31_two_imports_of_overlapping_files_at_once_lose_no_trace(tmp_path: Path):
    content, store = lines(12_000), Store(tmp_path / "store")
    first, second = (
        written(tmp_path, b"\n".join(content[:8_000]), "a"),
        written(tmp_path, b"\n".join(content[4_000:]), "b"),
    )
    commands = [[sys.executable, "-c", IMPORT, str(store.folder), str(path)] for path in (first, second)]
    both = [subprocess.Popen(command, cwd=repository_root(), stdout=subprocess.PIPE, text=True) for command in commands]
    assert sorted(int(process.communicate()[0]) for process in both) == [4_000, 8_000]
    assert sorted(int(trace.final_answer) for trace in store.scan()) == list(range(1, 12_001))
    assert import_files(store, [first, second]).duplicates == 16_000


# An import that comes to a named moment says so, and goes on when its standard input ends.
STOPPED = """
import os, shutil, sys
from pathlib import Path
from lib import files
from lib.data import importing, store
def stop(*args, **options):
    print("there", flush=True)
    sys.stdin.read()
owner, _, name = sys.argv[3].rpartition(".")
setattr(eval(owner), name, stop)
importing.import_files(store.Store(Path(sys.argv[1])), [Path(sys.argv[2])])
"""


@pytest.mark.parametrize(
    "moment, holds_lock, there",
    [
        ("importing.read_entries", False, 0),
        ("store.Store._known", True, 0),
        ("shutil.copyfileobj", True, 0),
        ("os.replace", True, 0),
        ("files._sync_folder", True, 12_000),
    ],
)
def test_f33_an_import_killed_at_any_moment_leaves_all_or_nothing_and_no_lock(
    moment: str, holds_lock: bool, there: int, tmp_path: Path
):
    path, store = written(tmp_path, b"\n".join(lines(12_000))), Store(tmp_path / "store")
    store.folder.mkdir()
    command = [sys.executable, "-c", STOPPED, str(store.folder), str(path), moment]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=repository_root(), stdin=pipe, stdout=pipe) as process:
        assert process.stdout.readline() == b"there\n"
        assert is_held(store, 0) == holds_lock
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not is_held(store, 5) and store.count() == there
    report = import_files(store, [path])
    assert (report.added, report.duplicates, store.count()) == (12_000 - there, there, 12_000)
    assert {path.name for path in store.folder.iterdir() if path.suffix != ".parquet"} == {".lock"}


def is_held(store: Store, seconds: int) -> bool:
    """Whether another process has the store's lock, and does not let go of it within so many seconds."""
    try:
        with FileLock(store.folder / ".lock", timeout=seconds):
            return False
    except Timeout:
        return True


# ---- exports come back ------------------------------------------------------------------------------------

SHAPES = {
    "trace": {
        "id": "t1",
        "prompts": "2+2?",
        "trace_steps": ["two and two", "make four"],
        "final_answer": "4",
        "metadata": METADATA,
    },
    "tunix_sft": {
        "id": "t1",
        "prompts": CONVERSATION,
        "final_answer": "4",
        "metadata": METADATA | {"format": "tunix_sft"},
    },
    "training_example": {
        "id": "e1",
        "prompt": "2+2?",
        "response": "Reasoning:\n1. two and two\n2. make four\nAnswer: 4",
        "metadata": METADATA | {"source_trace_id": "t1"},
    },
    "messages": {
        "id": "t1",
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "Reasoning:\n1. two and two\n2. make four\nAnswer: 4"},
        ],
        "metadata": METADATA,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_f13_an_export_comes_back_as_the_trace_it_was(shape: str, tmp_path: Path):
    [record] = read_traces(written(tmp_path, json.dumps(SHAPES[shape]).encode()))
    expected = make_trace(
        "2+2?", [("step", "two and two"), ("step", "make four")], "4", META, "t1", METADATA["created_at"]
    )
    assert record == Accepted(1, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_f13_an_export_keeps_the_types_of_its_steps(shape: str, tmp_path: Path):
    def exported(types: object) -> bytes:
        return json.dumps(SHAPES[shape] | {"metadata": SHAPES[shape]["metadata"] | {"step_types": types}}).encode()

    [record] = read_traces(written(tmp_path, exported(["observation", "count"])))
    assert [step.type for step in record.trace.steps] == ["observation", "count"] and record.trace.meta == META
    for wrong in (["observation"], [], ["a", 1], ["a", ""], ["a", "x" * 65], "observation", None):
        assert "field metadata.step_types: expected " in refusal(tmp_path, exported(wrong))


@pytest.mark.parametrize("shape", SHAPES)
def test_f13_an_export_is_read_as_strictly_as_a_trace(shape: str, tmp_path: Path):
    line = json.dumps(SHAPES[shape]).encode()
    assert "field late: " in refusal(tmp_path, line.replace(b'"id"', b'"late": 1, "id"'))
    assert "field id: expected one value" in refusal(tmp_path, line.replace(b'"id"', b'"id": "x", "id"'))
    assert "field metadata.seed: " in refusal(tmp_path, line.replace(b'"seed": 7', b'"seed": 9223372036854775808'))
    assert "field metadata.trace_version: " in refusal(tmp_path, line.replace(b'"1.0"', b'"3.0"'))


@pytest.mark.parametrize(
    "shape, changes, field",
    [
        ("tunix_sft", {"prompts": "2+2?"}, "prompts"),
        ("tunix_sft", {"final_answer": "5"}, "final_answer"),
        ("training_example", {"response": "Answer: 4"}, "response"),
        ("training_example", {"response": "Reasoning:\n1. two"}, "response"),
        ("messages", {"messages": []}, "messages"),
        ("messages", {"messages": [{"role": "user", "content": "2+2?"}]}, "messages"),
        ("trace", {"trace_steps": [1]}, "trace_steps[0]"),
    ],
)
def test_f13_text_that_cannot_be_parsed_back_is_rejected(shape: str, changes: dict, field: str, tmp_path: Path):
    assert f"toy.jsonl:1: field {field}: " in refusal(tmp_path, json.dumps(SHAPES[shape] | changes).encode())


def test_f13_evaluation_output_comes_back_with_its_scores_in_meta(tmp_path: Path):
    scores = {"completion": "Answer: 1", "score": None, "verdict": "unscored", "num_tokens": 3, "logprob": -0.5}
    [record] = read_traces(written(tmp_path, json.dumps(toy() | scores).encode()))
    assert record.trace.meta == {"source": "lab"} | scores
    assert "field score" in refusal(tmp_path, json.dumps(toy() | scores | {"score": 2}).encode())
    assert "field verdict" in refusal(tmp_path, json.dumps(toy() | scores | {"verdict": "good"}).encode())
    assert "field late" in refusal(tmp_path, json.dumps(toy() | scores | {"late": 2}).encode())
    assert "field meta.score" in refusal(tmp_path, json.dumps(toy(meta={"score": 1}) | scores).encode())


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts | st.floats(-1e300, 1e300)
metas = st.dictionaries(texts, values | st.lists(values, max_size=3), max_size=4)
toys = st.builds(
    make_trace,
    texts,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    texts,
    metas,
    st.just("") | texts,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(toys, min_size=1, max_size=4, unique_by=lambda trace: trace.id))
def test_f13_traces_written_as_jsonl_or_array_come_back_identical(tmp_path_factory, traces):
    folder = tmp_path_factory.getbasetemp()
    for content in (b"\n".join(map(to_json, traces)), b"[" + b",".join(map(to_json, traces)) + b"]"):
        assert [record.trace for record in read_traces(written(folder, content))] == traces


def carried_by_rendered_text(trace: Trace) -> bool:
    """Rendered text cannot carry a control token, a step with a line that begins with the next step's number, or
    an answer with a line that begins with `Answer: `; and `meta` may not use the names that an export adds."""
    texts = [trace.prompt, trace.final_answer, *(step.content for step in trace.steps)]
    mistaken = any(f"\n{number + 1}. " in step.content for number, step in enumerate(trace.steps, 1))
    taken = {"created_at", "trace_version", "step_types", "format", "source_trace_id"}
    forged = any(token in text for token in CONTROL_TOKENS for text in texts)
    return not (forged or mistaken or "\nAnswer: " in trace.final_answer or taken & trace.meta.keys())


# Words that the rendering itself uses come often, or the places where it could go wrong would never be met.
near_texts = st.lists(
    st.sampled_from(["\n", "\r", "Answer: ", "Reasoning:", "1. ", "2. ", "\n2. ", " ", "<end", "\u2028"]) | texts,
    min_size=1,
    max_size=4,
).map("".join)
near_traces = st.builds(
    make_trace,
    near_texts,
    st.lists(st.tuples(texts, near_texts), min_size=1, max_size=4),
    near_texts,
    metas,
    st.just("") | texts,
).filter(carried_by_rendered_text)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(traces=st.lists(near_traces, min_size=1, max_size=3, unique_by=(lambda trace: trace.id, content_sha256)))
def test_f13_a_store_exported_and_imported_again_gains_nothing(tmp_path_factory, format: str, traces: list[Trace]):
    folder = tmp_path_factory.mktemp("export")
    store, other = Store(folder / "store"), Store(folder / "other")
    store.add(traces)
    path = written(folder, b"".join(export_lines(store.scan(), format)))
    report = import_files(store, [path])
    assert Added(report.added, report.duplicates) == Added(0, len(traces))
    import_files(other, [path])
    assert list(other.scan()) == traces
