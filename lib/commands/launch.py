"""Several processes that compute as one: started here, or by srun (docs/cluster.md)."""

import argparse
import atexit
import os
import sys
from typing import Any, NoReturn

from lib.commands import evaluation, models
from lib.commands.manners import heed
from lib.commands.parser import PROGRAM, Parser, at_least, common_flags, flag, verb
from lib.errors import RequestError, exit_status


def add(verbs: Any) -> None:
    made = verb(verbs, "launch", launch, "Train, or answer an eval set, by several processes that compute as one.",
                "launch --processes 2 train --config C.yaml --data duel.jsonl --output runs/duel",
                figures=False)  # fmt: skip
    flag(made, "--processes", type=at_least(1), metavar="N",
         help="start so many here (default: be one of those that srun, or whoever else, has started)")  # fmt: skip
    flag(made, "command", nargs=argparse.REMAINDER, metavar="train … | eval generate …",
         help="what they do together")  # fmt: skip


def launch(arguments: argparse.Namespace) -> None:
    words = arguments.command
    if words[:1] != ["train"] and words[:2] != ["eval", "generate"]:
        raise RequestError(
            "launch: expected train … or eval generate …; a run is one process, which shares its work among all the "
            "devices that it sees"
        )
    if getattr(arguments, "quiet", False):
        words = ["-q", *words]  # given to us, it is meant for them
    asked = _parser().parse_args(words)
    if arguments.processes is not None:
        from lib.experiments.launch import start

        start(words, arguments.processes)
        return
    _take_part(asked)


def _parser() -> Parser:
    """Of what can be launched."""
    top = Parser(prog=PROGRAM)
    common_flags(top)
    verbs = top.add_subparsers(metavar="VERB", required=True)
    for commands in (models, evaluation):
        commands.add(verbs)
    return top


def _take_part(asked: argparse.Namespace) -> None:
    from lib.model.processes import join_job

    heed(asked)
    if home := getattr(asked, "home", None):
        os.environ["RETRACE_HOME"] = os.path.abspath(home)
    join_job()
    try:
        asked.action(asked)
    except BaseException as failure:
        # Before jax's own way out, which waits for the others, who may wait for us.
        atexit.register(_leave, exit_status(failure))
        raise


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
