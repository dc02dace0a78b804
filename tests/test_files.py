"""Files are replaced whole or not at all, and names never leave their folder."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from lib.errors import RequestError
from lib.files import (
    atomic_folder,
    atomic_open,
    atomic_write,
    check_writable,
    child,
    is_sealed,
    repository_root,
    sealed,
    sha256_bytes,
    sha256_file,
    write_json,
)
from lib.files import home as home_folder


def test_a_write_replaces_the_whole_content_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "file"
    for content in ("a longer text\n", "é", b"\x00\xff", ""):
        atomic_write(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt, SystemExit])
def test_f23_an_interrupted_write_leaves_the_old_content_alone(tmp_path: Path, interruption: type[BaseException]):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(interruption), atomic_open(path) as file:
        file.write(b"new")
        raise interruption
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_file_takes_the_place_of_a_link_and_not_of_a_pipe(tmp_path: Path):
    pipe, link, other = tmp_path / "pipe", tmp_path / "link", tmp_path / "other"
    os.mkfifo(pipe)
    link.symlink_to(other)
    for ask in (check_writable, lambda path: atomic_write(path, "x")):
        with pytest.raises(RequestError, match="pipe: is no regular file"):
            ask(pipe)
    atomic_write(link, "x")
    assert pipe.is_fifo() and not link.is_symlink() and not other.exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    with atomic_folder(folder) as scratch:
        (scratch / "file").write_text("x")
        assert not folder.exists()
    assert [path.name for path in folder.parent.rglob("*")] == ["folder", "file"]
    for interruption in (ValueError, KeyboardInterrupt):
        with pytest.raises(interruption), atomic_folder(tmp_path / "other") as scratch:
            (scratch / "file").write_text("x")
            raise interruption
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_a_killed_writer_left_is_removed_by_the_next_and_that_of_a_living_one_is_not(tmp_path: Path):
    program = (
        "import os, signal, sys; from pathlib import Path; from lib.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = tmp_path / "exported"
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=repository_root())
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".exported.") and (left / "half").exists()
    with atomic_folder(folder) as first:
        assert [path.name for path in tmp_path.iterdir()] == [first.name] != [left.name]
        with pytest.raises(ValueError), atomic_folder(folder):
            assert first.is_dir()
            raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_a_folder_replaces_an_empty_one_and_nothing_else(tmp_path: Path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_text("old")
    with atomic_folder(folder) as scratch:
        (scratch / "file").write_text("x")
    for taken in (folder, file):
        with pytest.raises(RequestError, match="there is something already"), atomic_folder(taken):
            raise AssertionError("not reached")
    with pytest.raises(OSError) as caught, atomic_folder(file / "folder"):
        raise AssertionError("not reached")
    assert str(caught.value.filename) == str(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"] and file.read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
import lib.files
setattr(os, sys.argv[2], lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
lib.files.atomic_write(Path(sys.argv[1]), "new" * 10_000)
"""


@pytest.mark.parametrize("moment", ["fdopen", "fsync", "chmod", "replace"])
def test_f23_killed_at_any_moment_of_a_write_the_old_content_stays(tmp_path: Path, moment: str):
    path = tmp_path / "file"
    path.write_text("old")
    command = [sys.executable, "-c", KILLED, str(path), moment]
    assert subprocess.run(command, cwd=repository_root()).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    atomic_write(path, "newer")
    assert path.read_text() == "newer"


def test_a_written_file_has_the_permissions_that_the_user_gives_new_files(tmp_path: Path):
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_name_as_long_as_a_file_system_takes_is_written(tmp_path: Path):
    for name in ("x" * 255, "é" * 127):
        atomic_write(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def test_json_is_readable_utf8_in_the_order_given_and_holds_no_nan(tmp_path: Path):
    write_json(tmp_path / "a.json", {"b": "é", "a": [1.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n "b": "é",\n "a": [\n  1.5,\n  null\n ]\n}\n'
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"b": float("nan")})
    assert json.loads((tmp_path / "a.json").read_bytes())["b"] == "é"


def test_f37_any_flipped_bit_of_a_sealed_file_shows_even_one_that_reads_as_the_same_numbers(tmp_path: Path):
    record = {
        "rate": 1e-05,
        "wall_s": 0.30000000000000004,
        "loss": 2.2250738585072014e-308,
        "name": "é\n",
        "at": [1, {}],
    }
    write_json(tmp_path / "a.json", sealed(record))
    whole = (tmp_path / "a.json").read_bytes()
    same = 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        with suppress(ValueError):
            same += json.loads(flipped) == json.loads(whole)
            assert not is_sealed(bytes(flipped))
    assert is_sealed(whole) and same >= 2


def test_hashes_are_sha256(tmp_path: Path):
    content = bytes(range(256)) * 5_000
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == sha256_bytes(content) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "..",
        ".",
        "",
        ".hidden",
        "-x",
        "/etc",
        "a/b",
        "a\\b",
        "{x}",
        "a b",
        "x\n",
        "a\0b",
        "é",
        "x" * 101,
        "x" * 300,
    ],
)
def test_f39_a_hostile_name_becomes_no_path(tmp_path: Path, name: str):
    for names in ((name,), ("datasets", name)):
        with pytest.raises(RequestError, match="cannot become a file name") as caught:
            child(tmp_path, *names)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_ordinary_names_become_paths_inside_the_folder(tmp_path: Path):
    for name in ("quickstart-v1", "20251221_100000_quick.start", "a+b", "x" * 100, "1..2"):
        assert child(tmp_path, "datasets", name) == tmp_path / "datasets" / name


def test_f39_a_link_that_leads_out_becomes_no_path(tmp_path: Path):
    folder, outside = tmp_path / "home", tmp_path / "outside"
    (folder / "datasets").mkdir(parents=True)
    outside.mkdir()
    for target in (outside, tmp_path / "absent", Path("../../outside"), Path("/")):
        (folder / "datasets" / "link").symlink_to(target)
        for names in (("datasets", "link"), ("datasets", "link", "x")):
            with pytest.raises(RequestError, match="a link that leads out of"):
                child(folder, *names)
        (folder / "datasets" / "link").unlink()


def test_a_link_within_the_folder_and_a_folder_that_is_one_are_followed(tmp_path: Path):
    (tmp_path / "disk" / "a").mkdir(parents=True)
    (tmp_path / "disk" / "same").symlink_to("a")
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    assert child(tmp_path / "home", "same") == tmp_path / "home" / "same"
    assert child(tmp_path / "home", "new") == tmp_path / "home" / "new"


def test_everything_produced_is_kept_where_retrace_home_says(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert home_folder() == home
    for value in ("", None):
        monkeypatch.setenv("RETRACE_HOME", value) if value is not None else monkeypatch.delenv("RETRACE_HOME")
        assert home_folder() == repository_root() / "runs"
