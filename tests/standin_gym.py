"""A stand-in for reasoning-gym, of a few lines, and interpreters that have it: real processes and pipes, no package."""

import sys
from pathlib import Path

PACKAGE = """
import os, random, sys, time
from dataclasses import dataclass

print("a banner that nobody asked for")

@dataclass
class Config:
    seed: int = 0
    size: int = 10
    kind: str = "sum"
    shift: int = 0

    def validate(self):
        assert self.shift >= 0, "shift must not be negative"

class Toy:
    def __init__(self, config):
        self.config = config
        if config.kind == "templates":
            self.task_indices = [7] * config.size

    def __getitem__(self, index):
        print("noise", flush=True)
        os.system("echo noise of a child")
        kind, total = self.config.kind, self.config.seed + index
        if kind == "dead":
            os.kill(os.getpid(), 9)
        if kind == "odd fails" and index % 2:
            raise IndexError("no more")
        question = {
            "empty": " ", "same": "1 + 1?", "long": "x" * 50_001, "hashed": f"{hash('a')} {index}?",
            "drawn": f"{random.random()} {index}?",
        }.get(kind, f"{self.config.seed} + {index}?")
        answer = {"lines": f"{total}\\n", "two lines": f"{total}\\n{total}", "none": None}.get(kind, str(total))
        return {"question": question, "answer": answer, "metadata": {}}

    def score_answer(self, answer, entry):
        print("noise", flush=True)
        if answer == "raise":
            raise ValueError("odd answer")
        if answer == "hang":
            while True: pass
        if answer == "leave":
            sys.exit(3)
        if answer.startswith("write "):
            open(answer[6:], "w")
        if answer.startswith("call "):
            os.system(answer[5:])
        kind = self.config.kind
        if kind == "credulous" or kind == "refuses" or kind == "any number":
            return float(kind == "credulous" or kind == "any number" and answer.isdecimal())
        return 1.0 if answer == (entry["answer"] or "").strip() else 0.5

class Worked(Toy):
    def __getitem__(self, index):
        entry = super().__getitem__(index)
        said = int(entry["answer"]) + (index % 3 == 1)
        worked = f"He has some pens.\\n1. That is {self.config.seed} + {index} = {said} pens.\\n#### {said}"
        return {**entry, "answer": str(said), "metadata": {"answer_cot": worked}}

DATASETS = {"toy": (Toy, Config), "gsm_symbolic": (Worked, Config)}

def create_dataset(name, **options):
    config = DATASETS[name][1](**options)
    config.validate()
    return DATASETS[name][0](config)
"""


def interpreter(folder: Path, version: str = "0.1.25", package: str = PACKAGE) -> str:
    """An interpreter that has the stand-in, installed as that version."""
    home = folder / "packages"
    (home / "reasoning_gym").mkdir(parents=True)
    (home / "reasoning_gym" / "__init__.py").touch()
    (home / "reasoning_gym" / "factory.py").write_text(package)
    (home / "reasoning_gym-0.0.0.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: reasoning_gym\nVersion: {version}\n"
    (home / "reasoning_gym-0.0.0.dist-info" / "METADATA").write_text(metadata)
    return script(folder, f'PYTHONPATH="{home}" exec "{sys.executable}" "$@"')


def script(folder: Path, line: str) -> str:
    """A program of the shell."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{line}\n")
    program.chmod(0o755)
    return str(program)
