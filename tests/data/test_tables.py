"""CSV, tab-separated text and Parquet: the faults of the document on each, and that they hold what JSONL holds."""

import csv
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from lib.data.importing import Accepted, Blank, ImportReport, Rejected, import_files, read_traces
from lib.data.mapping import Mapping
from lib.data.store import Store
from lib.errors import RequestError
from lib.files import repository_root
from lib.trace import Trace

HEADER = ["Q", "Why", "A", "Topic", "W"]
MAPPING = Mapping(prompt="Q", steps="Why", final_answer="A", meta={"topic": "Topic"}, ignore=["W"], source="quiz")
MAPPING_YAML = "{prompt: Q, steps: Why, final_answer: A, meta: {topic: Topic}, ignore: [W], source: quiz}"


def rows(count: int) -> list[list[str]]:
    return [[f"{n}+1?", f'{n}, then "one"\nmore', str(n + 1), "sums", "w"] for n in range(count)]


def csv_text(table: list[list[str]], separator: str = ",", end: str = "\n") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows([HEADER, *table])
    return text.getvalue().replace("\n", end).encode()


def parquet_file(path: Path, table: list[list], **types) -> Path:
    types = dict.fromkeys(HEADER, pl.String) | types
    pl.DataFrame(table, schema=types, orient="row").write_parquet(path)
    return path


def written(folder: Path, content: bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def table_file(kind: str, folder: Path, table: list[list[str]]) -> Path:
    if kind == "parquet":
        return parquet_file(folder / "t.parquet", table)
    return written(folder, csv_text(table, "\t" if kind == "tsv" else ","), f"t.{kind}")


def refusal(path: Path, mapping: Mapping | None = MAPPING) -> str:
    """The error of an import that must leave no store behind."""
    store = Store(path.parent / "store")
    with pytest.raises(RequestError) as caught:
        import_files(store, [path], mapping=mapping)
    assert not store.folder.exists()
    assert all(line.isprintable() for line in str(caught.value).split("\n"))
    return str(caught.value)


def traces(path: Path, mapping: Mapping | None = MAPPING) -> list[Trace]:
    return [record.trace for record in read_traces(path, mapping)]


def found(path: Path, mapping: Mapping | None = MAPPING) -> list[tuple[type, int]]:
    return [(type(record), record.line) for record in read_traces(path, mapping)]


KINDS = ["csv", "tsv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_holds_the_traces_that_mapped_lines_hold(kind: str, tmp_path: Path):
    lines = [json.dumps(dict(zip(HEADER, row, strict=True))) for row in rows(3)]
    same = traces(written(tmp_path, "\n".join(lines).encode(), "t.jsonl"))
    assert traces(table_file(kind, tmp_path, rows(3))) == same
    assert same[1].steps[1].content == "more" and same[1].meta == {"topic": "sums", "source": "quiz"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_a_known_shape_needs_no_mapping(kind: str, tmp_path: Path):
    path, table = tmp_path / f"t.{kind}", pl.DataFrame({"question": ["2+2?"], "answer": ["2 and 2\n#### 4"]})
    if kind == "parquet":
        table.write_parquet(path)
    else:
        table.write_csv(path, separator="\t" if kind == "tsv" else ",")
    [trace] = traces(path, None)
    assert (trace.prompt, trace.steps[0].content, trace.final_answer) == ("2+2?", "2 and 2", "4")


# ---- faults of a row --------------------------------------------------------------------------------------


def test_f01_cut_rows_are_rejected_with_the_line_where_they_begin(tmp_path: Path):
    content = csv_text(rows(3))
    assert "t.csv:6: field record: expected a row of CSV, got a quote that is never closed;" in refusal(
        written(tmp_path, content[:-12])
    )
    assert "t.csv:6: field record: expected 5 fields, as the header has, got 2" in refusal(
        written(tmp_path, content[: content.rindex(b",3,")])
    )


def test_f01_one_row_with_a_stray_quote_does_not_spoil_the_next(tmp_path: Path):
    header, good = b",".join(name.encode() for name in HEADER), b"q,s,a,t,w"
    path = written(tmp_path, b"\n".join([header, b'q,"s"x,a,t,w', good, b"q,s,a,t", good, b"q,s,a,t,w,x"]))
    assert found(path) == [(Rejected, 2), (Accepted, 3), (Rejected, 4), (Accepted, 5), (Rejected, 6)]


def test_f01_f09_f35_a_damaged_parquet_file_is_one_clear_error(tmp_path: Path):
    path = parquet_file(tmp_path / "t.parquet", rows(200))
    whole, source = path.read_bytes(), random.Random(35)
    for cut in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "t.parquet: cannot be read (" in refusal(path) and "\n" not in refusal(path)
    for _ in range(40):
        at = source.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << source.randrange(8)]) + whole[at + 1 :])
        try:
            found(path)
        except RequestError as error:
            assert str(path) in str(error) and str(error).isprintable()


@pytest.mark.parametrize("kind, number", [(pl.Float64, 0.5), (pl.Boolean, True)])
def test_f02_no_number_of_parquet_becomes_text_but_an_integer(kind: pl.DataType, number: float, tmp_path: Path):
    row = rows(1)[0]
    path = parquet_file(tmp_path / "t.parquet", [[*row[:2], number, *row[3:]]], A=kind)
    assert "t.parquet:1: field A: expected " in refusal(path)
    path = parquet_file(tmp_path / "t.parquet", [[*row[:2], 1, *row[3:]]], A=pl.Int64)
    assert traces(path)[0].final_answer == "1"
    path = parquet_file(tmp_path / "t.parquet", [[1, *row[1:]]], Q=pl.Int64)
    assert "t.parquet:1: field Q: expected str, got 1" in refusal(path)


def test_f02_a_column_of_a_kind_that_json_has_not_is_refused_unless_it_is_left_out(tmp_path: Path):
    for kind, name in ((pl.Date, "Date"), (pl.Binary, "Binary"), (pl.List(pl.Decimal(9, 2)), "Decimal")):
        path = parquet_file(tmp_path / "t.parquet", [], Topic=kind)
        assert "t.parquet: column 'Topic': expected text" in refusal(path) and name in refusal(path)
        path = parquet_file(tmp_path / "t.parquet", [[*rows(1)[0][:4], None]], W=kind)
        assert len(traces(path)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_f03_columns_that_nothing_is_said_of_are_told_once_and_how_to_go_on(kind: str, tmp_path: Path):
    path = table_file(kind, tmp_path, rows(9))
    silent = Mapping(prompt="Q", steps="Why", final_answer="A")
    error = refusal(path, silent)
    assert error.endswith(
        f"t.{kind}: columns: nothing says what becomes of 'Topic', 'W'; a mapping keeps it by "
        "`meta: {Topic: Topic}` or leaves it out by `ignore: [Topic]`"
    )
    assert "expected prompt and completion, question and answer, or messages" in refusal(path, None)
    absent = Mapping(prompt="Q", completion="Reply", ignore=["W"])
    assert "the mapping names 'Reply', the file has 'Q', 'Why'" in refusal(path, absent)


def test_f04_f05_numbers_of_parquet_that_json_has_not_are_rejected(tmp_path: Path):
    for kind, number in ((pl.Float64, float("nan")), (pl.Float64, float("inf")), (pl.UInt64, 2**63)):
        row = [*rows(1)[0][:3], number, "w"]
        path = parquet_file(tmp_path / "t.parquet", [row], Topic=kind)
        assert "t.parquet:1: field Topic: expected " in refusal(path)


def test_f05_digits_of_csv_stay_text(tmp_path: Path):
    [trace] = traces(written(tmp_path, csv_text([["q", "s", "007", "1e999", "w"]])))
    assert (trace.final_answer, trace.meta["topic"]) == ("007", "1e999")


def test_f06_a_column_that_stands_twice_is_refused(tmp_path: Path):
    assert "t.csv: columns: expected each name once, got twice: 'Q'" in refusal(
        written(tmp_path, csv_text(rows(1)).replace(b"Topic", b"Q", 1))
    )


@pytest.mark.parametrize("separator", [",", "\t"])
def test_f07_bom_crlf_and_no_final_newline_leave_the_same_content(separator: str, tmp_path: Path):
    name = "t.csv" if separator == "," else "t.tsv"
    content, crlf = csv_text(rows(3), separator), csv_text(rows(3), separator, "\r\n")
    plain = traces(written(tmp_path, content, name))
    for same in (content[:-1], b"\xef\xbb\xbf" + content, crlf, crlf[:-2], content + b"\n \n"):
        found = [record for record in read_traces(written(tmp_path, same, name), MAPPING)]
        assert [record.trace for record in found if not isinstance(record, Blank)] == plain


@pytest.mark.parametrize(
    "new, fault",
    [
        (b"\xff", "expected valid UTF-8, got byte 0xff at offset 1"),
        (b"\xed\xa0\x80", "expected valid UTF-8"),
        (b"\0", "expected text without NUL"),
    ],
)
def test_f08_bad_bytes_are_rejected_with_the_line_of_their_row(new: bytes, fault: str, tmp_path: Path):
    path = written(tmp_path, csv_text(rows(3)).replace(b"ore", new, 2).replace(b"1, then", b"1" + new))
    assert "t.csv:2: field record: " + fault in refusal(path)
    assert found(path) == [(Rejected, 2), (Rejected, 4), (Accepted, 6)]


def test_f08_nul_in_parquet_is_rejected_with_its_row(tmp_path: Path):
    table = rows(3)
    table[1][1] = "a\0b"
    assert "t.parquet:2: field Why: expected text without NUL" in refusal(parquet_file(tmp_path / "t.parquet", table))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", csv_text([]), csv_text([]) + b"\n\n"])
def test_f09_a_table_without_a_row_is_a_clear_error(content: bytes, tmp_path: Path):
    assert "t.csv: holds no trace; expected " in refusal(written(tmp_path, content))


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "Q,A".encode("utf-16"), b"\x1f\x8b\x08\0\0"])
def test_f09_binary_files_by_the_name_of_a_table_are_clear_errors(content: bytes, tmp_path: Path):
    assert "t.csv: is no CSV text (" in refusal(written(tmp_path, content))
    assert "t.parquet: cannot be read (" in refusal(written(tmp_path, content, "t.parquet"))
    assert "holds no trace" in refusal(parquet_file(tmp_path / "t.parquet", []))


def test_f09_folders_and_missing_tables_are_clear_errors(tmp_path: Path):
    for name, fault in (("none.csv", "does not exist"), ("none.parquet", "does not exist"), ("d.parquet", "a folder")):
        (tmp_path / "d.parquet").mkdir(exist_ok=True)
        assert fault in refusal(tmp_path / name)


MEASURE = """
import re, sys
from pathlib import Path
from lib.data.importing import Accepted, read_traces
from lib.data.mapping import Mapping
records = list(read_traces(Path(sys.argv[1]), Mapping(prompt="Q", completion="A")))
print(sum(isinstance(record, Accepted) for record in records), records[0].line, records[0].expected)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.parametrize(
    "opening, filling, closing, accepted",
    [
        (b"q,", b"x", b"\n", 1),
        (b'q,"', b"x", b'"\n', 1),
        (b'q,"', b'""', b'"\n', 1),
        (b'q,"', b"xxxxxxx\n", b'"\n', None),
        (b"", b",", b"\n", 1),
    ],
)
def test_f10_a_huge_row_is_rejected_at_the_cap_in_little_memory(opening, filling, closing, accepted, tmp_path):
    path = tmp_path / "t.csv"
    with open(path, "wb") as file:
        file.write(b"Q,A\n" + opening)
        for _ in range(100):
            file.write(filling * ((1_000_000 if accepted else 20_000) // len(filling)))
        file.write(closing + b"q,s #### a\n".replace(b" #### ", b". The answer is "))
    records, megabytes = _measured(path)
    assert records[1:] == ["2", "at most 1 MiB"] and megabytes < 300
    assert accepted is None or int(records[0]) == accepted


def test_f10_a_huge_value_of_parquet_is_rejected_in_little_memory(tmp_path: Path):
    table = pl.DataFrame({"Q": ["q", "q"], "A": ["x" * 100_000_000, "s. The answer is 1"]})
    table.write_parquet(tmp_path / "t.parquet")
    records, megabytes = _measured(tmp_path / "t.parquet")
    assert records == ["1", "1", "at most 1 MiB"] and megabytes < 300


def _measured(path: Path) -> tuple[list[str], int]:
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, cwd=repository_root(), capture_output=True, text=True, check=True)
    told, megabytes = done.stdout.splitlines()
    return told.split(maxsplit=2), int(megabytes)


# ---- accounting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_f11_f12_quarantine_accounts_for_every_row_and_twice_adds_nothing(kind: str, tmp_path: Path):
    table = rows(20)
    table[3][2] = table[7][0] = ""
    path, store = table_file(kind, tmp_path, table), Store(tmp_path / "store")
    report = import_files(store, [path], "quarantine", tmp_path / "rejects", MAPPING)
    assert (report.accepted, report.rejected, report.blank, report.lines) == (18, 2, 0, 20)
    rejects = [json.loads(line) for line in report.rejects_file.read_bytes().splitlines()]
    assert [(reject["line"], reject["field"]) for reject in rejects] == (
        [(4, "A"), (8, "Q")] if kind == "parquet" else [(8, "A"), (16, "Q")]
    )
    assert all("then" in reject["raw"] for reject in rejects)
    before = store.content_hash(), sorted(store.folder.iterdir())
    again = import_files(store, [path], "quarantine", tmp_path / "rejects", MAPPING)
    assert (again.added, again.duplicates, again.rejects_file) == (0, 18, report.rejects_file)
    assert (store.content_hash(), sorted(store.folder.iterdir())) == before


FUZZED = 10_000 if os.environ.get("RETRACE_FAULTS") == "full" else 400


def fuzzed(content: bytes, source: random.Random) -> bytes:
    """The file with up to four bytes changed, put in, or cut out of it."""
    content = bytearray(content)
    for _ in range(source.randrange(5)):
        at, to = source.randrange(len(content) + 1), source.randrange(12)
        byte = bytes([source.choice([*range(256), *b'",\n\r\t\0' * 20])])
        content[at : at + source.choice([0, 1, to])] = byte
    return bytes(content)


def test_f11_every_row_of_fuzzed_csv_is_accounted_for(tmp_path: Path):
    source, sums, compared = random.Random(11), [0, 0, 0, 0], 0
    for number in range(FUZZED):
        content = csv_text(rows(6)) + b"\n"
        path = written(tmp_path, content[:15] + fuzzed(content[15:], source))
        expected = _rows_of(path)
        home = tmp_path / str(number)
        try:
            report = import_files(Store(home / "store"), [path], "quarantine", home / "rejects", MAPPING)
        except RequestError as error:
            assert str(path) in str(error) and str(error).isprintable()
            continue
        assert expected in (None, report.lines)
        compared += expected is not None
        _check_accounts(report, Store(home / "store"), path)
        counts = (report.lines, report.accepted, report.rejected, report.blank)
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
    print(f"{sums[0]} rows = {sums[1]} accepted + {sums[2]} rejected + {sums[3]} blank")
    assert min(sums) > FUZZED // 10 and compared > FUZZED // 2


def _rows_of(path: Path) -> int | None:
    """How many rows stand below the header, as the standard library counts them; None where it gives up on one."""
    text = io.StringIO(path.read_bytes().decode(errors="replace"), newline="\n")
    try:
        return len(list(csv.reader(text, strict=True))) - 1
    except csv.Error:
        return None


def _check_accounts(report: ImportReport, store: Store, path: Path) -> None:
    assert report.added + report.duplicates == report.accepted and store.count() == report.added
    rejects = report.rejects_file.read_bytes().splitlines() if report.rejects_file else []
    assert len(rejects) == report.rejected
    last = path.read_bytes().count(b"\n") + 1
    assert all(2 <= json.loads(line)["line"] <= last and json.loads(line)["expected"] for line in rejects)


IMPORT = """
import sys
from pathlib import Path
from lib.data.importing import import_files
from lib.data.mapping import load_mapping
from lib.data.store import Store
print(import_files(Store(Path(sys.argv[1])), [sys.argv[2]], mapping=load_mapping(Path(sys.argv[3]))).added)
"""


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_f31_two_imports_of_one_table_at_once_add_each_row_once(kind: str, tmp_path: Path):
    path, store = table_file(kind, tmp_path, rows(1_000)), Store(tmp_path / "store")
    mapping = written(tmp_path, MAPPING_YAML.encode(), "m.yaml")
    command = [sys.executable, "-c", IMPORT, str(store.folder), str(path), str(mapping)]
    both = [subprocess.Popen(command, cwd=repository_root(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(int(process.communicate()[0]) for process in both) == [0, 1_000]
    assert store.count() == 1_000


# ---- nested columns, round trips, names -------------------------------------------------------------------


def test_nested_columns_of_parquet_are_read_and_nulls_are_fields_that_are_not_there(tmp_path: Path):
    turns = [
        {"role": "user", "content": "2+2?", "name": None},
        {"role": "assistant", "content": "2 and 2\n#### 4", "name": None},
    ]
    table = pl.DataFrame({"messages": [turns], "id": [None]}, schema_overrides={"id": pl.String})
    table.write_parquet(tmp_path / "t.parquet")
    [trace] = traces(tmp_path / "t.parquet", None)
    assert (trace.prompt, trace.final_answer, len(trace.id)) == ("2+2?", "4", 36)
    listed = parquet_file(tmp_path / "l.parquet", [["q", ["a", "b"], "1", "t", "w"]], Why=pl.List(pl.String))
    assert [step.content for step in traces(listed)[0].steps] == ["a", "b"]


def test_f10_texts_within_lists_and_structs_count_towards_the_cap(tmp_path: Path):
    turns = [{"role": "user", "content": "x" * (1 << 20)}, {"role": "assistant", "content": "a"}]
    table = pl.DataFrame({"messages": [turns, []], "metadata": [{"a": [1.5, 2]}, {"a": []}], "id": ["a", "b"]})
    table.write_parquet(tmp_path / "t.parquet")
    assert [record.expected for record in read_traces(tmp_path / "t.parquet")][0] == "at most 1 MiB"
    assert "t.parquet:2: field messages: expected one exchange" in refusal(tmp_path / "t.parquet", None)


def test_f13_traces_written_as_parquet_come_back_as_they_were(tmp_path: Path):
    whole = [record.trace for record in read_traces(table_file("csv", tmp_path, rows(3)), MAPPING)]
    fields = ("trace_version", "prompt", "final_answer", "meta", "id")
    plain = [
        {name: getattr(trace, name) for name in fields}
        | {"steps": [{"i": step.i, "type": step.type, "content": step.content} for step in trace.steps]}
        for trace in whole
    ]
    pl.DataFrame(plain).write_parquet(tmp_path / "t.parquet")
    assert traces(tmp_path / "t.parquet", None) == whole


def test_an_empty_id_of_csv_is_none(tmp_path: Path):
    path = written(tmp_path, b'id,question,answer\n,q,"s\n#### 1"\nmine,q,"s\n#### 1"\n')
    assert [len(trace.id) for trace in traces(path, None)] == [36, 4]


HOSTILE = ["../x", "/etc/passwd", "{x}", "x" * 300, "<script>alert(1)</script>", "\x1b[31mred"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("name", HOSTILE)
def test_f39_hostile_names_of_columns_are_told_harmlessly_and_lead_nowhere(kind: str, name: str, tmp_path: Path):
    table = pl.DataFrame({name: ["a"], "question": ["q"], "answer": ["s\n#### 1"]})
    path = tmp_path / "in" / f"t.{kind}"
    path.parent.mkdir()
    write: Callable = table.write_parquet if kind == "parquet" else table.write_csv
    write(path)
    assert "nothing says what becomes of" in refusal(path, None)
    kept = Mapping(prompt="question", completion="answer", meta={name: name})
    store = Store(tmp_path / "home" / "store")
    import_files(store, [path], mapping=kept)
    assert [trace.meta for trace in store.scan()] == [{name: "a"}]
    assert {made.name for made in tmp_path.iterdir()} == {"in", "home"}
