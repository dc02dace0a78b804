"""Objects of a store that speaks S3 (moto, on loopback) are read as files are: the same traces, lines and faults.

In a plain `make test` all of this is left out; `make test-s3` installs the server and runs it by the interpreter that
RETRACE_S3_PYTHON names.
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from lib.__main__ import main
from lib.data.importing import import_files, read_traces
from lib.data.store import Store
from lib.errors import RequestError

pytestmark = pytest.mark.s3

GOOD = json.dumps({"question": "2+2?", "answer": "2 and 2\n#### 4"}, ensure_ascii=False).encode()
OTHER = json.dumps({"question": "é\ufffd?", "answer": "2 and 2\n#### 4"}, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of a server with the empty bucket `lab`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ["RETRACE_S3_PYTHON"], "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address)
        _put(f"{address}/lab", b"")
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def put(endpoint: str, monkeypatch: pytest.MonkeyPatch):
    """Stores an object, and returns its URL; Polars is told of the server."""
    told = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    for name, value in (told | {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}).items():
        monkeypatch.setenv(name, value)

    def put(key: str, content: bytes) -> str:
        _put(f"{endpoint}/lab/{key}", content)
        return f"s3://lab/{key}"

    return put


def _put(url: str, content: bytes) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(url, content, headers, method="PUT"), timeout=10).close()


def _wait_for(address: str) -> None:
    for _ in range(100):
        try:
            return urllib.request.urlopen(address, timeout=10).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(f"no server at {address}")


def csv_content() -> bytes:
    return b'question,answer\r\n2+2?,"2 and 2\r\n#### 4"\r\n"a ""b""",x\r\n'


def parquet_content(folder: Path) -> bytes:
    table = pl.DataFrame({"question": ["2+2?", "q"], "answer": ["2 and 2\n#### 4", "x"]})
    table.write_parquet(folder / "made.parquet")
    return (folder / "made.parquet").read_bytes()


@pytest.mark.parametrize(
    "key, content",
    [
        ("f01/a.jsonl", b"\n".join([GOOD, GOOD[:30], OTHER])),
        ("f07/a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n \r\n" + OTHER),
        ("f08/a.jsonl", b"\n".join([GOOD, GOOD.replace(b"and", b"a\xffd"), GOOD.replace(b"and", b"\\u0000"), b""])),
        ("f08/nul.jsonl", b"\n".join([GOOD, GOOD.replace(b"and", b"\0")])),
        ("array.json", b"[" + GOOD + b",\n\n" + OTHER + b", 3]"),
        ("f07/a.csv", csv_content()),
        ("f08/a.csv", csv_content() + b'q\xff,"a\n#### b"\n'),
        ("f10/a.jsonl", GOOD + b"\n" + b"x" * 20_000_000 + b"\n" + GOOD),
        ("a.parquet", b""),
    ],
)
def test_f01_f07_f08_f10_an_object_is_read_as_the_file_is(key: str, content: bytes, put, tmp_path: Path):
    content = content or parquet_content(tmp_path)
    path = tmp_path / Path(key).name
    path.write_bytes(content)
    assert list(read_traces(put(key, content))) == list(read_traces(path))


def test_f08_beside_bad_bytes_a_replacement_character_counts_as_one(put):
    """Polars decodes an object as a whole, and says of bad bytes only where it puts replacements."""
    records = list(read_traces(put("f08/b.jsonl", b"\n".join([OTHER, GOOD, b"\xff"]))))
    assert [getattr(record, "expected", "") for record in records] == ["valid UTF-8", "", "valid UTF-8"]
    assert hasattr(list(read_traces(put("f08/c.jsonl", OTHER)))[0], "trace")


def test_f09_what_is_not_there_is_a_clear_error(put):
    put("there.jsonl", b"")
    for name, fault in [
        ("s3://lab/none.jsonl", "s3://lab/none.jsonl: cannot be read (it does not exist)"),
        ("s3://nobody/none.jsonl", "s3://nobody/none.jsonl: cannot be read (it does not exist)"),
        ("s3://lab/none.parquet", "s3://lab/none.parquet: cannot be read (it does not exist)"),
        ("s3://lab/none/*.jsonl", "s3://lab/none/*.jsonl: no file matches this pattern"),
        ("s3://lab/there.jsonl", "s3://lab/there.jsonl: holds no trace"),
        ("s3://", "s3://: "),
        ("s3://lab", "s3://lab: "),
        ("s3://lab/a\0b", "s3://lab/a"),
    ]:
        with pytest.raises(RequestError) as caught:
            list(read_traces(name))
        assert fault in str(caught.value) and str(caught.value).isprintable()


def test_f12_f31_patterns_of_objects_are_imported_once(put, tmp_path: Path):
    for number in range(3):
        put(f"many/{number}.jsonl", GOOD.replace(b"2+2", b"%d+2" % number))
    store = Store(tmp_path / "store")
    report = import_files(store, ["s3://lab/many/*.jsonl"])
    assert (report.lines, report.added) == (3, 3)
    assert import_files(store, ["s3://lab/many/*.jsonl"]).duplicates == 3


def test_the_command_line_imports_an_object_and_names_it_in_an_error(put, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("RETRACE_HOME", str(tmp_path))
    assert main(["traces", "import", put("cli/a.jsonl", GOOD)]) == 0
    assert "1 lines: 1 accepted" in capsys.readouterr().out
    assert main(["traces", "import", put("cli/b.jsonl", GOOD[:-3])]) == 2
    assert "error: s3://lab/cli/b.jsonl:1: field record: expected valid JSON" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named_in_one_line(put, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RequestError, match="s3://gone/a.jsonl: cannot be read .*Connection refused") as caught:
        list(read_traces("s3://gone/a.jsonl"))
    assert str(caught.value).isprintable() and "AWS_ENDPOINT_URL" in str(caught.value)
