"""The configuration: strict YAML, every key and type checked, every refusal naming the key and what to do."""

import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from lib.config import MAX_BYTES, Config, DatasetConfig, build, load_config, parse_yaml, to_dict, to_yaml
from lib.errors import RequestError

TOY = "name: toy\ndataset: {dataset_name: toy, dataset_version: v1}\n"


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "toy.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def loaded(folder: Path, text: str = "", *overrides: str) -> Config:
    return load_config(written(folder, TOY + text), overrides)


def refusal(folder: Path, text: str = "", *overrides: str) -> str:
    """The one-line error of a configuration that begins with TOY."""
    with pytest.raises(RequestError) as caught:
        loaded(folder, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_given_has_its_default(tmp_path: Path):
    assert loaded(tmp_path) == Config("toy", DatasetConfig("toy", "v1"))


def test_overrides_are_read_as_yaml_and_win_in_their_order(tmp_path: Path):
    text = "training: {num_steps: 5}\n"
    config = loaded(tmp_path, text, "training.num_steps=7", "training.num_steps=50", "dataset.filters={g: [a, 2]}")
    assert (config.training.num_steps, config.dataset.filters) == (50, {"g": ["a", 2]})


def test_an_override_below_null_acts_as_where_nothing_is_given(tmp_path: Path):
    stored = to_yaml(loaded(tmp_path))
    assert "lora: null" in stored
    config = load_config(written(tmp_path, stored), ["training.lora.rank=2"])
    assert config == loaded(tmp_path, "", "training.lora.rank=2") and config.training.lora.rank == 2


def test_a_stored_configuration_reads_back_as_itself(tmp_path: Path):
    config = loaded(
        tmp_path, "training: {learning_rate: 1e-5}\nsystem_instruction: 'é: no'\n", "dataset.filters={a: no}"
    )
    assert load_config(written(tmp_path, to_yaml(config))) == config
    assert build(Config, to_dict(config), "stored") == config


def test_a_file_is_found_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path, TOY)
    monkeypatch.chdir(tmp_path)
    assert load_config("toy.yaml").name == "toy"


@pytest.mark.parametrize("path", ["none.yaml", "x" * 300, "a\0b", "."])
def test_a_file_that_is_not_there_is_named(path: str):
    with pytest.raises(RequestError, match="no such file"):
        load_config(path)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-5", 1e-5), ("1E5", 1e5), ("-.5", -0.5), ("1.", 1.0), ("12", 12), ("-3", -3), ("010", 10),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("y", "y"), ("true", True), ("False", False),
        ("", None), ("~", None), ("null", None), ("1_000", "1_000"), ("0x10", "0x10"), ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"), ("nan", "nan"), ("'1'", "1"), ("[1, no]", [1, "no"]),
    ],
)  # fmt: skip
def test_f14_scalars_are_what_people_expect(text: str, value: object):
    found = parse_yaml(f"a: {text}", "toy.yaml")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, fault",
    [
        ("a: 1\na: 2", "toy.yaml:2: the key 'a' stands twice"),
        ("b: {a: 1, 'a': 2}", "toy.yaml:1: the key 'a' stands twice"),
        ("a: !!python/object/apply:os.system ['touch x']", "toy.yaml:1: tags and anchors are not read"),
        ("a: !!str 1", "toy.yaml:1: tags and anchors are not read"),
        ("a: &x 1", "toy.yaml:1: tags and anchors are not read"),
        ("a: 1\nb: *x", "toy.yaml:2: aliases are not read"),
        ("[a, b]: 1", "toy.yaml:1: a key must be a plain text"),
        ("? {a: 1}\n: 2", "toy.yaml:1: a key must be a plain text"),
        ("a: b: c", "toy.yaml:1: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "toy.yaml:2: but found another document"),
        ("a: [1", "toy.yaml:1: expected ',' or ']'"),
        ("- a", "toy.yaml: expected a mapping of keys to values, got a list"),
        ("", "toy.yaml: expected a mapping of keys to values, got nothing"),
        ("a: \x00", "toy.yaml: not readable as YAML"),
        ("a: " + "9" * 5_000, "toy.yaml: not readable as YAML"),
    ],
)
def test_f14_what_yaml_should_not_hold_is_refused_with_its_line(text: str, fault: str):
    with pytest.raises(RequestError) as caught:
        parse_yaml(text, "toy.yaml")
    assert str(caught.value).startswith(fault) and "\n" not in str(caught.value)


LAUGHS = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: " + "[" * 30_000,
        "a: " + "{a: " * 5_000,
        "- " * 10_000,
        "\n".join(" " * depth + "a:" for depth in range(200)),
        TOY + "x: [" + "1," * (MAX_BYTES // 2),
    ],
    ids=["billion laughs", "flow lists", "flow mappings", "block lists", "block mappings", "long list"],
)
def test_f14_bombs_are_refused_within_a_second(text: str, tmp_path: Path):
    path, calls = written(tmp_path, text), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    started = time.process_time()
    sys.setprofile(count)  # which a slow machine does not change
    try:
        with pytest.raises(RequestError):
            load_config(path)
    finally:
        sys.setprofile(None)
    assert time.process_time() - started < 1
    assert calls < 30_000  # some milliseconds; a thousand brackets read in search of a key are 60,000


def test_f14_bytes_that_are_no_utf8_and_huge_files_are_refused(tmp_path: Path):
    for content, fault in ((b"name: \xff", "UTF-8"), (b"#" * (MAX_BYTES + 1), "larger than")):
        with pytest.raises(RequestError, match=fault):
            load_config(written(tmp_path, content))
    assert load_config(written(tmp_path, b"\xef\xbb\xbf" + TOY.replace("\n", "\r\n").encode())).name == "toy"


def test_what_is_accepted_can_be_read_again_once_it_is_stored(tmp_path: Path):
    short, long = (f"dataset.filters={{id: {list(range(1000, 1000 + count))}}}" for count in (2_000, 4_000))
    config = loaded(tmp_path, "", short)
    assert load_config(written(tmp_path, to_yaml(config))) == config
    assert len(long) < MAX_BYTES and "toy.yaml: written out, every item" in refusal(tmp_path, "", long)


@pytest.mark.parametrize(
    "text, hint",
    [
        ("trainig: {}", "trainig: no such key; did you mean training?"),
        ("training: {num_step: 5}", "training.num_step: no such key; did you mean training.num_steps?"),
        (
            "evaluation: {verdict: {alfa: 1}}",
            "evaluation.verdict.alfa: no such key; did you mean evaluation.verdict.alpha?",
        ),
        ("zzz: 1", "zzz: no such key; known: name, dataset, recipe"),
        ("1: 1", "1: no such key; known: "),
    ],
)
def test_f15_an_unknown_key_is_refused_with_what_was_meant(text: str, hint: str, tmp_path: Path):
    assert refusal(tmp_path, text).startswith(f"{tmp_path}/toy.yaml: {hint}")


def test_f15_an_unknown_override_is_refused_with_what_was_meant(tmp_path: Path):
    assert "did you mean training.num_steps?" in refusal(tmp_path, "", "training.num_stpes=5")
    assert "did you mean dataset?" in refusal(tmp_path, "", "datset.limit=5")
    assert "expected KEY=VALUE, such as" in refusal(tmp_path, "", "training.num_steps")
    assert "name holds a value, not a mapping" in refusal(tmp_path, "", "name.x=1")


@pytest.mark.parametrize(
    "override, fault",
    [
        ("training.num_steps=hello", "training.num_steps: expected a whole number, got 'hello'"),
        ("training.num_steps=1.5", "training.num_steps: expected a whole number, got 1.5"),
        ("training.num_steps=true", "training.num_steps: expected a whole number, got True"),
        ("training.num_steps='5'", "training.num_steps: expected a whole number, got '5'"),
        ("training.num_steps=0", "training.num_steps: expected at least 1, got 0"),
        ("training.learning_rate=nan", "training.learning_rate: expected a number, got 'nan'"),
        ("training.learning_rate=.nan", "training.learning_rate: expected a finite number, got nan"),
        ("training.learning_rate=.inf", "training.learning_rate: expected a finite number, got inf"),
        ("training.learning_rate=1e999", "training.learning_rate: expected a finite number, got inf"),
        ("training.learning_rate=", "training.learning_rate: expected a number, got None"),
        ("training.seed=9223372036854775808", "training.seed: expected 0 to 9.22337e+18, got 9223372036854775808"),
        ("evaluation.verdict.min_effect=2", "evaluation.verdict.min_effect: expected 0 to 1, got 2.0"),
        ("evaluation.verdict.power=0.4", "evaluation.verdict.power: expected 0.5 to 0.999, got 0.4"),
        (
            "evaluation.verdict.detectable_effect=0",
            "evaluation.verdict.detectable_effect: expected 0.001 to 1, got 0.0",
        ),
        ("dataset.limit=many", "dataset.limit: expected a whole number or null, got 'many'"),
        ("dataset.filters=5", "dataset.filters: expected a mapping, got 5"),
        ("dataset.filters={a: {b: 1}}", "dataset.filters.a: expected a text, a number or a list of these"),
        ("dataset.filters={a: [1, .nan]}", "dataset.filters.a: expected a text, a number or a list of these, got nan"),
        ("dataset.filters={1: a}", "dataset.filters.1: expected a text"),
        ("dataset.curation.scripts=[Latin, 1]", "dataset.curation.scripts[1]: expected a text, got 1"),
        ("dataset.curation.scripts=[[Latin]]", "dataset.curation.scripts[0]: expected a text, got ['Latin']"),
        ("recipe=sft", "recipe: expected one of 'trace_sft_v1', 'answer_sft_v1', 'shuffled_answers', got 'sft'"),
        ("system_instruction=5", "system_instruction: expected a text, got 5"),
        ("training=5", "training: expected a mapping, got a whole number"),
    ],
)
def test_f16_a_wrong_type_or_bound_is_refused_without_coercion(override: str, fault: str, tmp_path: Path):
    assert refusal(tmp_path, "", override).startswith(f"{tmp_path}/toy.yaml: {fault}")


def test_f16_a_word_stays_a_word_and_a_whole_number_serves_as_a_number(tmp_path: Path):
    assert loaded(tmp_path, "", "system_instruction=no").system_instruction == "no"
    rate = loaded(tmp_path, "", "training.learning_rate=1").training.learning_rate
    assert rate == 1.0 and type(rate) is float


def test_f16_a_required_key_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(RequestError, match="dataset.dataset_version: is required"):
        load_config(written(tmp_path, "name: x\ndataset: {dataset_name: y}"))


@pytest.mark.parametrize(
    "overrides, fault",
    [
        (["dataset.selection_strategy=random"], "dataset.seed: is required by selection_strategy random"),
        (["traces.game=high_card_duel"], "traces: game and count go together"),
        (["traces.count=5"], "traces: game and count go together"),
        (["training.num_steps=5", "training.warmup_steps=5"], "training.warmup_steps: expected less than num_steps"),
        (
            ["training.per_device_batch_size=4", "training.grad_accum_steps=2", "parallelism.data=3"],
            r"parallelism: data × fsdp, 3, does not divide the 8 rows of an update",
        ),
        (["parallelism.tensor=0"], "parallelism.tensor: expected at least 1"),
        (
            ["training.trainer=tunix", "parallelism.fsdp=2"],
            "training.trainer: tunix trains on one device here; leave out parallelism",
        ),
        (["name=../x"], "name: expected letters, digits"),
        (["dataset.dataset_version=a/b"], "dataset.dataset_version: expected letters, digits"),
    ],
)
def test_f16_values_that_do_not_go_together_are_refused(overrides: list[str], fault: str, tmp_path: Path):
    assert f"toy.yaml: {fault}" in refusal(tmp_path, "", *overrides)


@pytest.mark.parametrize("text", ["1e5", "09", "1.5e3", "+.5", "true", "null", "~", "no", "2026-11-22", "a: b", ""])
def test_a_text_that_looks_like_something_else_survives_being_stored(text: str, tmp_path: Path):
    config = Config("toy", DatasetConfig("toy", "v1", filters={"mark": text}), system_instruction=text)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
