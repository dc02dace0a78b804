# PYTHON_ARGCOMPLETE_OK
"""The command line: `python -m lib VERB …`. The verbs are in lib/commands; here is how a command begins and ends.

Exit status: 0 done, 1 it failed, 2 the request was wrong. An error is one line: what, where, what to do.
"""

import argparse
import gc
import os
import signal
import sys
from traceback import walk_stack
from types import FrameType
from typing import Any, NoReturn

from lib.commands import datasets, doctor, evaluation, launch, models, runs, traces
from lib.commands.manners import heed, red, stop_talking, tell
from lib.commands.parser import PROGRAM, Parser, common_flags, flag
from lib.errors import RetraceError, Terminated, exit_status

EXAMPLES = """examples:
  python -m lib run configs/quickstart.yaml                   the whole job, into runs/
  python -m lib runs list                                     every run, with its verdict
  python -m lib traces import mine.jsonl                      traces of your own; docs/tutorial.md goes on from there
  python -m lib doctor                                        is all there that is needed? and what else could be
  python -m lib VERB --help                                   what a verb does, and all its flags

exit status: 0 done, 1 it failed, 2 the request was wrong"""


def parser() -> Parser:
    """Every verb with its flags."""
    top = Parser(
        prog=PROGRAM,
        description="Reasoning traces in, a fine-tuned model and a before/after report out.",
        epilog=EXAMPLES,
    )
    common_flags(top)
    flag(top, "--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = top.add_subparsers(metavar="VERB", required=True)
    for commands in (runs, traces, datasets, models, evaluation, launch, doctor):
        commands.add(verbs)
    return top


class _Version(argparse.Action):
    """Looked up when asked for, as that takes as long as all the rest of the parser."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        from importlib.metadata import version

        tell(f"retrace {version('retrace')}")
        parser.exit()


def main(words: list[str] | None = None) -> int:
    """Do what the words ask. Returns the exit status."""
    reading = parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
        import argcomplete

        argcomplete.autocomplete(reading, always_complete_options=False)
    try:
        arguments = reading.parse_args(words)
        heed(arguments)
        if home := getattr(arguments, "home", None) or os.environ.get("RETRACE_HOME"):
            os.environ["RETRACE_HOME"] = os.path.abspath(home)  # for the kernels too, which start in other folders
        arguments.action(arguments)
    except BrokenPipeError:
        stop_talking()
    except (RetraceError, KeyboardInterrupt, OSError, MemoryError, ImportError) as failure:
        tell(red("error:"), f" {_said(failure)}", file=sys.stderr)
        return exit_status(failure)
    return 0


def _said(failure: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(failure, KeyboardInterrupt):
        ended = "terminated" if isinstance(failure, Terminated) else "interrupted"
        return f"{ended}; python -m lib runs list shows what can be resumed"
    if isinstance(failure, OSError):
        return f"{failure.filename or ''}: {failure.strerror or failure}".lstrip(": ")
    if isinstance(failure, MemoryError):
        return "out of memory; give it more, or ask for less at once"
    if isinstance(failure, ImportError):  # of a library that is not there, or that memory is not enough for
        reason = failure.__cause__ or failure
        return f"{reason}; is there memory enough? python -m lib doctor tells what is not there"
    return str(failure)


def end_when_asked() -> None:
    """From here on SIGTERM and SIGHUP are as Ctrl-C: what is at work is stopped, and recorded as interrupted."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # else as nohup has left it
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """Raise what ends the command; a moment later where garbage is collected, as what is raised in there is lost."""
    collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}  # one of them is jax's
    if any(caller.f_code in collecting for caller, _ in walk_stack(frame)):
        signal.signal(signal.SIGALRM, lambda _, then: _end(number, then))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        return
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


if __name__ == "__main__":
    end_when_asked()
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is spelt out; a pipe has each line at once
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.exit(main())
