"""One run in a process of its own, for test_identity.py to hold against others. Its request is JSON:

    python tests/faults/once.py '{"home": "…", "cores": [0], "imports": ["b.jsonl", "a.jsonl"], "name": "toy"}'

`cores` are those that it may use; `imports` go into the store before the run begins, in that order; `name` is
the run's; with `data_alone` it ends where training would begin. Prints one JSON object: what there is, by its digest.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> None:
    if request.get("cores"):
        os.sched_setaffinity(0, request["cores"])
    os.environ["RETRACE_HOME"] = request["home"]
    from lib.data.importing import import_files
    from lib.experiments import stages

    for file in request.get("imports", []):
        import_files(stages.store(), [Path(file)])
    print(json.dumps(data_alone(request["settings"]) if request.get("data_alone") else whole(request["name"])))


def data_alone(settings: list[str]) -> dict[str, str]:
    """Everything that a training reads, and the order it reads it in."""
    from lib.config import load_config
    from lib.data.batches import Batches
    from lib.data.renderer import EncodedExample
    from lib.experiments import stages
    from lib.experiments.run import create_run
    from lib.files import sha256_bytes, sha256_file

    config = load_config("configs/smoke.yaml", settings)
    run = create_run(config)
    dataset = stages.make_dataset(config)
    toy = [EncodedExample([2, 1], [False, True])] * len(dataset.traces)
    order = [Batches(toy, config.training, 8).rows(step) for step in range(40)]
    return {
        "dataset": dataset.manifest["content_sha256"],
        "build": dataset.manifest["build_id"],
        "order": sha256_bytes(json.dumps(order).encode()),
        "reserved": sha256_bytes(json.dumps(stages.reserved_questions(), sort_keys=True).encode()),
        "tokenizer": sha256_file(dataset.tokenizer_file),
        "examples": sha256_bytes(json.dumps(stages.training_examples(run)).encode()),
        "config": sha256_file(run.path("config.yaml")),
    }


def whole(name: str) -> dict[str, str]:
    """Every file of the run of this name that holds no time and no speed, and its `results`."""
    import damage
    import subject
    from small import RUN

    from lib.experiments import pipeline
    from lib.experiments.run import run_folders
    from lib.files import sha256_bytes, sha256_file

    if not subject.FULL:
        pipeline.execute = damage.execute_here
    said = damage.command(*RUN, "--name", name)
    assert said.status == 0, said
    [folder] = (folder for folder in run_folders() if folder.name.endswith(name))
    names = ["config.yaml", "checkpoints.jsonl", "eval_before.jsonl", "eval_after.jsonl", "eval_summary.json",
             "delta_report.md", "checkpoint-final/tokenizer.json", "checkpoint-final/weights/digest.json"]  # fmt: skip
    found = {name: sha256_file(folder / name) for name in names}
    return found | {
        name: sha256_bytes(json.dumps(value, sort_keys=True).encode())
        for name, value in subject.results(folder).items()
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
