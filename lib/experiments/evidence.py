"""What a run promises: everything in it that the same code, configuration, data and seed give again, bit for bit.

    record = make_record(run, …)         # what it was made from, and under "results" what it came to
    rows = compare_results(record["results"], again["results"])
    rows[5]      # Row("losses, every logged step", "0f3a…", "77b1…", False, "first differs at step 20: loss 0.7651…")

Times, paths and process ids are no part of it. Losses are compared as the exact numbers that were logged, weights
and optimizer state by their digests at every checkpoint, completions as text, the report by its figures and words.
`evidence.json` of a run holds the record, and the report page carries it, so that whoever has either can check it.
"""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from lib.config import Config
from lib.errors import RequestError, RetraceError
from lib.files import sha256_bytes, sha256_file
from lib.model.released import is_from_scratch

EVIDENCE = "evidence.json"
VERSION = "1.0"
LOGGED = ("step", "loss", "grad_norm", "learning_rate", "held_out_loss")
ANSWERS = {
    "eval_before": "the base model's answers",
    "eval_after": "the tuned model's answers",
    "control_before": "the base model's control",
    "control_after": "the tuned model's control",
}
RECORD_KEYS = {
    "evidence_version", "run", "run_id", "config", "code", "fingerprint", "fingerprint_changed", "environment",
    "dataset", "results",
}  # fmt: skip
RESULT_KEYS = {
    "dataset_sha256", "inputs", "losses", "checkpoints", "weights_sha256", *ANSWERS,
    "summary_sha256", "delta_report_sha256", "pictures",
}  # fmt: skip


class Row(NamedTuple):
    """One thing that was promised: as recorded, as found, and, where they differ, where first."""

    what: str
    recorded: str
    found: str
    equal: bool
    note: str = ""


class Provenance(NamedTuple):
    """Where a page comes from, in words: what stands at its foot."""

    run: str
    run_id: str
    commit: str
    dataset: str
    fingerprint: str
    command: str


def provenance(record: dict[str, Any], command: str) -> Provenance:
    """That of a page about the run of this record; `command` does it again."""
    dataset = f"{record['dataset']['dataset_key']} {record['results']['dataset_sha256']}"
    fingerprint = fingerprint_in_words(record["fingerprint"])
    return Provenance(record["run"], record["run_id"], commit(record["code"]), dataset, fingerprint, command)


def commit(code: dict[str, Any]) -> str:
    """`commit 62009c5… with local changes`."""
    if not code.get("git_sha"):
        return "outside a git checkout"
    return f"commit {code['git_sha']}{' with local changes' if code.get('git_dirty') else ''}"


def fingerprint_in_words(fingerprint: dict[str, Any]) -> str:
    """`python 3.11.9, jax 0.10.2, …`."""
    return ", ".join(f"{name} {value}" for name, value in fingerprint.items() if value != "")


def needed(record: dict[str, Any], config: Config) -> list[str]:
    """What doing a run again needs and its page does not hold, in words; nothing where the page is enough."""
    played = config.traces.game and record["dataset"]["provenance"]["sources"].keys() == {"builtin"}
    eval_set = Path(config.evaluation.eval_set)
    apart = {
        "its code, of which no commit was recorded": not record["code"].get("git_sha"),
        "its changes that were not committed (in the folder of the run)": record["code"].get("git_dirty"),
        "its traces, which our own engines did not play": not played,
        f"the weights of {config.model.name}": not is_from_scratch(config.model.name),
        f"the eval set {eval_set}": eval_set.suffix and eval_set.parent != Path("evalsets"),
    }
    return [what for what, is_apart in apart.items() if is_apart]


def is_promised(record: dict[str, Any]) -> bool:
    """Whether the same bits may be expected of the run done again, within its fingerprint."""
    return not record["fingerprint_changed"] and record["fingerprint"].get("device_kind", "cpu") == "cpu"


def promised(record: dict[str, Any]) -> str:
    """The same in a sentence."""
    if changed := record["fingerprint_changed"]:
        return f"When the run was resumed, {', '.join(changed)} had changed: equality is not promised."
    if not is_promised(record):
        return f"Equal bits are promised on a CPU alone, and this was {record['fingerprint']['device_kind']}."
    return "With an equal fingerprint every result comes out equal, bit for bit."


def results(folder: Path, dataset_sha256: str, drawings: list[str]) -> dict[str, Any]:
    """What this run came to. Raises RetraceError where it has not come to its comparison."""
    try:
        model = json.loads((folder / "checkpoint-final" / "model.json").read_bytes())
        return {
            "dataset_sha256": dataset_sha256,
            "inputs": model["inputs"],
            "losses": [[line.get(name) for name in LOGGED] for line in _lines(folder / "metrics.jsonl")],
            "checkpoints": [[line["step"], line["sha256"]] for line in _lines(folder / "checkpoints.jsonl")],
            "weights_sha256": model["weights_sha256"],
            **{name: _completions(folder / f"{name}.jsonl") for name in ANSWERS},
            "summary_sha256": sha256_file(folder / "eval_summary.json"),
            "delta_report_sha256": sha256_file(folder / "delta_report.md"),
            "pictures": [sha256_bytes(drawing.encode()) for drawing in drawings],
        }
    except (OSError, ValueError, KeyError) as error:
        raise RetraceError(f"{folder}: has not come to its comparison ({error})") from None


def read_record(file: Path) -> dict[str, Any]:
    """The record in `evidence.json`, or in a report page. Raises RequestError where there is none."""
    try:
        text = file.read_text("utf-8")
        record = json.loads(_carried(text) if file.suffix == ".html" else text)
        if (version := record.get("evidence_version", VERSION)) != VERSION:
            raise ValueError(f"evidence_version {version!r} is not known, only {VERSION!r}")
        if missing := RECORD_KEYS - record.keys() or RESULT_KEYS - record["results"].keys():
            raise ValueError(f"no {min(missing)}")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise RequestError(f"{file}: holds no record of a run ({error})") from None
    return record


def compare_results(recorded: dict[str, Any], found: dict[str, Any]) -> list[Row]:
    """Every result of `recorded`, held against what was found; all rows, equal or not."""
    there, here = recorded["inputs"], found["inputs"]
    settings = [
        f"training.{name}: {there['training'].get(name)} recorded, {here['training'].get(name)} found"
        for name in sorted(there["training"].keys() | here["training"].keys())
        if there["training"].get(name) != here["training"].get(name)
    ]
    return [
        _row("dataset content", recorded["dataset_sha256"], found["dataset_sha256"]),
        _row("training examples", there["examples_sha256"], here["examples_sha256"]),
        _row("training settings, seed among them", there["training"], here["training"], "; ".join(settings)),
        _row("tokenizer", there["tokenizer_sha256"], here["tokenizer_sha256"]),
        _row("base weights", there["base_weights_sha256"], here["base_weights_sha256"]),
        _row("losses, every logged step", recorded["losses"], found["losses"], _first_loss(recorded, found)),
        *_checkpoints(recorded["checkpoints"], found["checkpoints"]),
        _row("tuned weights", recorded["weights_sha256"], found["weights_sha256"]),
        *(
            _row(f"text of {whose}", recorded[name], found[name], _first_item(recorded, found, name))
            for name, whose in ANSWERS.items()
        ),
        _row("figures of the comparison", recorded["summary_sha256"], found["summary_sha256"]),
        _row("delta_report.md", recorded["delta_report_sha256"], found["delta_report_sha256"]),
        _row("pictures of the report", recorded["pictures"], found["pictures"]),
    ]


def first_step_apart(recorded: dict[str, Any], found: dict[str, Any]) -> int | None:
    """The first step at which a logged number or a checkpoint differs; None where all are equal."""
    steps = [
        (there or here)[0]
        for name in ("losses", "checkpoints")
        for there, here in _paired(recorded[name], found[name])
        if there != here
    ]
    return min(steps, default=None)


def _row(what: str, recorded: Any, found: Any, note: str = "") -> Row:
    equal = _exact(recorded) == _exact(found)
    return Row(what, _digest(recorded), _digest(found), equal, "" if equal else note)


def _checkpoints(recorded: list, found: list) -> list[Row]:
    return [
        _row(
            f"weights and optimizer state, step {(there or here)[0]}",
            there[1] if there else "no such checkpoint",
            here[1] if here else "no such checkpoint",
        )
        for there, here in _paired(recorded, found)
    ]


def _first_loss(recorded: dict[str, Any], found: dict[str, Any]) -> str:
    for there, here in _paired(recorded["losses"], found["losses"]):
        if there is None or here is None:
            return f"step {(there or here)[0]} is logged on one side alone"
        for name, old, new in zip(LOGGED, there, here, strict=True):
            if _exact(old) != _exact(new):
                return f"first differs at step {there[0]}: {name} {old} recorded, {new} found"
    return ""


def _first_item(recorded: dict[str, Any], found: dict[str, Any], side: str) -> str:
    for there, here in _paired(recorded[side], found[side]):
        if there != here:
            return f"first differs at item {(there or here)[0]}"
    return ""


def _paired(recorded: list, found: list) -> list[tuple[list | None, list | None]]:
    """Entries of the same step or item; None where one side has it not. In order."""
    there, here = ({entry[0]: entry for entry in entries} for entries in (recorded, found))
    return [(there.get(key), here.get(key)) for key in dict.fromkeys([*there, *here])]


def _exact(value: Any) -> str:
    """JSON writes a float as the shortest text that reads back as the same bits."""
    return json.dumps(value, sort_keys=True)


def _digest(value: Any) -> str:
    return value if isinstance(value, str) else sha256_bytes(_exact(value).encode())


def _completions(file: Path) -> list[list[str]]:
    """Item, its sample behind it where there are several, and digest of the completion, in the order of the file."""

    def name(meta: dict[str, Any]) -> str:
        return f"{meta['eval_id']} sample {meta['sample']}" if meta["sample"] else meta["eval_id"]

    return [[name(line["meta"]), sha256_bytes(line["completion"].encode())[:16]] for line in _lines(file)]


class _Carried(HTMLParser):
    """The text of the element with the id `evidence`."""

    inside, text = "", ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if ("id", "evidence") in attributes:
            self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.text += data


def _carried(page: str) -> str:
    parser = _Carried()
    parser.feed(page)
    return parser.text


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
