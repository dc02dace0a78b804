"""Two runs side by side: what they were made from, what each came to, and which results are the same bits.

The tuned models of two runs that were evaluated alike are compared item by item, as before and after are in one run:
that is how an ablation is read, such as training on answers alone against training on reasoning.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.config import load_config
from lib.evaluation.compare import Comparison, compare
from lib.evaluation.results import read_results
from lib.experiments.evidence import EVIDENCE, commit, compare_results, provenance, read_record
from lib.experiments.report import write_comparison
from lib.experiments.run import CONFIG, find_run, read_manifest
from lib.experiments.stages import OUTPUTS, command


def compare_runs(one: str, other: str) -> Iterator[str]:
    """Lines to print: configuration differences first, then figures, then the results that differ.

    Raises RequestError where one of them has not come to its report.
    """
    folders = [find_run(name) for name in (one, other)]
    records = [read_record(folder / EVIDENCE) for folder in folders]
    manifests = [read_manifest(folder) for folder in folders]
    yield f"{'':<40} {folders[0].name:<32} {folders[1].name}"
    for key, there, here in differences(one, other):
        yield _line(key, there, here)
    for name in ("before", "after"):
        yield _line(f"accuracy {name}", *(_accuracy(manifest, name) for manifest in manifests))
    rows = compare_results(records[0]["results"], records[1]["results"])
    for row in rows:
        if not row.equal:
            yield f"differs: {row.what}{f' ({row.note})' if row.note else ''}"
    yield f"{sum(row.equal for row in rows)} of {len(rows)} results are equal, bit for bit"


def compare_tuned(one: str, other: str) -> Comparison:
    """The tuned model of `other` against that of `one`, by the rule of `other`.

    Raises RequestError where they answered different items, or decoded differently.
    """
    folders = [find_run(name) for name in (one, other)]
    before, after = (read_results(folder / OUTPUTS["after"]) for folder in folders)
    before = before._replace(model=f"{before.model}, {folders[0].name}")
    after = after._replace(model=f"{after.model}, {folders[1].name}")
    return compare(before, after, load_config(folders[1] / CONFIG).evaluation.verdict)


def comparison_figures(one: str, other: str) -> dict[str, Any]:
    """The same as `compare_runs`, for a script: what differs, accuracies of both, and which results are equal."""
    folders = [find_run(name) for name in (one, other)]
    rows = compare_results(*(read_record(folder / EVIDENCE)["results"] for folder in folders))
    manifests = [read_manifest(folder) for folder in folders]
    return {
        "differences": [{"key": key, "one": there, "other": here} for key, there, here in differences(one, other)],
        "accuracy": {
            name: {side: manifest["metrics"]["evaluation"][side]["accuracy"] for side in ("before", "after")}
            for name, manifest in zip(("one", "other"), manifests, strict=True)
        },
        "equal": sum(row.equal for row in rows),
        "differs": [row.what for row in rows if not row.equal],
    }


def write_page(one: str, other: str, path: Path) -> Comparison:
    """The page about the two: what is different, metrics on one axis, then item by item. Raises as compare_tuned."""
    comparison = compare_tuned(one, other)
    folders = [find_run(name) for name in (one, other)]
    origins = [
        provenance(read_record(folder / EVIDENCE), command("runs", "reproduce", folder.name)) for folder in folders
    ]
    write_comparison(path, comparison, (folders[0].name, folders[1].name), differences(one, other), origins)
    return comparison


def differences(one: str, other: str) -> list[tuple[str, str, str]]:
    """(name, value there, value here) of what the runs differ in: configuration, code, data, machine."""
    there, here = (made_from(find_run(name)) for name in (one, other))
    return [
        (key, str(there.get(key, "absent")), str(here.get(key, "absent")))
        for key in there | here
        if there.get(key) != here.get(key)
    ]


def made_from(folder: Path) -> dict[str, Any]:
    """`training.seed` → 7 and so on: every entry of the configuration, then code, data and fingerprint of a run."""
    manifest = read_manifest(folder)
    inputs = manifest["inputs"]
    data = {"dataset content": inputs["dataset"]["content_sha256"]} if "dataset" in inputs else {
        "training file": inputs["data"]["sha256"]
    }  # fmt: skip
    return {
        **dict(leaves(manifest["config"])),
        "code": commit(manifest),
        **data,
        **{f"fingerprint: {name}": value for name, value in (manifest["fingerprint"] or {}).items()},
    }


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """`training.seed`, 42 …; an empty object is a leaf."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _line(name: str, there: Any, here: Any) -> str:
    return f"{name:<40} {there!s:<32} {here}"


def _accuracy(manifest: dict[str, Any], name: str) -> str:
    side = manifest["metrics"]["evaluation"][name]
    low, high = side["interval"]
    return f"{100 * side['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
