"""Names into sources: patterns are replaced by what they match, and a name that is none is refused in one line."""

import json
from pathlib import Path

import pytest

from lib.data.importing import import_files
from lib.data.sources import Source, find_sources
from lib.data.store import Store
from lib.errors import RequestError
from lib.evaluation.evalsets import EvalItem
from lib.evaluation.leaks import audit


def record(number: int) -> bytes:
    return json.dumps({"question": f"{number}+1?", "answer": f"one more\n#### {number + 1}"}).encode()


def files(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(record(number))


def names(*patterns: str | Path) -> list[str]:
    return [Path(source.name).name for source in find_sources(patterns)]


def test_a_pattern_is_what_it_matches_sorted_and_each_file_once(tmp_path: Path):
    files(tmp_path, "b.jsonl", "a.jsonl", "c.csv", "deep/er/d.jsonl")
    assert names(f"{tmp_path}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{tmp_path}/b.jsonl", f"{tmp_path}/?.jsonl") == ["b.jsonl", "a.jsonl"]
    assert names(f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "b.jsonl", "d.jsonl"]
    assert names(tmp_path / "[ac].*") == ["a.jsonl", "c.csv"]
    report = import_files(Store(tmp_path / "store"), [f"{tmp_path}/*.jsonl"])
    assert (report.lines, report.added) == (2, 2)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path):
    files(tmp_path, "a.jsonl", "[a].jsonl")
    assert names(tmp_path / "[a].jsonl") == ["[a].jsonl"]


def test_the_ending_says_the_kind():
    kinds = [source.kind for source in find_sources(["a.CSV", "b.tsv", "s3://lab/c.parquet", "d.json", "e"])]
    assert kinds == ["csv", "tsv", "parquet", "json", "json"]
    assert Source("s3://lab/c.parquet", "parquet").is_object


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match=r"\*\.csv: no file matches this pattern"):
        find_sources([tmp_path / "*.csv"])


@pytest.mark.parametrize("asked", ["caf\udce9.jsonl", "*.jsonl"])
def test_a_name_that_is_no_text_is_refused_as_the_store_could_not_keep_it(asked: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files(tmp_path, "a.jsonl", "caf\udce9.jsonl")
    with pytest.raises(RequestError, match=r"^'caf\\udce9.jsonl': the name is no UTF-8 text; rename the file$"):
        import_files(Store(tmp_path / "store"), [asked])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["http://host/a.jsonl", "gs://lab/a.jsonl", "file:///etc/passwd", "x://*"])
def test_other_stores_are_refused_by_name(name: str):
    with pytest.raises(RequestError, match="of object stores only s3:// is read"):
        find_sources([name])


HOSTILE = [
    "a\0b",
    "a\0b.csv",
    "a\0b.parquet",
    "a\0*",
    "x" * 300,
    "x" * 300 + "*",
    "a\nb",
    "a\x1b[31m*",
    "{x}",
    "",
    "../*/.",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_f39_a_hostile_name_is_refused_in_one_line_and_nothing_is_written(name: str, tmp_path: Path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RequestError) as caught:
        import_files(Store(tmp_path / "home" / "store"), [name])
    assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


QUESTION = "A train leaves at 9:40 and arrives at 11:05. How many minutes does it take?"
PLANTED = {
    "t.csv": f'question,answer\n"{QUESTION}","one line\n#### 85"\n',
    "t.tsv": f"prompt\tcompletion\n{QUESTION}\tone line. The answer is 85.\n",
    "t.jsonl": json.dumps(
        {
            "messages": [
                {"role": "system", "content": "Think step by step."},
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": "one line\n#### 85"},
            ]
        }
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_f51_an_imported_question_of_an_eval_set_is_found(name: str, tmp_path: Path):
    (tmp_path / name).write_text(PLANTED[name])
    store, item = Store(tmp_path / "store"), EvalItem("train", QUESTION, "85", "time", "easy")
    import_files(store, [tmp_path / name])
    assert [leak.item for leak in audit(store.scan(), [item])] == ["train"]
