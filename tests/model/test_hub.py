"""Released models by name: a folder, the cache, or the hub, which is played here by a server on the loopback.

Each case runs in a process of its own, with the environment variables that a user would set.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from lib.files import repository_root

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    name: f"the content of {name}".encode()
    for name in (
        "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    )
}  # fmt: skip
PARTS = [name for name in FILES if name.startswith("model-")]
FILES["model.safetensors.index.json"] = json.dumps({"weight_map": dict(zip("ab", PARTS, strict=True))}).encode()
TWICE = {"README.md": b"...", "gemma-2b.gguf": b"...", "pytorch_model.bin": b"...", "pytorch_model.bin.index.json": b""}
OPEN, BROKEN = "google/gemma-3-270m", "google/breaks-off"
# What the hub answers where it does not give: status, and the header X-Error-Code.
ANSWERS = {
    "google/gemma-2b-it": (403, "GatedRepo"),
    "google/gemma-2b": (401, "GatedRepo"),
    "google/nothing": (404, "RepoNotFound"),
    "google/private": (401, "RepoNotFound"),
    "google/forbidden": (403, ""),
    "google/down": (503, ""),
}
# The licence of these is asked for where a file is, and not where they are described.
GATED_FILES = "google/gemma-7b"


class Hub(ThreadingHTTPServer):
    """A hub on the loopback that remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """The part of the hub's interface that a download needs: a description, a list of files, the files."""

    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        if path.startswith("api/"):  # what the library would like to know beside
            return self.give(404, b"")
        self.server.asked.append(f"{self.command} {path}")
        owner, name, *rest = path.split("/")
        model = f"{owner}/{name}"
        if model in ANSWERS:
            status, code = ANSWERS[model]
            return self.give(status, b"{}", {"X-Error-Code": code} if code else {})
        if rest[0] == "revision":
            return self.give(200, json.dumps({"id": model, "sha": COMMIT, "siblings": []}).encode())
        if rest[0] == "tree":
            sizes = {file: len(content) for file, content in (FILES | TWICE).items()}
            listed = [{"type": "file", "path": file, "size": size, "oid": file} for file, size in sizes.items()]
            return self.give(200, json.dumps(listed).encode())
        if model == GATED_FILES:
            return self.give(403, b"", {"X-Error-Code": "GatedRepo"})
        content = (FILES | TWICE)[rest[-1]]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.give(200, content, headers, breaks_off=model == BROKEN and rest[-1].endswith(".safetensors"))

    do_HEAD = do_GET

    def give(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, breaks_off: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:2] if breaks_off else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


FIND = """
import sys
from lib.errors import RequestError
from lib.model.released import find_released
for name in sys.argv[2:]:
    try:
        print("found", find_released(name, fetch=sys.argv[1] == "fetch"))
    except RequestError as refused:
        print(repr(str(refused)))
assert "jax" not in sys.modules
"""


def found(home: Path, *names: str, fetch: bool = True, **environment: str) -> list[str]:
    """What `find_released` gave for each name, or the repr of its refusal."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", FIND, "fetch" if fetch else "stay", *names],
        cwd=repository_root(),
        env=kept | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_model_is_fetched_once_and_only_the_files_it_needs(hub: Hub, tmp_path: Path):
    hub.asked.clear()
    [line, again] = found(tmp_path, OPEN, OPEN, HF_ENDPOINT=hub.address)
    folder = Path(line.removeprefix("found "))
    assert line == again and folder.is_relative_to(tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    assert sum(line.startswith("GET") for line in hub.asked) == 2 + len(FILES)
    hub.asked.clear()
    offline = found(tmp_path, OPEN, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1")
    assert offline == found(tmp_path, OPEN, HF_ENDPOINT="http://127.0.0.1:9") == [line] and not hub.asked


TOKENIZER = """
from lib.model.released import find_released
[folder] = {find_released(NAME, files=["tokenizer.json"]) for _ in range(2)}
print(sorted(path.name for path in folder.iterdir()))
"""


def test_of_a_model_whose_tokenizer_is_asked_for_nothing_else_is_fetched(hub: Hub, tmp_path: Path):
    hub.asked.clear()
    program = TOKENIZER.replace("NAME", repr(OPEN))
    known = {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=repository_root(), env=os.environ | known, capture_output=True, text=True)
    assert done.stdout == "['tokenizer.json']\n", done.stderr
    assert [line.rpartition("/")[2] for line in hub.asked if line.startswith("GET") and "/resolve/" in line] == [
        "tokenizer.json"
    ]
    assert sum("/revision/" in line for line in hub.asked) == 1  # the second time it is there
    [line] = found(tmp_path, OPEN, HF_ENDPOINT=hub.address)  # and it is not taken for the whole model
    assert {file.name for file in Path(line.removeprefix("found ")).iterdir()} == set(FILES)


def test_a_download_that_broke_off_left_no_model(hub: Hub, tmp_path: Path):
    """Some files are in the cache then, and they are not taken for the model."""
    [line] = found(tmp_path, BROKEN, HF_ENDPOINT=hub.address, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert f"Fetching it from {hub.address} failed (" in line and any(tmp_path.rglob("config.json"))
    [line] = found(tmp_path, BROKEN, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in line


@pytest.mark.parametrize("there", [{"config.json"}, FILES.keys() - {PARTS[1]}], ids=["its shape", "some weights"])
def test_a_part_of_a_model_in_the_cache_is_fetched_to_its_end(there: set[str], hub: Hub, tmp_path: Path):
    """As other programs leave it that only look at the configuration, or that were stopped."""
    folder = tmp_path / "hub" / f"models--{OPEN.replace('/', '--')}"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    for name in there:
        (folder / "snapshots" / COMMIT / name).write_bytes(FILES[name])
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    [line] = found(tmp_path, OPEN, fetch=False, HF_ENDPOINT=hub.address)
    assert "not on this machine" in line
    [line] = found(tmp_path, OPEN, HF_ENDPOINT=hub.address)
    assert {file.name for file in Path(line.removeprefix("found ")).iterdir()} == set(FILES)


def test_each_refusal_of_the_hub_says_what_to_do(hub: Hub, tmp_path: Path):
    login = "log in with `hf auth login`, or set HF_TOKEN"
    hidden = f"{hub.address} has no such model, or does not show it to everybody: check the name, or {login}. "
    refused = f"{hub.address} does not accept the token that it was given"
    expected = {
        **{
            name: f"It is gated: accept its licence on {hub.address}/{name}, then {login}. "
            for name in ("google/gemma-2b-it", "google/gemma-2b", GATED_FILES)
        },
        **dict.fromkeys(("google/nothing", "google/private"), hidden),
        "google/forbidden": f"{refused} (403): {login}. ",
        "google/down": f"{hub.address} answered 503: try again later, or elsewhere: hf download google/down. ",
    }
    for name, line in zip(expected, found(tmp_path, *expected, HF_ENDPOINT=hub.address), strict=True):
        assert expected[name] in line and "\\n" not in line
        assert f"model {name}: not on this machine; looked for a folder {name} and in the Hugging Face cache" in line
        assert str(tmp_path) in line and "with nothing to fetch: tiny" in line


def test_without_a_network_or_leave_nothing_is_fetched(hub: Hub, tmp_path: Path):
    hub.asked.clear()
    [line] = found(tmp_path, OPEN, HF_ENDPOINT="http://127.0.0.1:9")
    assert "Fetching it from http://127.0.0.1:9 failed (" in line and f"hf download {OPEN}" in line
    [line] = found(tmp_path, OPEN, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1")
    assert f"HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or fetch it elsewhere: hf download {OPEN}" in line
    [line] = found(tmp_path, OPEN, fetch=False, HF_ENDPOINT=hub.address)
    assert f"fetch it with: hf download {OPEN}" in line and not hub.asked


def test_what_cannot_be_a_name_is_not_asked_for(hub: Hub, tmp_path: Path):
    names = ("a/b/c", "../x", "~nobody/x", "x" * 300)
    hub.asked.clear()
    for name, line in zip(names, found(tmp_path, *names, HF_ENDPOINT=hub.address), strict=True):
        assert f"model {name}: not on this machine" in line
        assert "expected OWNER/NAME, or a folder that is there" in line
    assert not hub.asked
