"""Do it again, and hold everything against what was recorded: the code at its commit, the same data, the same seed.

    certificate = reproduce("20261122_101500_quickstart")     # a run of this home, or a report.html from anywhere
    certificate.equal                  # True only where everything that was promised came out equal
    certificate.rows                   # Row(what, recorded, found, equal, note), one a promise
    certificate.first_step_apart       # the optimizer step where they part, or None

The code is taken from git as it was, with the stored patch where the tree was dirty, into a scratch folder with a
home of its own; with `prove` it runs in a fresh virtual environment of the recorded packages. The certificate, as
JSON and as a page, is written to `certificates/` of the home.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib.config import parse_yaml
from lib.data.dataset import Dataset, load_dataset
from lib.data.frames import read_frames
from lib.data.store import Store
from lib.errors import RequestError, RetraceError
from lib.experiments.evidence import (
    EVIDENCE,
    Row,
    compare_results,
    first_step_apart,
    is_promised,
    promised,
    provenance,
    read_record,
)
from lib.experiments.index import write_index
from lib.experiments.manifest import PATCH
from lib.experiments.report import write_certificate
from lib.experiments.run import MANIFEST, find_run, read_manifest
from lib.experiments.stages import command, datasets, store
from lib.experiments.verify import verify_run
from lib.files import child, find_interpreter, home, places_of, repository_root, sha256_file, shown_path, write_json
from lib.model.released import is_from_scratch
from lib.tasks.reasoning_gym import VARIABLE
from lib.trace import Trace, utc_now

VERSION = "1.0"


@dataclass(frozen=True)
class Certificate:
    """What came of doing a run again. `explanation` says why the rows that differ may, or must not, differ."""

    certificate_version: str
    run: str
    run_id: str
    created_at: str
    equal: bool
    rows: list[Row]
    first_step_apart: int | None
    fingerprint: list[dict[str, Any]]
    packages: list[dict[str, Any]]
    explanation: list[str]
    code: dict[str, Any]
    environment: str
    seconds: float


@dataclass(frozen=True)
class _Source:
    """What is to be done again: its record, its folder where it is on this machine, and what is wrong with that."""

    record: dict[str, Any]
    folder: Path | None
    findings: list[str]


def reproduce(source: str, prove: bool = False, say: Callable[[str], None] = print) -> tuple[Certificate, Path]:
    """Execute a run again and compare. Returns the certificate, and its page.

    Raises RequestError where the run is not done, or its code or its data cannot be had here; RetraceError where
    doing it again fails.
    """
    original, started = _source(source), time.perf_counter()
    name = f"{original.record['run'][:79]}_{datetime.now(UTC):%Y%m%d_%H%M%S}"  # a name has at most a hundred
    page = child(home(), "certificates", f"{name}.html")
    for finding in original.findings:
        say(f"not as recorded: {finding}")
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home(), prefix=".reproduce_", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        _restore_code(original, scratch / "code")
        _restore_traces(original.record, scratch / "home")
        python = _fresh_environment(original.record, scratch, say) if prove else Path(sys.executable)
        again = _execute(original.record, scratch, python, say)
        found = read_record(again / EVIDENCE)
        certificate = _certificate(original, found, prove, time.perf_counter() - started)
        page.parent.mkdir(exist_ok=True)
        if not certificate.equal:
            shutil.move(again, page.with_suffix(""))
            say(f"What was executed, to look at: {shown_path(page.with_suffix(''))}")
    write_json(page.with_suffix(".json"), asdict(certificate) | {"rows": [row._asdict() for row in certificate.rows]})
    write_certificate(page, certificate, provenance(original.record, command("runs", "reproduce", source)))
    write_index(home() / "index.html")
    return certificate, page


def _source(source: str) -> _Source:
    if source.endswith(".html"):
        record = read_record(Path(source))
        if record["code"].get("git_dirty"):
            raise RequestError(
                f"{source}: the run was made with changes that were not committed, and a page does not hold them; "
                "reproduce it from its run folder, which does"
            )
        return _Source(record, None, [])
    folder = find_run(source)
    if (folder / MANIFEST).is_file() and not (findings := verify_run(folder)):
        if (status := read_manifest(folder)["status"]) != "done":
            raise RequestError(f"{source}: its status is {status}, and only a run that is done can be reproduced")
    elif not (folder / MANIFEST).is_file():
        raise RequestError(f"{source}: has no manifest yet; go on with it first: {command('resume', source)}")
    return _Source(read_record(folder / EVIDENCE), folder, findings)


# ---- making it again ---------------------------------------------------------------------------------------


def _restore_code(original: _Source, target: Path) -> None:
    """The code as it was; outside of a checkout, where no commit was recorded, as it is."""
    code = original.record["code"]
    if not code["git_sha"]:
        shutil.copytree(repository_root(), target, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        return
    if not re.fullmatch(r"[0-9a-f]{40,64}", code["git_sha"]):
        raise RequestError(f"git_sha {code['git_sha']!r}: expected the name of a commit")
    target.mkdir()
    archive = target.parent / "code.tar"
    there = ["git", "-C", str(repository_root()), "archive", "--output", str(archive), code["git_sha"]]
    _call(there, f"commit {code['git_sha']} is not in this repository; fetch it with git")
    shutil.unpack_archive(archive, target, filter="data")
    if code["git_dirty"]:
        patch = original.folder / PATCH
        if not patch.is_file() or sha256_file(patch) != code["git_patch_sha256"]:
            raise RequestError(f"{patch}: not the changes that the run was made with; its code cannot be had")
        _call(["git", "apply", str(patch.resolve())], f"{patch}: does not apply to {code['git_sha']}", cwd=target)


def _restore_traces(record: dict[str, Any], target: Path) -> None:
    """What the run did not generate itself, or not at one time, from this home's store as it was then."""
    key, sources = record["dataset"]["dataset_key"], record["dataset"]["provenance"]["sources"]
    game = _named(parse_yaml(record["config"], "config.yaml"), "traces", "game")
    played = bool(game) and sources.keys() == {"builtin"}
    try:
        dataset = load_dataset(datasets(), key)
    except RequestError:
        dataset = None
    if dataset is None or dataset.manifest["content_sha256"] != record["results"]["dataset_sha256"]:
        if not played:
            raise RequestError(
                f"dataset {key}: holds traces that the run did not play itself, and is not in this home with the "
                f"content {record['results']['dataset_sha256']}; import them and build it first, or give --home"
            )
        return
    traces = _as_of(dataset)
    moments = {trace.created_at for trace in traces}
    by_time = dataset.manifest["selection_strategy"] == "latest" and len(moments) > 1
    if not played or by_time or {trace.meta.get("game") for trace in traces} != {game}:
        Store(target / "store").add(traces)


def _as_of(dataset: Dataset) -> list[Trace]:
    """The traces that the dataset was chosen from: its own, and those that it left out as far as they are here."""
    left_out = {id for frame in read_frames(dataset.folder / "dropped.parquet", "id") for id in frame["id"]}
    return [*dataset.traces, *(trace for trace in store().scan() if trace.id in left_out)]


def _fresh_environment(record: dict[str, Any], scratch: Path, say: Callable[[str], None]) -> Path:
    """A virtual environment with exactly the recorded packages, and the interpreter in it."""
    recorded = record["fingerprint"]["python"]
    minor = ".".join(recorded.split(".")[:2])
    here = ".".join(map(str, sys.version_info[:2]))
    interpreter = sys.executable if here == minor else shutil.which(f"python{minor}")
    if interpreter is None:
        raise RequestError(f"the run was made with Python {recorded}; install Python {minor}, or leave out --prove")
    known = re.findall(r"^([A-Za-z0-9._-]+)==", (scratch / "code" / "requirements.txt").read_text(), re.MULTILINE)
    needed = {_normal(name) for name in known}  # by the code itself: nothing else of the list is installed
    packages = [f"{name}=={version}" for name, version in _versions(record["environment"]).items() if name in needed]
    (scratch / "packages.txt").write_text("\n".join(packages) + "\n")
    say(f"Installing {len(packages)} packages, in their recorded versions, into a fresh environment …")
    _call([interpreter, "-m", "venv", str(scratch / "venv")], "no virtual environment could be made")
    python = scratch / "venv" / "bin" / "python"
    _call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
           "-r", str(scratch / "packages.txt")], "the recorded packages could not be installed")  # fmt: skip
    return python


def _bring_along(config: dict[str, Any], code: Path) -> None:
    """What the configuration names by a path that leads to it from here, where the code to be executed looks for it."""
    eval_set, model = _named(config, "evaluation", "eval_set"), _named(config, "model", "name")
    names = [eval_set, f"{eval_set.removesuffix('.jsonl')}.manifest.json", "" if is_from_scratch(model) else model]
    for name in filter(None, names):
        place = Path(os.path.abspath(code / name))
        found = next((here for here in places_of(name) if here.exists()), None)
        if found and not place.exists() and place.is_relative_to(os.path.abspath(code)):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(found.absolute())


def _named(config: Any, section: str, field: str) -> str:
    """The text that stands there; empty where there is none, as a record may hold anything."""
    part = config.get(section) if isinstance(config, dict) else None
    name = part.get(field) if isinstance(part, dict) else None
    return name if isinstance(name, str) else ""


def _found_from_here(interpreter: str) -> str:
    """The path of an interpreter for whoever works elsewhere; links stay, as Python finds its packages by the path."""
    found = find_interpreter(interpreter)
    return os.path.abspath(found) if Path(found).is_file() else found


def _execute(record: dict[str, Any], scratch: Path, python: Path, say: Callable[[str], None]) -> Path:
    """The run again, by its own code in a process of its own. Returns its folder."""
    config = scratch / "config.yaml"
    config.write_text(record["config"], "utf-8")
    recorded = parse_yaml(record["config"], "config.yaml")
    _bring_along(recorded, scratch / "code")
    command = [str(python), "-m", "lib", "--home", str(scratch / "home"), "run", str(config), "--name", "again"]
    if recorded.get("tracking"):  # nobody else is told of the repetition
        command += ["--set", "tracking=[]"]
    if ungar := _named(recorded, "traces", "ungar_python"):
        command += ["--set", f"traces.ungar_python={json.dumps(_found_from_here(ungar), ensure_ascii=False)}"]
    environment = {**os.environ, "NO_COLOR": "1"}  # what it says is told by us
    environment["PYTHONPATH"] = str(scratch / "code")  # before an installed lib, in its kernels too
    if gym := os.environ.get(VARIABLE):
        environment[VARIABLE] = _found_from_here(gym)
    process = subprocess.Popen(
        command, cwd=scratch / "code", env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    line = ""
    with process:
        try:
            for line in process.stdout:
                say(f"  {line.rstrip()}")
        except BaseException:
            process.terminate()  # it ends its kernel itself
            raise
    if process.returncode:
        raise RetraceError(f"doing it again failed: {line.strip().removeprefix('error: ')}")
    return next((scratch / "home").glob("*_again"))


def _call(command: list[str], reason: str, cwd: Path | None = None) -> None:
    ceiling = {"GIT_CEILING_DIRECTORIES": str(cwd.parent)} if cwd else {}  # git apply is to see no repository around it
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **ceiling})
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RequestError(f"{reason} ({said[-1] if said else done.returncode})")


# ---- saying what came of it --------------------------------------------------------------------------------


def _certificate(original: _Source, again: dict[str, Any], prove: bool, seconds: float) -> Certificate:
    record = original.record
    rows = [Row(f"on disk: {finding}", "as recorded", "not as recorded", False) for finding in original.findings]
    rows += compare_results(record["results"], again["results"])
    fingerprint = _different(record["fingerprint"], again["fingerprint"])
    packages = _different(_versions(record["environment"]), _versions(again["environment"]))
    return Certificate(
        certificate_version=VERSION,
        run=record["run"],
        run_id=record["run_id"],
        created_at=utc_now(),
        equal=all(row.equal for row in rows),
        rows=rows,
        first_step_apart=first_step_apart(record["results"], again["results"]),
        fingerprint=fingerprint,
        packages=packages,
        explanation=_explanation(record, rows, original.findings, fingerprint, packages),
        code=record["code"],
        environment="a fresh environment of the recorded packages" if prove else "the present environment",
        seconds=round(seconds, 1),
    )


def _explanation(
    record: dict[str, Any], rows: list[Row], findings: list[str], fingerprint: list[dict], packages: list[dict]
) -> list[str]:
    said = []
    if not record["code"]["git_sha"]:
        said.append("The run was made outside a git checkout, so the code as it is now was executed.")
    if not is_promised(record):
        said.append(promised(record))
    apart = [row.what for row in rows[len(findings) :] if not row.equal]
    if findings:
        said.append("The run folder is no longer what was recorded: " + "; ".join(findings) + ".")
    if apart and fingerprint:
        entries = ", ".join(
            f"{entry['name']} ({entry['recorded']} recorded, {entry['found']} here)" for entry in fingerprint
        )
        said.append(f"The fingerprints differ ({entries}), and equal bits are promised only within one.")
    elif apart and packages:
        entries = ", ".join(f"{entry['name']} ({entry['recorded']}, {entry['found']})" for entry in packages[:10])
        said.append(f"The fingerprints are equal, and packages differ: {entries}.")
    elif apart and is_promised(record):
        said.append("The fingerprints and packages are equal: equality was promised, and was not kept.")
    return said


def _different(recorded: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "recorded": recorded.get(name, "absent"), "found": found.get(name, "absent")}
        for name in sorted(recorded.keys() | found.keys())
        if recorded.get(name) != found.get(name)
    ]


def _versions(environment: list[str]) -> dict[str, str]:
    """Package → version, of lines that name one; without what is not installed from an index."""
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._+!-]+)", line) for line in environment]
    return {_normal(match[1]): match[2] for match in found if match and match[1] not in ("retrace", "pip")}


def _normal(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()
