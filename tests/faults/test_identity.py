"""The same run is the same bits: beside another, on one core, elsewhere, at another hour, in another order.

RETRACE_FAULTS=full in the environment executes each variation whole, with kernels; without it one process varies
all of them at once, on one core, and each alone is followed up to where training would begin.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import once
import pytest
from damage import one_line
from small import CONFIG, SMALL, as_words
from subject import FULL

from lib.config import EvaluationConfig
from lib.files import repository_root
from lib.model.weights import read_about
from lib.tasks import high_card_duel
from lib.trace import to_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("processes_compile_once")]

CODE = ("lib", "notebooks", "configs", "evalsets")
TWINS = {"one twin": "one", "other twin": "other"}  # and what their runs are named
TRAIN = ["train", "--config", CONFIG, *as_words(SMALL)]


@dataclass(frozen=True)
class Variation:
    """What is another for a process: its environment, the checkout that it executes, and more of its request."""

    environment: dict[str, str] = field(default_factory=dict)
    checkout: Path = field(default_factory=repository_root)
    request: dict[str, Any] = field(default_factory=dict)

    def __or__(self, other: "Variation") -> "Variation":
        checkout = self.checkout if other.checkout == repository_root() else other.checkout
        return Variation(self.environment | other.environment, checkout, self.request | other.request)


def begun(home: Path, variation: Variation, **more: Any) -> subprocess.Popen:
    home.mkdir(parents=True, exist_ok=True)
    request = {"home": str(home), "settings": SMALL, "name": "toy"} | variation.request | more
    path = os.pathsep.join(filter(None, [str(variation.checkout), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, once.__file__, json.dumps(request)],
        cwd=variation.checkout, env=os.environ | {"PYTHONPATH": path} | variation.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> dict[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err[-3_000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def variations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variation]:
    folder = tmp_path_factory.mktemp("varied")
    for name in CODE:
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(repository_root() / name, folder / "a checkout elsewhere" / name, ignore=ignore)
    lines = [to_json(trace) + b"\n" for trace in high_card_duel.generate(200, 7, created_at="2025-01-01T00:00:00Z")]
    (folder / "late.jsonl").write_bytes(b"".join(lines[:70:-1]))
    (folder / "early.jsonl").write_bytes(b"".join(lines[:80]))
    files = [str(folder / "late.jsonl"), str(folder / "early.jsonl")]
    ascii_alone = {"LC_ALL": "POSIX", "LANG": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return {
        "one core": Variation(request={"cores": [min(os.sched_getaffinity(0))]}),
        "time zone": Variation({"TZ": "Asia/Kathmandu"}),
        "locale": Variation(ascii_alone),
        "hash seed": Variation({"PYTHONHASHSEED": "12345"}),
        "path": Variation(checkout=folder / "a checkout elsewhere"),
        "order": Variation(request={"imports": files}),
    }


@pytest.fixture(scope="module")
def ran(variations: dict[str, Variation], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Name → what a whole run came to: twins at once in one home, on all cores that there are, and variations.

    By default these are one run, with all of them.
    """
    folder, plain, everything = tmp_path_factory.mktemp("runs"), Variation({"PYTHONHASHSEED": "0"}), Variation()
    for variation in variations.values():
        everything |= variation
    together = {"one twin": plain, "other twin": plain} | ({} if FULL else {"everything": everything})
    processes = {
        name: begun(folder / ("twins" if name in TWINS else name), each, name=TWINS.get(name, "toy"))
        for name, each in together.items()
    }
    found = {"folder": {"": str(folder)}} | {name: ended(process) for name, process in processes.items()}
    if FULL:
        return found | {name: ended(begun(folder / name, variation)) for name, variation in variations.items()}
    return found | dict.fromkeys(variations, found["everything"])


@pytest.fixture(scope="module")
def first(ran: dict[str, dict[str, str]]) -> dict[str, str]:
    return ran["one twin"]


@pytest.fixture(scope="module")
def run(ran: dict[str, dict[str, str]]) -> Path:
    """The folder of the first of them."""
    [folder] = Path(ran["folder"][""], "twins").glob("*_one")
    return folder


@pytest.fixture(scope="module")
def data(variations: dict[str, Variation], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Variation → all that training would read."""
    folder = tmp_path_factory.mktemp("data")
    plain = {"plain": Variation({"PYTHONHASHSEED": "0"})}
    processes = {
        name: begun(folder / name, variation, data_alone=True) for name, variation in (plain | variations).items()
    }
    return {name: ended(process) for name, process in processes.items()}


def test_f32_f46_two_runs_at_once_in_one_home_come_to_the_same_bits(first, ran):
    assert ran["other twin"] == first
    assert {"weights_sha256", "losses", "eval_after", "pictures", "eval_after.jsonl", "delta_report.md"} <= first.keys()


def test_f47_one_core_comes_to_the_same_bits_as_all_of_them(first, ran, data):
    assert ran["one core"] == first and data["one core"] == data["plain"]


def test_f48_the_time_zone_moves_no_bit(first, ran, data):
    assert ran["time zone"] == first and data["time zone"] == data["plain"]


def test_f48_the_locale_moves_no_bit(first, ran, data):
    assert ran["locale"] == first and data["locale"] == data["plain"]


def test_f48_the_seed_of_hashes_moves_no_bit(first, ran, data):
    assert ran["hash seed"] == first and data["hash seed"] == data["plain"]


def test_f48_the_place_of_the_checkout_moves_no_bit(first, ran, data):
    assert ran["path"] == first and data["path"] == data["plain"]


def test_f48_the_order_of_files_and_traces_moves_no_bit(first, ran, data):
    assert ran["order"] == first and data["order"] == data["plain"]


# ---- the number of threads ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training of that run, come to its checkpoint, as `train` goes on with it."""
    folder = tmp_path_factory.mktemp("unfinished") / "out"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoint-final")
    (folder / "run_manifest.json").unlink()
    return folder


def trained(output: Path, run: Path, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "lib", *TRAIN, "--data", str(run / "train.tunix_sft.jsonl"), "--output", str(output)]
    return subprocess.run(
        words, cwd=repository_root(), env=os.environ | environment, capture_output=True, text=True
    )  # fmt: skip


def test_f47_a_training_does_not_go_on_with_another_number_of_threads(run, unfinished):
    before = {path: path.stat().st_mtime_ns for path in (unfinished / "checkpoints").rglob("*")}
    done = trained(unfinished, run, NPROC="1")
    assert done.returncode == 2 and one_line(done.stderr), done.stderr[-2_000:]
    assert re.search(r"training began with NPROC='2', and here it is '1': set it to the former", done.stderr)
    assert before == {path: path.stat().st_mtime_ns for path in (unfinished / "checkpoints").rglob("*")}
    done = trained(unfinished, run)
    assert done.returncode == 0, done.stderr[-2_000:]
    weights = read_about(unfinished / "checkpoint-final")["weights_sha256"]
    assert "resumed from step 2" in done.stdout and weights == read_about(run / "checkpoint-final")["weights_sha256"]


def test_f47_another_number_of_threads_is_another_fingerprint(run, tmp_path):
    """And so whatever it comes to, no equality was promised."""
    done = trained(tmp_path / "out", run, NPROC="1")
    assert done.returncode == 0, done.stderr[-2_000:]
    there, here = (read_about(folder / "checkpoint-final") for folder in (run, tmp_path / "out"))
    differs = [name for name in there["fingerprint"] if there["fingerprint"][name] != here["fingerprint"][name]]
    assert differs == ["nproc"] and (there["fingerprint"]["nproc"], here["fingerprint"]["nproc"]) == ("2", "1")
    assert there["inputs"] == here["inputs"]


# ---- neighbours --------------------------------------------------------------------------------------------


def test_f49_answers_are_the_same_text_one_at_a_time_and_many_at_once(run):
    """Of the base and of the tuned model. Their logits are not the same bits at another number of rows: float32 sums
    go in another order, which moves them by up to 4e-6, where the two likeliest tokens are 2e-4 apart at the least."""
    from lib.evaluation.evaluate import answer_eval_set
    from lib.experiments.stages import find_eval_set
    from lib.model.weights import base_model, load_model

    tuned = load_model(run / "checkpoint-final")
    eval_set = find_eval_set("high_card_duel_v1")
    for model in (tuned, base_model("tiny", 7, run / "checkpoint-final" / "tokenizer.json")):
        answers = [
            [record["completion"] for record in answer_eval_set(
                model, eval_set, EvaluationConfig(limit=20, batch_size=rows, max_new_tokens=32), "toy")]
            for rows in (1, 8, 64)
        ]  # fmt: skip
        assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 20 and any(answers[0])
