"""The store: append-only, each content once, whole or not at all, and never believed unverified."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
import pytest

from lib.data.store import Added, Store
from lib.errors import RequestError, RetraceError
from lib.files import repository_root, sha256_file
from lib.trace import Trace, content_sha256, make_trace, parse_trace, to_json


def toys(*numbers: int, **changes) -> list[Trace]:
    meta = {"game": "duel", "flag": True}
    return [make_trace(f"{n}?", [("step", f"is {n}")], str(n), meta | {"n": n % 3}, **changes) for n in numbers]


def names(store: Store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if path.suffix == ".parquet")


def test_a_missing_folder_is_an_empty_store_and_stays_missing(tmp_path: Path):
    store = Store(tmp_path / "a" / "store")
    assert (list(store.scan()), store.count(), store.meta_values()) == ([], 0, {})
    assert len(store.content_hash()) == 64 and store.add([]) == Added(0, 0)
    assert list(tmp_path.iterdir()) == []


def test_f13_what_goes_in_comes_out_in_order(tmp_path: Path):
    store, traces = Store(tmp_path), toys(5, 1, 3)
    assert store.add(traces) == Added(3, 0)
    assert list(store.scan()) == traces


def test_segments_are_named_by_their_hash_and_hold_the_records(tmp_path: Path):
    store, traces = Store(tmp_path), toys(1, 2)
    store.add(traces)
    [name] = names(store)
    assert name == f"{sha256_file(tmp_path / name)}.parquet"
    frame = pl.read_parquet(tmp_path / name)
    assert frame.columns == ["id", "content_sha256", "created_at", "record"]
    assert frame["record"].to_list() == [to_json(trace).decode() for trace in traces]


def test_f12_each_content_is_there_once(tmp_path: Path):
    store = Store(tmp_path)
    assert store.add(toys(1, 2, 1)) == Added(2, 1)
    assert store.add(toys(2, 3)) == Added(1, 1)
    assert store.add(toys(1, 2, 3)) == Added(0, 3)
    assert store.count() == 3 and len(names(store)) == 2


def test_f12_the_content_hash_knows_no_order_and_no_clock(tmp_path: Path):
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    one.add(toys(1, 2))
    one.add(toys(3))
    other.add(toys(3, 2, 1, created_at="2020-01-01T00:00:00Z"))
    assert one.content_hash() == other.content_hash() != Store(tmp_path / "none").content_hash()


def test_a_trace_without_a_time_gets_the_present(tmp_path: Path):
    trace = parse_trace(
        b'{"trace_version":"1.0","prompt":"p","steps":[{"i":0,"type":"s","content":"c"}],"final_answer":"a"}'
    )
    store = Store(tmp_path)
    store.add([trace])
    [stored] = store.scan()
    assert trace.created_at == "" and stored.created_at.endswith("Z")
    assert content_sha256(stored) == content_sha256(trace)


def test_the_same_id_with_other_content_is_refused_by_name(tmp_path: Path):
    store = Store(tmp_path)
    store.add(toys(1, id="mine"))
    for traces in (toys(2, id="mine"), [*toys(8, id="twice"), *toys(9, id="twice")]):
        with pytest.raises(RequestError, match="'mine'|'twice'"):
            store.add([*toys(7), *traces])
    assert store.count() == 1


def test_meta_values_are_counted_most_frequent_first(tmp_path: Path):
    store = Store(tmp_path)
    store.add([*toys(0, 1, 3, 4, 6), make_trace("q", [("s", "c")], "a", {"list": [1]})])
    assert store.meta_values() == {"flag": {True: 5}, "game": {"duel": 5}, "n": {0: 3, 1: 2}}
    assert store.meta_values(limit=1)["n"] == {0: 3}


def test_f35_a_flipped_bit_anywhere_in_a_segment_is_named(tmp_path: Path):
    store = Store(tmp_path)
    store.add(toys(*range(10)))
    path = tmp_path / names(store)[0]
    whole, source = path.read_bytes(), random.Random(35)
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        path.write_bytes(damaged)
        for read in (
            lambda: list(store.scan()),
            store.count,
            store.content_hash,
            lambda: store.add(toys(99)),
        ):
            with pytest.raises(RetraceError, match=f"{path.name} is damaged: restore"):
                read()
    path.write_bytes(whole)
    assert store.count() == 10


def test_f35_a_file_that_is_no_segment_is_named(tmp_path: Path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    path = path.rename(tmp_path / f"{sha256_file(path)}.parquet")
    with pytest.raises(RetraceError, match=path.name):
        Store(tmp_path).count()


def test_f26_what_a_killed_writer_left_is_swept_away_by_the_next(tmp_path: Path):
    (tmp_path / ".abc.parquet.x1.tmp").write_bytes(b"half")
    store = Store(tmp_path)
    store.add(toys(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", *names(store)]


def test_f30_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written") as caught:
        Store(tmp_path / "file" / "store").add(toys(1))
    assert "\n" not in str(caught.value)


@pytest.fixture
def read_only_folder():
    """A folder that this process may not write to; root, who may write anywhere, becomes nobody meanwhile."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_f30_a_read_only_folder_is_one_line(read_only_folder: Path):
    with pytest.raises(RequestError, match="cannot be written") as caught:
        Store(read_only_folder).add(toys(1))
    assert "\n" not in str(caught.value) and list(read_only_folder.iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from lib.data.store import Store
from lib.trace import make_trace
store, first = Store(Path(sys.argv[1])), int(sys.argv[2])
for n in range(first, first + 20):
    store.add([make_trace(f"{n}?", [("step", "s")], str(n), {})])
"""


def test_f31_two_writers_lose_nothing_and_leave_no_lock_held(tmp_path: Path):
    commands = [[sys.executable, "-c", WRITER, str(tmp_path), first] for first in ("0", "10")]
    both = [subprocess.Popen(command, cwd=repository_root()) for command in commands]
    assert [process.wait() for process in both] == [0, 0]
    store = Store(tmp_path)
    assert sorted(int(trace.final_answer) for trace in store.scan()) == list(range(30))
    assert store.add(toys(1)) == Added(1, 0)
