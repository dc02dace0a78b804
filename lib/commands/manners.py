"""How the command line speaks: results to whoever asked, remarks to a person, colour only where it is seen.

    answer({"added": 3}, "3 traces added")      # the line; or with --json the figures, alone on standard output
    say("kept in runs/store")                   # a remark: on standard error beside --json, and nowhere under -q
    tell("duel  ", green("done"))               # whatever was asked for

Colours follow https://no-color.org: never where NO_COLOR is set, always where FORCE_COLOR is, else on a terminal.
"""

import argparse
import json
import os
import select
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from lib.experiments.markdown import printable


@dataclass
class _Asked:
    """What the flags of this command ask for."""

    json: bool = False
    quiet: bool = False


_asked = _Asked()


def heed(arguments: argparse.Namespace) -> None:
    """Speak as the flags of this command ask: `--json`, `-q`."""
    _asked.json, _asked.quiet = getattr(arguments, "json", False), getattr(arguments, "quiet", False)
    if _asked.quiet:
        from lib.progress import VARIABLE

        os.environ[VARIABLE] = ""  # no progress bar, here and in the kernels


class Coloured(NamedTuple):
    """A text, and the code by which a terminal colours it."""

    text: str
    code: str


def red(text: str) -> Coloured:
    return Coloured(text, "31")


def green(text: str) -> Coloured:
    return Coloured(text, "32")


def yellow(text: str) -> Coloured:
    return Coloured(text, "33")


def has_colour(file: IO[str]) -> bool:
    """Whether what is written there is seen in colours."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (file.isatty() and os.environ.get("TERM") != "dumb")


def tell(*parts: object, file: IO[str] | None = None, end: str = "\n") -> None:
    """Print, without a character that a terminal would obey, or that turns the direction of what follows."""
    file = file or sys.stdout
    print("".join(_shown(part, has_colour(file)) for part in parts), file=file, end=end)


def say(text: str, aside: bool = False) -> None:
    """Tell a person; beside --json, and `aside`, standard output stays free for what a script reads.

    Whoever reads standard error and leaves ends nothing.
    """
    if _asked.quiet:
        return
    if not (_asked.json or aside):
        tell(text)
        return
    try:
        tell(text, file=sys.stderr)
    except BrokenPipeError:
        stop_talking()


def say_on(text: str) -> None:
    """`say`, of work that goes on where its reader has left."""
    try:
        say(text)
    except BrokenPipeError:
        stop_talking()


def stop_talking() -> None:
    """Send to nowhere what is still said on a stream whose reader has left, as he has what he wanted."""
    for stream in (sys.stdout, sys.stderr):
        if _is_left(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_left(stream: IO[str]) -> bool:
    """Whether it is a pipe that nobody reads any more."""
    asked = select.poll()
    asked.register(stream, select.POLLOUT)  # not nothing, of which macOS would tell nothing
    return any(told & (select.POLLERR | select.POLLHUP) for _, told in asked.poll(0))


def answer(figures: object, *lines: str) -> None:
    """The result of a verb: with --json as figures, which are JSON on standard output; else as remarks."""
    if _asked.json:
        tell_json(figures)
        return
    for line in lines:
        say(line)


def report(figures: object, lines: Iterable[str]) -> None:
    """The same of a verb that is there to tell something: -q does not silence it."""
    if _asked.json:
        tell_json(figures)
        return
    for line in lines:
        tell(line)


def tell_json(figures: object) -> None:
    tell(json.dumps(figures, default=str, allow_nan=False))


def as_json() -> bool:
    """Whether --json was given."""
    return _asked.json


def write_lines(path: Path | None, lines: Iterable[bytes]) -> None:
    """To a file, that to which a link of this name leads, whole or not at all, or to standard output."""
    from lib.files import atomic_open, check_replaceable

    if path is None:
        sys.stdout.buffer.writelines(lines)
        sys.stdout.buffer.flush()
    else:
        check_replaceable(path, "leave out --output for standard output")
        with atomic_open(Path(os.path.realpath(path)) if path.is_symlink() else path) as file:
            file.writelines(lines)


def short(text: str, width: int) -> str:
    """One line of at most `width` characters, none of which a terminal would obey."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _shown(part: Any, coloured: bool) -> str:
    if isinstance(part, Coloured):
        text = printable(part.text)
        return f"\x1b[{part.code}m{text}\x1b[0m" if coloured else text
    return printable(str(part))
