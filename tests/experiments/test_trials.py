"""What a sweep asks for: every combination, or seeded draws; each a whole configuration, all of them checked first."""

import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from lib.__main__ import main
from lib.config import load_config, to_yaml
from lib.data.dataset import dataset_key
from lib.errors import RequestError
from lib.experiments import sweep
from lib.experiments.manifest import write_manifest
from lib.experiments.run import create_run
from lib.experiments.stages import command
from lib.experiments.sweep import read_sweep
from lib.experiments.sweep_report import make_report
from lib.experiments.trials import Trial, find_sweep, load_sweep, make_trials, overrides, run_of

HEAD = "name: toy\nbase: configs/smoke.yaml\n"


@pytest.fixture
def trials_of(tmp_path: Path):
    def make(text: str) -> list[Trial]:
        (tmp_path / "toy.yaml").write_text(HEAD + text)
        asked = load_sweep(tmp_path / "toy.yaml")
        return make_trials(asked, asked.base)

    return make


def test_a_grid_is_every_combination_the_last_field_changing_first(trials_of):
    trials = trials_of("vary: {training.learning_rate: [1e-3, 2e-3], training.seed: [7, 8], model.dtype: [bfloat16]}")
    found = [(trial.config.training.learning_rate, trial.config.training.seed) for trial in trials]
    assert found == [(0.001, 7), (0.001, 8), (0.002, 7), (0.002, 8)]
    assert [trial.number for trial in trials] == [1, 2, 3, 4]
    assert {trial.config.model.dtype for trial in trials} == {"bfloat16"}


def test_a_trial_is_the_base_with_its_changes_and_nothing_else(trials_of):
    for trial in trials_of("vary: {training.lora: [null, {rank: 2}], system_instruction: ['say \"a: b\"', é]}"):
        assert trial.config == load_config("configs/smoke.yaml", overrides(trial.changes))
    assert trial.config.training.lora.rank == 2 and trial.config.system_instruction == "é"


def test_a_trial_is_named_after_what_all_of_them_are(trials_of):
    names = [trial.name for trial in trials_of("vary: {training.seed: [7, 8]}")]
    assert names[0].startswith("toy-") and [name[-2:] for name in names] == ["-1", "-2"]
    assert names == [trial.name for trial in trials_of("vary: {training.seed: [7, 8]}\nexecution: {at_once: 2}")]
    assert not set(names) & {trial.name for trial in trials_of("vary: {training.seed: [7, 9]}")}
    assert [trial.name[-3:] for trial in trials_of(f"vary: {{training.seed: {list(range(10))}}}")][0] == "-01"


RANDOM = """
vary:
  training.learning_rate: {low: 1e-4, high: 1e-2, log: true}
  training.num_steps: {low: 10, high: 12}
  training.weight_decay: {low: 0, high: 0.5}
  training.seed: [7, 8]
"""


def drawn(trials: list[Trial], key: str = "learning_rate") -> list[float]:
    return [getattr(trial.config.training, key) for trial in trials]


def test_a_random_search_draws_the_same_again_from_all_of_each_range(trials_of):
    trials = trials_of(f"random: {{trials: 60, seed: 1}}{RANDOM}")
    assert [trial.changes for trial in trials] == [
        trial.changes for trial in trials_of(f"random: {{trials: 60, seed: 1}}{RANDOM}")
    ]
    rates = drawn(trials)
    assert min(rates) < 2e-4 and max(rates) > 5e-3 and all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 20 < sum(rate < 1e-3 for rate in rates) < 40  # the middle of the logarithms
    assert all(float(f"{rate:.3g}") == rate for rate in rates)
    assert set(drawn(trials, "num_steps")) == {10, 11, 12} and set(drawn(trials, "seed")) == {7, 8}
    assert 0.2 < sum(drawn(trials, "weight_decay")) / 60 < 0.3


def test_another_seed_draws_others_and_more_trials_or_fields_leave_them(trials_of):
    few = drawn(trials_of(f"random: {{trials: 5, seed: 1}}{RANDOM}"))
    assert drawn(trials_of(f"random: {{trials: 9, seed: 1}}{RANDOM}"))[:5] == few
    assert drawn(trials_of(f"random: {{trials: 5, seed: 1}}{RANDOM}  model.max_length: [100, 128]\n")) == few
    assert not set(drawn(trials_of(f"random: {{trials: 5, seed: 2}}{RANDOM}"))) & set(few)


def test_no_two_draws_are_the_same(trials_of):
    found = trials_of(
        "random: {trials: 4, seed: 0}\nvary: {training.seed: [1, 2], recipe: [trace_sft_v1, answer_sft_v1]}"
    )
    assert len({(trial.config.training.seed, trial.config.recipe) for trial in found}) == 4
    with pytest.raises(RequestError, match="only 2 different combinations"):
        trials_of("random: {trials: 3, seed: 0}\nvary: {training.seed: [1, 2]}")


def test_other_data_under_the_same_version_gets_a_version_of_its_own(trials_of):
    plain, less, elsewhere = trials_of("vary: {dataset.limit: [null, 50, 60]}")
    assert plain.config.dataset.dataset_version == "v1"
    versions = {trial.config.dataset.dataset_version for trial in (plain, less, elsewhere)}
    assert len(versions) == 3 and less.config.dataset.dataset_version.startswith("v1-")
    same = trials_of("vary: {training.seed: [7, 8], dataset.dataset_version: [v1]}")
    assert {trial.config.dataset.dataset_version for trial in same} == {"v1"}
    own = trials_of("vary: {dataset.dataset_version: [v2], dataset.limit: [50]}")
    assert own[0].config.dataset.dataset_version == "v2"


@pytest.mark.parametrize(
    "vary",
    [
        "{dataset.dataset_name: [smoke, other], traces.count: [100, 200]}",
        "{dataset.dataset_version: [v2], dataset.limit: [50, 60]}",
        "{dataset.dataset_name: [a, a-b], dataset.dataset_version: [c, b-c], dataset.limit: [50]}",
    ],
)
def test_no_two_trials_have_other_data_under_one_key(vary, trials_of):
    owners: dict[str, set[str]] = {}
    for trial in trials_of(f"vary: {vary}"):
        made_from = to_yaml(trial.config.traces) + str(trial.config.dataset.limit) + trial.config.dataset.dataset_name
        owners.setdefault(dataset_key(trial.config.dataset), set()).add(made_from)
    assert len(owners) > 1 and all(len(data) == 1 for data in owners.values())


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "vary: is required"),
        ("vary: {}", "vary: expected at least one field"),
        ("vary: [training.seed]", "vary: expected a mapping, got ['training.seed']"),
        ("vary: {training.seed: 7}", "vary.training.seed: expected a list of values, got 7"),
        ("vary: {training.seed: []}", "vary.training.seed: expected a list of values"),
        ("vary: {training.seed: {low: 1, high: 2}}", "a range is drawn from; give random:"),
        ("random: {trials: 2, seed: 0}\nvary: {training.seed: {low: 2, high: 2}}", "expected low below high"),
        ("random: {trials: 2, seed: 0}\nvary: {training.seed: {low: 1, hihg: 2}}", "did you mean high?"),
        ("random: {trials: 2, seed: 0}\nvary: {training.weight_decay: {low: 0, high: 1, log: true}}", "more than 0"),
        ("random: {trials: 2}\nvary: {training.seed: [1]}", "random.seed: is required"),
        ("random: {trials: 0, seed: 0}\nvary: {training.seed: [1]}", "random.trials: expected 1 to 1000"),
        ("vary: {training.seed: [7, 8, 7]}", "trial 3 is the same as trial 1"),
        (f"vary: {{training.seed: {list(range(1001))}}}", "1,001 combinations"),
        (f"random: {{trials: 2, seed: 0}}\nvary: {{training.seed: {list(range(1000, 6000))}}}", "written out, every"),
        ("vary: {training.seed: [7, x]}", "trial 2 of 2 (training.seed=\"x\"): configs/smoke.yaml: training.seed"),
        ("vary: {training.learning_rat: [1]}", "did you mean training.learning_rate?"),
        ("vary: {training.num_steps: [20, 2]}", "trial 2 of 2 (training.num_steps=2): configs/smoke.yaml: training"),
        ("vary: {training.seed: [7]}\nexecution: {executer: slurm}", "did you mean execution.executor?"),
        ("vary: {training.seed: [7]}\nexecution: {executor: k8s}", "expected one of 'processes', 'slurm'"),
        ("vary: {training.seed: [7]}\nexecution: {at_once: 0}", "execution.at_once: expected"),
        ("vary: {evaluation.eval_set: [high_card_duel_v1, absent_v1]}", "trial 2 of 2 (evaluation.eval_set=\"absent"),
        ("vary: {model.name: [tiny, someone/absent]}", "model someone/absent: not on this machine"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line_before_anything_is_written(text, said, tmp_path, home, capsys):
    (tmp_path / "toy.yaml").write_text(HEAD + text)
    assert main(["sweep", str(tmp_path / "toy.yaml")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "toy.yaml" in error
    assert not home.exists()


@pytest.mark.parametrize("name", ["../x", "a b", "x" * 61])
def test_a_hostile_name_is_refused(name, tmp_path, home, capsys):
    (tmp_path / "toy.yaml").write_text(f"name: {name!r}\nbase: configs/smoke.yaml\nvary: {{training.seed: [7]}}")
    assert main(["sweep", str(tmp_path / "toy.yaml")]) == 2
    assert "name: expected at most 60 letters" in capsys.readouterr().err and not home.exists()


def test_the_sample_is_complete_and_lists_its_trials(home, capsys):
    assert main(["sweep", "configs/sweeps/lr.yaml", "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 6 and listed[0].endswith("-1  training.learning_rate=0.001 training.seed=7")
    assert not home.exists()


def test_slurm_without_submitit_says_how_to_install_it(tmp_path, home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)  # as where it is not installed
    (tmp_path / "toy.yaml").write_text(HEAD + "vary: {training.seed: [7]}\nexecution: {executor: slurm}")
    assert main(["sweep", str(tmp_path / "toy.yaml")]) == 2
    assert capsys.readouterr().err == (
        "error: execution.executor: slurm needs submitit; install it: python -m pip install -r requirements-slurm.txt\n"
    )
    assert not home.exists()


@pytest.fixture
def begun(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a sweep that was stopped before its trials."""
    monkeypatch.setattr(sweep, "_executed", lambda folder, trials, executor: iter(()))
    (tmp_path / "toy.yaml").write_text(HEAD + "vary: {training.seed: [7, 8]}")
    assert main(["sweep", str(tmp_path / "toy.yaml")]) == 1
    [folder] = (home / "sweeps").iterdir()
    return folder


@pytest.mark.parametrize("words", [["resume"], ["sweep"], ["sweep", "--trial", "1"]])
def test_a_sweep_goes_on_in_its_own_home_alone(words, begun, home, tmp_path, monkeypatch, capsys):
    page = (begun / "sweep.html").read_bytes()
    monkeypatch.setenv("RETRACE_HOME", str(tmp_path / "other"))
    assert main([*words, str(begun)]) == 2
    assert f"give --home {home}\n" in capsys.readouterr().err
    assert (begun / "sweep.html").read_bytes() == page and not (tmp_path / "other").exists()


def test_the_trials_of_a_sweep_that_was_begun_are_listed_by_its_folder_as_by_its_file(begun, tmp_path, capsys):
    capsys.readouterr()
    listed = []
    for given in (begun.name, str(begun), str(tmp_path / "toy.yaml")):
        assert main(["sweep", given, "--dry-run"]) == 0
        listed.append(capsys.readouterr().out)
    assert listed[0] == listed[1] == listed[2] and len(listed[0].splitlines()) == 2


@pytest.mark.parametrize("flag, told", [("--json", "trial at work\n"), ("-q", "")])
def test_one_trial_keeps_its_remarks_off_standard_output(flag, told, begun, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_pipeline", lambda config, name, say: say("trial at work"))
    capsys.readouterr()
    assert main(["sweep", begun.name, "--trial", "1", flag]) == 0
    assert capsys.readouterr() == ("", told)


def test_what_a_trial_says_is_kept_without_colours(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    job, log = Future(), tmp_path / "trial.log"
    job.set_result(sweep.call([sys.executable, "-m", "lib", "runs", "show", "absent"], log, own_session=True))
    assert sweep._error(job, log).startswith("run absent: no such run in ")


def ended(trial: Trial, status: str, **given: Any) -> Path:
    """A run of the trial that came to this end."""
    folder = create_run(trial.config, trial.name).folder
    write_manifest(
        folder, trial.config, status, identity={"run_id": "0b1e", "created_at": "2025-01-01T00:00:00Z"}, attempts=[{}],
        inputs={"dataset": {"content_sha256": None}}, metrics={}, wall_s={}, fingerprint={},
        **{"artifacts": {}} | given,
    )  # fmt: skip
    return folder


def test_a_trial_whose_answers_are_damaged_is_verified_and_not_gone_on_with(begun, capsys):
    first, second = read_sweep(begun).trials
    runs = [ended(trial, "done", artifacts={"eval_after.jsonl": {"sha256": "0"}}) for trial in (first, second)]
    capsys.readouterr()
    assert main(["resume", begun.name]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {begun.name}: 2 of 2 trials damaged: {first.name} (eval_after.jsonl: not as ")
    assert all(f"{command('runs', 'verify', run.name)})" in error for run in runs) and "to go on" not in error
    (runs[1] / "run_manifest.json").unlink()
    assert main(["resume", begun.name]) == 1
    error = capsys.readouterr().err
    assert "1 of 2 trials damaged" in error and error.count("\n") == 1
    assert error.endswith(f"1 of 2 trials not done: {second.name} (stale); to go on: {command('resume', begun.name)}\n")


def test_what_a_trial_failed_of_this_time_is_told_and_not_what_of_the_last_time(begun):
    planned = read_sweep(begun)
    for trial in planned.trials:
        ended(trial, "failed", error="03_train: it broke")
    report = make_report(begun, *planned, settings={}, errors={1: "eval set x: no such file"})
    assert [one.error for one in report.outcomes] == ["eval set x: no such file", "03_train: it broke"]


def test_what_was_not_begun_has_no_folder_and_no_run(trials_of, home):
    [trial] = trials_of("vary: {training.seed: [7]}")
    assert run_of(trial) is None and find_sweep("toy-00000000") is None and find_sweep("x\0") is None


@pytest.mark.parametrize("words", [["sweep", "absent.yaml"], ["sweep", "absent", "--trial", "1"], ["resume", "absent"]])
def test_what_is_not_there_is_told_in_one_line(words, home, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not home.exists()
