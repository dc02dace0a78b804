"""A sweep, and a training by several tasks, on a real Slurm of this machine: the same results as by processes.

In a plain `make test` all of this is left out; `make test-slurm`, as root, installs Slurm and submitit and runs it.
Everything of the cluster, its keys among it, lies in a temporary folder.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from small import CONFIG, SMALL, as_words

from lib.__main__ import main
from lib.config import load_config, to_yaml
from lib.data.dataset import Dataset
from lib.data.export import export_lines
from lib.experiments.evidence import EVIDENCE
from lib.experiments.run import status_of
from lib.files import repository_root

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("processes_compile_once")]

VARY = "vary: {training.learning_rate: [1e-3, 3e-3, 1e-2], training.seed: [7, 8]}"
PATIENCE = 900

CONF = """
ClusterName=one
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
PlugStackConfig=/dev/null
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName={name} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster of this machine alone, which takes two jobs of one CPU each."""
    folder, name = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, name=name, ports=free_ports(2)))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    for made in ("state", "spool"):
        (folder / made).mkdir()
    munge = [
        f"--{what}={folder}/munge.{end}"
        for what, end in [
            ("key-file", "key"),
            ("socket", "socket"),
            ("pid-file", "pid"),
            ("log-file", "log"),
            ("seed-file", "seed"),
        ]
    ]
    daemons = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            for words in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
                with open(folder / f"{words[0]}.out", "w") as out:
                    daemons.append(subprocess.Popen([shutil.which(words[0]) or words[0], *words[1:]],
                                                    stdout=out, stderr=subprocess.STDOUT))  # fmt: skip
                time.sleep(1)
            until_idle(folder)
            yield folder
        finally:
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


def until_idle(folder: Path) -> None:
    for _ in range(60):
        if "idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
            return
        time.sleep(1)
    logs = "\n".join(path.read_text()[-2_000:] for path in (*folder.glob("*.out"), *folder.glob("*.log")))
    raise AssertionError(f"no node of the cluster is idle\n{logs}")


def start(folder: Path, home: str, execution: str, vary: str = VARY) -> subprocess.Popen:
    (folder / "base.yaml").write_text(to_yaml(load_config(CONFIG, SMALL)))
    file = folder / f"{home}.yaml"
    file.write_text(f"name: toy\nbase: {folder}/base.yaml\n{vary}\nexecution: {execution}\n")
    return subprocess.Popen(
        [sys.executable, "-m", "lib", "--home", str(folder / home), "sweep", str(file)], cwd=repository_root(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"RETRACE_PROGRESS": ""},
    )  # fmt: skip


def results(home: Path) -> list[dict]:
    """Of each trial, in order."""
    runs = sorted(home.glob("*_toy-*"), key=lambda folder: folder.name.rpartition("-")[2])
    return [json.loads((run / EVIDENCE).read_bytes())["results"] for run in runs]


ON_SLURM = "{executor: slurm, at_once: 2, slurm: {cpus: 1, minutes: 30}}"


def test_six_trials_on_slurm_and_by_processes_come_to_the_same_results(slurm, tmp_path):
    for home, execution in [("slurm", ON_SLURM), ("here", "{at_once: 2}")]:
        done = start(tmp_path, home, execution)
        said, error = done.communicate(timeout=PATIENCE)
        assert done.returncode == 0, error
        print(said)
    there, here = results(tmp_path / "slurm"), results(tmp_path / "here")
    assert there == here and len({found["weights_sha256"] for found in here}) == 6
    [logs] = (tmp_path / "slurm" / "sweeps").glob("*/slurm")
    assert len(list(logs.glob("*_result.pkl"))) == 6  # so it was Slurm that ran them
    for one in there:
        print(one["weights_sha256"])


def test_two_tasks_of_srun_train_as_one_device_does(slurm: Path, dataset: Dataset, tmp_path: Path):
    (tmp_path / "data.jsonl").write_bytes(b"".join(export_lines(dataset.traces, "tunix_sft", "answer_sft_v1", "")))
    train = ["train", "--config", "configs/smoke.yaml", "--data", str(tmp_path / "data.jsonl")]
    train += as_words([*SMALL, "recipe=answer_sft_v1"])
    apart = ["--set", "parallelism.data=2", "--output", str(tmp_path / "two")]
    job = subprocess.run(
        ["srun", "--ntasks", "2", "--kill-on-bad-exit=1", sys.executable, "-m", "lib", "launch", *train, *apart],
        cwd=repository_root(), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    assert main([*train, "--output", str(tmp_path / "one")]) == 0
    two, one = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("two", "one")
    )
    assert len(one) == 3 and two == pytest.approx(one, abs=1e-5)
    assert json.loads((tmp_path / "two" / "run_manifest.json").read_bytes())["fingerprint"]["processes"] == 2


def test_asked_to_end_a_sweep_cancels_its_jobs_and_is_gone_on_with(slurm, tmp_path):
    vary = "vary: {training.seed: [7, 8, 9]}"
    stopped = start(tmp_path, "slurm", ON_SLURM, vary)
    for _ in range(PATIENCE):
        if len(list(tmp_path.glob("slurm/*_toy-*/stages/01_traces.json"))) == 2:
            break
        time.sleep(1)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(PATIENCE) == 143
    for _ in range(60):
        if not subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout:
            break
        time.sleep(1)
    else:
        raise AssertionError("jobs stay in the queue")
    runs = list(tmp_path.glob("slurm/*_toy-*"))
    assert len(runs) == 2 and not {status_of(run) for run in runs} & {"running", "done"}
    again = start(tmp_path, "slurm", ON_SLURM, vary)
    _, error = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, error
    runs = list(tmp_path.glob("slurm/*_toy-*"))
    assert len(runs) == 3 and {status_of(run) for run in runs} == {"done"}
