"""The store: append-only, each content once, whole or not at all, and never believed unverified."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import frames
from lib.data import store as store_module
from lib.data.store import Added, Store, first_of_each, remembering
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
    assert frame.columns == ["id", "content_sha256", "created_at", "record", "facts", "file", "line"]
    assert frame["record"].to_list() == [to_json(trace).decode() for trace in traces]


def test_a_segment_of_other_columns_is_refused_as_such_and_not_as_damaged(tmp_path: Path):
    store = Store(tmp_path)
    store.add(toys(1, 2))
    [name] = names(store)
    pl.read_parquet(tmp_path / name).drop("facts").write_parquet(tmp_path / "new")
    (tmp_path / name).unlink()
    path = (tmp_path / "new").rename(tmp_path / f"{sha256_file(tmp_path / 'new')}.parquet")
    for read in (store.content_hash, lambda: list(store.scan()), lambda: store.add(toys(3))):
        with pytest.raises(RequestError, match=f"{path.name}: written by another version; import its traces again"):
            read()


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


def one_at_a_time(held: dict[str, str], given: list[tuple[str, str]]) -> dict[str, str] | None:
    """What a store of content by id holds after these, told as simply as can be; None where an id is taken."""
    held, owners = dict(held), dict(held)
    for id, content in given:
        if owners.setdefault(id, content) != content:
            return None
        if content not in held.values():
            held[id] = content
    return held


pairs = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("vwxyz")), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(pairs, min_size=1, max_size=4), st.integers(1, 3))
def test_what_is_new_and_what_is_refused_is_as_one_at_a_time_would_have_it(tmp_path_factory, calls, few):
    store, held = Store(tmp_path_factory.mktemp("store")), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "BATCH_TRACES", few)
        for given_pairs in calls:
            traces = [make_trace(content, [("s", "c")], "a", {}, id=id) for id, content in given_pairs]
            expected = one_at_a_time(held, given_pairs)
            if expected is None:
                with pytest.raises(RequestError, match="is taken by other content"):
                    store.add(traces)
                continue
            new = len(expected) - len(held)
            assert store.add(traces) == Added(new, len(traces) - new)
            held = expected
            assert {trace.id: trace.prompt for trace in store.scan()} == held
            assert store.count() == len(held)
            assert store.add(traces) == Added(0, len(traces))


halves = st.sampled_from([0, 1, 1 << 55, 1 << 56, (1 << 56) + 1, (1 << 64) - 1])


@given(st.lists(st.tuples(halves, halves), max_size=12))
def test_the_first_of_each_is_so_in_both_halves(pairs):
    keys = np.array(pairs, np.uint64).reshape(-1, 2)
    assert first_of_each(*keys.T).tolist() == [pair not in pairs[:number] for number, pair in enumerate(pairs)]


def test_ids_that_are_told_apart_only_by_themselves_are_not_mistaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Were the short hashes of all ids equal, the store would still know whose id is whose."""
    monkeypatch.setattr(store_module, "_ID", pl.col("id").hash() * 0)
    monkeypatch.setattr(store_module, "_KEYS", (store_module._ID, *store_module._KEYS[1:]))
    store = Store(tmp_path)
    assert store.add([*toys(1, id="one"), *toys(2, id="two"), *toys(1, id="other")]) == Added(2, 1)
    assert store.add([*toys(2, id="three"), *toys(3, id="four")]) == Added(1, 1)
    with pytest.raises(RequestError, match="'four' is taken"):
        store.add(toys(4, id="four"))


def test_traces_of_many_batches_keep_their_order_and_are_read_in_pieces(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_TRACES", 7)
    monkeypatch.setattr(frames, "GROUP_ROWS", 7)
    store, traces = Store(tmp_path), toys(*range(100))
    assert store.add([*traces[:60], *traces[50:]]) == Added(100, 10)
    assert store.add(traces) == Added(0, 100)
    assert list(store.scan()) == traces and store.count() == 100 and len(names(store)) == 1
    alone = Store(tmp_path / "alone")
    alone.add(reversed(traces))
    assert store.content_hash() == alone.content_hash()


def test_a_segment_of_which_little_came_first_is_as_small_as_any_other(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_TRACES", 100)
    old, new = toys(*range(100)), toys(9_999, *range(100, 2_000), created_at="2020-01-01T00:00:00Z")
    grown, whole = Store(tmp_path / "grown"), Store(tmp_path / "whole")
    grown.add(old)
    grown.add([*old[:99], *new])
    whole.add(new)
    assert whole.segments()[0].name in names(grown)


def test_what_is_found_of_short_texts_is_remembered_and_no_long_one_is_kept():
    asked = []
    look_up = remembering(lambda text, more="": asked.append(text) or f"{text}{more}")
    for text, more in (("short", "1"), ("short", "2"), ("x" * 20_000, "1")):
        assert [look_up(text, more) for _ in range(2)] == [f"{text}{more}"] * 2
    assert [len(text) for text in asked] == [5, 5, 20_000, 20_000]


def test_a_scan_may_be_left_before_its_end(tmp_path: Path):
    store = Store(tmp_path)
    store.add(toys(1, 2, 3))
    assert next(store.scan()).final_answer == "1" and store.add(toys(4)) == Added(1, 0)


def test_meta_values_are_counted_most_frequent_first(tmp_path: Path):
    store = Store(tmp_path)
    store.add([*toys(0, 1, 3, 4, 6), make_trace("q", [("s", "c")], "a", {"list": [1]})])
    assert store.meta_values() == {"flag": {"true": 5}, "game": {'"duel"': 5}, "list": {"[]": 1}, "n": {"0": 3, "1": 2}}
    assert store.meta_values(limit=1)["n"] == {"0": 3}


def test_all_values_of_a_meta_key_are_told_where_no_limit_is_given(tmp_path: Path):
    store = Store(tmp_path)
    store.add(make_trace(f"{n}?", [("s", "c")], "a", {"v": n}) for n in range(25))
    assert store.meta_values() == {"v": dict.fromkeys(map(str, range(25)), 1)}


def test_meta_values_of_other_kinds_are_other_values(tmp_path: Path):
    store = Store(tmp_path)
    store.add(
        make_trace("q", [("s", "c")], "a", {"v": value}) for value in (1, True, 1.0, "1", None, [2], [], {"a": 1})
    )
    assert store.meta_values() == {"v": {"[]": 2, **dict.fromkeys(("1", "true", "1.0", '"1"', "null", "{}"), 1)}}


def test_no_more_meta_values_are_held_than_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "VALUES", 3)
    store = Store(tmp_path)
    store.add(make_trace(f"{n}?", [("s", "c")], "a", {"n": n, "even": n % 2}) for n in [*range(6), 2])
    store.add(make_trace("again?", [("s", str(n))], "a", {"n": 2}) for n in range(3))
    found = store.meta_values()
    assert found["even"] == {"0": 3, "1": 3} and len(found["n"]) == 3 and found["n"]["2"] == 4


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


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import polars, lib.data.store as store
from lib.trace import make_trace
def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
owner, _, name = sys.argv[2].rpartition(".")
setattr(eval(owner), name, die)
store.Store(Path(sys.argv[1])).add(make_trace(f"{n}?", [("step", "s")], str(n), {}) for n in range(10_000))
"""


@pytest.mark.parametrize(
    "moment", ["polars.LazyFrame.sink_parquet", "store.Store._known", "shutil.copyfileobj", "os.fsync", "os.replace"]
)
def test_f23_killed_at_any_moment_of_adding_nothing_is_there_and_the_next_writer_sweeps(tmp_path: Path, moment: str):
    folder = tmp_path / "store"
    store, temporary = Store(folder), tmp_path / "temporary"
    temporary.mkdir()
    store.add(toys(1, 2))
    before = names(store), store.content_hash()
    command = [sys.executable, "-c", KILLED, str(folder), moment]
    done = subprocess.run(command, cwd=repository_root(), env=os.environ | {"TMPDIR": str(temporary)})
    assert done.returncode == -signal.SIGKILL
    assert (names(store), store.content_hash()) == before and list(temporary.iterdir()) == []
    assert store.add(toys(3)) == Added(1, 0)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", *names(store)]


def test_f28_a_full_temporary_folder_is_one_line_and_leaves_the_store_alone(tmp_path: Path, monkeypatch):
    store = Store(tmp_path / "store")
    monkeypatch.setattr(pl.LazyFrame, "sink_parquet", full_disk)
    with pytest.raises(RetraceError, match="temporary folder .*: cannot be written .*nothing was added") as caught:
        store.add(toys(*range(10_000)))
    assert "\n" not in str(caught.value) and not store.folder.exists()


def full_disk(*args, **options) -> None:
    raise pl.exceptions.ComputeError("No space left on device (os error 28)")


def test_what_raises_while_traces_come_is_raised_and_nothing_is_added(tmp_path: Path):
    def traces() -> Iterator[Trace]:
        yield from toys(*range(9_000))
        raise KeyError("mine")

    store = Store(tmp_path / "store")
    with pytest.raises(KeyError, match="mine"):
        store.add(traces())
    assert not store.folder.exists()


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


def test_f31_the_store_is_free_for_others_while_traces_still_come(tmp_path: Path):
    store, other = Store(tmp_path), Store(tmp_path)

    def traces() -> Iterator[Trace]:
        yield from toys(1)
        assert other.add(toys(1, 2)) == Added(2, 0)
        yield from toys(2, 3)

    assert store.add(traces()) == Added(1, 2)
    assert sorted(trace.final_answer for trace in store.scan()) == ["1", "2", "3"]


HOLDER = """
import sys, time
from pathlib import Path
from lib.data.store import Store
with Store(Path(sys.argv[1]))._locked():
    (Path(sys.argv[1]) / ".half.parquet.x.tmp").write_bytes(b"half")
    print("held", flush=True)
    time.sleep(600)
"""


def test_f33_the_lock_of_a_killed_writer_is_free_within_five_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=repository_root(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.2)
        with pytest.raises(RequestError, match="another process is writing"):
            store.add(toys(1))
    finally:
        holder.kill()
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 5)
    killed = time.monotonic()
    assert store.add(toys(1)) == Added(1, 0) and time.monotonic() - killed < 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", *names(store)]
    holder.wait()
