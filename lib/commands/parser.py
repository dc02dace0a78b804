"""The parser: argparse, with an error in one line that says what was probably meant, and what all verbs share."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from lib.errors import RequestError

PROGRAM = "python -m lib"


class Parser(argparse.ArgumentParser):
    """argparse, with an error that says what was probably meant, raised as every other RequestError."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        verbs = _verbs(self)
        own = [name for name in verbs if " " not in name]
        known = [flag for action in self._actions for flag in action.option_strings]
        known += [str(choice) for action in self._actions for choice in action.choices or ()]
        wrong = re.search(r"unrecognized arguments: (\S+)", message) or re.search(r"invalid choice: '([^']*)'", message)
        meant = difflib.get_close_matches(wrong[1].split("=")[0], known, n=1) if wrong else []
        if "argument VERB: invalid choice" in message:
            message = f"no verb {wrong[1]!r}"
            meant = meant or [name for name in verbs if name.endswith(f" {wrong[1]}")]  # `list` of which noun?
            if not meant:
                message += f", only {', '.join(own)}"
        elif message.endswith("required: VERB"):
            message = f"expected a verb: {', '.join(own)}"
        hint = f"did you mean {' or '.join(meant)}?" if meant else f"see {self.prog} --help"
        raise RequestError(f"{message}; {hint}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """What a verb does not know is told by that verb, and before what it misses: the hint is the flag meant."""
        known = {flag for action in self._actions for flag in action.option_strings}
        flags = takewhile(lambda word: word != "--", sys.argv[1:] if args is None else args)  # the rest are values
        words = [word.split("=")[0] for word in flags]
        strange = [word for word in words if word.startswith("--") and " " not in word and word not in known]
        takes_all = any(action.nargs == argparse.REMAINDER for action in self._actions)
        if strange and not self._subparsers and not takes_all:
            self.error(f"unrecognized arguments: {' '.join(strange)}")
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def _verbs(made: argparse.ArgumentParser) -> list[str]:
    """`run`, `runs`, `runs list` … of a parser."""
    groups = made._subparsers._group_actions if made._subparsers else ()
    inner = {name: _verbs(verb) for group in groups for name, verb in group.choices.items()}
    return [*inner, *(f"{name} {verb}" for name, verbs in inner.items() for verb in verbs)]


# ---- groups, verbs and flags --------------------------------------------------------------------------------


def group(verbs: Any, name: str, help: str, *examples: str) -> Any:
    """A noun with verbs of its own."""
    made = verbs.add_parser(name, help=help, description=help, epilog=_epilog(examples))
    common_flags(made)
    return made.add_subparsers(metavar="VERB", required=True)


def verb(group: Any, name: str, action: Callable, help: str, *examples: str, figures: bool = True) -> Parser:
    """A verb that does `action`; one that has no `figures` to print has no --json."""
    made = group.add_parser(name, help=help, description=help, epilog=_epilog(examples))
    made.set_defaults(action=action)
    common_flags(made)
    if figures:
        flag(made, "--json", action="store_true", help="print the result as JSON, for scripts")
    return made


def flag(made: Parser, *names: str, complete: Callable | None = None, **options: Any) -> None:
    """One argument; `complete` tells the shell's completion what it may be."""
    made.add_argument(*names, **options).completer = complete


def common_flags(made: Parser) -> None:
    """What may stand before the verb and after it alike."""
    flag(made, "--home", type=Path, metavar="DIR", default=argparse.SUPPRESS,
         help="where everything produced is kept (default: RETRACE_HOME, or runs/)")  # fmt: skip
    flag(made, "-q", "--quiet", action="store_true", default=argparse.SUPPRESS,
         help="no remarks and no progress: only what was asked for, and errors")  # fmt: skip


def config_flags(made: Parser, required: bool) -> None:
    flag(made, "--config", required=required, metavar="C.yaml", help="configuration file", complete=config_files)
    set_flag(made)


def set_flag(made: Parser) -> None:
    flag(made, "--set", type=_assignment, action="append", default=[], metavar="KEY=VALUE",
         help="change a key of it, such as training.seed=1", complete=config_keys)  # fmt: skip


def reasoning_gym_flag(made: Parser) -> None:
    flag(made, "--reasoning-gym-python", default="", metavar="PATH",
         help="the one that has reasoning-gym (default: RETRACE_REASONING_GYM_PYTHON, or this one)")  # fmt: skip


def use_reasoning_gym(arguments: argparse.Namespace) -> None:
    from lib.tasks import reasoning_gym

    if arguments.reasoning_gym_python:
        os.environ[reasoning_gym.VARIABLE] = arguments.reasoning_gym_python


def _epilog(examples: tuple[str, ...]) -> str:
    lines = [f"{PROGRAM} {example}" for example in examples]
    return f"example: {lines[0]}" if len(lines) == 1 else "\n  ".join(["examples:", *lines])


# ---- reading what a flag holds ------------------------------------------------------------------------------


def at_least(low: int) -> Callable[[str], int]:
    """The type of a flag that is a whole number, of this size or larger."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if number < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {number}")
        return number

    return whole_number


def share(text: str) -> float:
    """The type of a flag that is a number from 0 to 1."""
    try:
        if 0 <= (number := float(text)) <= 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")


def pairs(given: list[str], flag: str) -> dict[str, Any]:
    """`key=value` flags, the same key again meaning either; the values are read as YAML, so 42 is a number."""
    from lib.config import parse_yaml

    found: dict[str, list] = {}
    for item in given:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise RequestError(f"{flag} {item!r}: expected KEY=VALUE, such as game=high_card_duel")
        found.setdefault(key, []).append(parse_yaml(f"value: {text}", f"{flag} {item}")["value"])
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def _assignment(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE in one word, such as training.seed=1, got {text!r}")
    return text


# ---- completion: what a name may be -------------------------------------------------------------------------


def run_names(**context: Any) -> list[str]:
    from lib.experiments.run import run_folders

    _use_home()
    return [folder.name for folder in run_folders()]


def dataset_keys(**context: Any) -> list[str]:
    from lib.data.dataset import list_datasets
    from lib.files import home

    _use_home()
    return list_datasets(home() / "datasets")


def eval_sets(**context: Any) -> list[str]:
    from lib.files import repository_root

    return [path.stem for path in sorted((repository_root() / "evalsets").glob("*.jsonl"))]


def config_files(**context: Any) -> list[str]:
    from lib.files import repository_root

    return [f"configs/{path.name}" for path in sorted((repository_root() / "configs").glob("*.yaml"))]


def config_keys(**context: Any) -> list[str]:
    from lib.config import Config

    return [f"{key}=" for key in _keys_of(Config)]


def _keys_of(kind: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        inner = next((part for part in get_args(hint) or (hint,) if is_dataclass(part)), None)
        yield from _keys_of(inner, f"{prefix}{name}.") if inner else (prefix + name,)


def _use_home() -> None:
    """That of the line which is completed; what argparse has read of an unfinished line need not hold it."""
    if found := re.search(r"\s--home[ =]+(\S+)", os.environ.get("COMP_LINE", "")):
        os.environ["RETRACE_HOME"] = found[1]
