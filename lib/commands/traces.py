"""Traces: generate them, import them, and look at what the store holds."""

import argparse
import json
from heapq import nlargest
from pathlib import Path
from typing import Any

from lib.commands.manners import answer, as_json, report, say, short, tell, tell_json, write_lines
from lib.commands.parser import Parser, at_least, flag, group, reasoning_gym_flag, use_reasoning_gym, verb
from lib.errors import RequestError
from lib.files import shown_path

SHOWN_VALUES, SHOWN_PROBLEMS = 8, 20


def add(verbs: Any) -> None:
    traces = group(verbs, "traces", "Generate, import, list and verify traces.",
                   "traces generate --game high_card_duel --count 100", "traces import mine.jsonl")  # fmt: skip
    made = verb(traces, "generate", traces_generate, "Play a game and keep what was reasoned.",
                "traces generate --game high_card_duel --count 100 --seed 42")  # fmt: skip
    flag(made, "--game", required=True, metavar="GAME", help="high_card_duel, arithmetic, or gsm_symbolic",
         complete=lambda **context: ["high_card_duel", "arithmetic", "gsm_symbolic"])  # fmt: skip
    flag(made, "--count", type=at_least(1), required=True, metavar="N", help="episodes to play")
    flag(made, "--engine", choices=("builtin", "ungar", "reasoning-gym"), default="builtin",
         help="who plays it (default: builtin); gsm_symbolic is reasoning-gym's")  # fmt: skip
    _ungar_flag(made)
    reasoning_gym_flag(made)
    flag(made, "--seed", type=at_least(0), default=42, help="episode i is dealt with seed + i (default: 42)")
    flag(made, "--no-persist", action="store_true",
         help="do not keep the traces; print them, or write them to --output")  # fmt: skip
    flag(made, "--output", type=Path, metavar="F.jsonl", help="write the traces to this file too")
    made = verb(traces, "engines", traces_engines, "What can play, in which version.", "traces engines")
    _ungar_flag(made)
    reasoning_gym_flag(made)
    made = verb(traces, "import", traces_import, "Import traces from JSONL, JSON, CSV or Parquet.",
                "traces import mine.jsonl", "traces import 'data/*.csv' --mapping columns.yaml")  # fmt: skip
    flag(made, "files", nargs="+", metavar="FILE", help="a file, a pattern such as 'data/*.jsonl', or s3://BUCKET/KEY")
    flag(made, "--mapping", type=Path, metavar="M.yaml", help="which columns a trace is made of (docs/importing.md)")
    flag(made, "--on-bad-record", choices=("refuse", "quarantine"), default="refuse",
         help="refuse: one bad record and nothing goes in; quarantine: the good go in, the bad to a file")  # fmt: skip
    made = verb(traces, "list", traces_list, "What the store holds, newest first, and which meta values.",
                "traces list --limit 5")  # fmt: skip
    flag(made, "--limit", type=at_least(0), default=5, metavar="N", help="traces to show (default: 5)")
    made = verb(traces, "show", traces_show, "One trace, and the file and line, or the game and seed, it is from.",
                "traces show 7c2f")  # fmt: skip
    flag(made, "id", metavar="ID", help="or the beginning of it")
    verb(traces, "verify", traces_verify, "Check every step of every trace of a known game against its engine.",
         "traces verify")  # fmt: skip


def _ungar_flag(made: Parser) -> None:
    flag(made, "--ungar-python", default="", metavar="PYTHON",
         help="the interpreter that has UNGAR installed (default: this one)")  # fmt: skip


def traces_generate(arguments: argparse.Namespace) -> None:
    from lib.config import TracesConfig, check_engine
    from lib.experiments.stages import play, store
    from lib.trace import to_json

    if arguments.json and arguments.no_persist and not arguments.output:
        raise RequestError("--json: --no-persist prints the traces, which are JSON already; leave it out")
    check_engine(arguments.engine, arguments.game, "--engine")
    use_reasoning_gym(arguments)
    asked = TracesConfig(arguments.game, arguments.count, arguments.seed, arguments.engine, arguments.ungar_python)
    played = play(asked)
    traces = list(played.traces)
    printed = arguments.no_persist and not arguments.output
    say_left_out(played.left_out, len(traces) + sum(played.left_out.values()), "worked answers", aside=printed)
    if arguments.output or arguments.no_persist:
        write_lines(arguments.output, (to_json(trace) + b"\n" for trace in traces))
    if arguments.no_persist:
        if arguments.output:
            answer({"traces": len(traces), "output": shown_path(arguments.output)})
        return
    added, held = store().add(traces), store().count()
    answer(
        {"added": added.added, "duplicates": added.duplicates, "held": held},
        f"{added.added} traces added, {added.duplicates} were there already; the store holds {held}",
    )


def traces_engines(arguments: argparse.Namespace) -> None:
    from lib.experiments.stages import engines

    use_reasoning_gym(arguments)
    found = engines(arguments.ungar_python)
    report(
        [engine._asdict() for engine in found],
        [
            f"{engine.name:<13} {engine.version or 'absent':<8} {', '.join(engine.games)}  {engine.note}".rstrip()
            for engine in found
        ],
    )


def say_left_out(left_out: dict[str, int], drawn: int, what: str, aside: bool = False) -> None:
    for reason, count in left_out.items():
        say(f"left out: {count} of {drawn} {what}: {reason}", aside)


def traces_import(arguments: argparse.Namespace) -> None:
    from lib.data.importing import import_files
    from lib.data.mapping import load_mapping
    from lib.experiments.stages import store

    mapping = load_mapping(arguments.mapping) if arguments.mapping else None
    done = import_files(store(), arguments.files, arguments.on_bad_record, mapping=mapping)
    counts = ("lines", "accepted", "rejected", "blank", "added", "duplicates")
    rejects = shown_path(done.rejects_file) if done.rejects_file else None
    answer(
        {name: getattr(done, name) for name in counts} | {"rejects_file": rejects},
        f"{done.lines} lines: {done.accepted} accepted, {done.rejected} rejected, {done.blank} blank; "
        f"{done.added} traces added, {done.duplicates} were there already",
        *([f"Rejected records and the reasons: {rejects}"] if rejects else []),
    )


def traces_list(arguments: argparse.Namespace) -> None:
    from lib.experiments.stages import store

    count = store().count()
    newest = nlargest(arguments.limit, store().scan(), key=lambda trace: (trace.created_at, trace.id))
    if as_json():
        shown = [{"id": t.id, "created_at": t.created_at, "prompt": t.prompt, "final_answer": t.final_answer}
                 for t in newest]  # fmt: skip
        meta = {key: {_spelt(text): times for text, times in found.items()}
                for key, found in store().meta_values().items()}  # fmt: skip
        tell_json({"count": count, "traces": shown, "meta": meta})
        return
    tell(f"{count} traces in {shown_path(store().folder)}")
    for trace in newest:
        tell(f"  {trace.id[:8]}  {trace.created_at[:19]}  {short(trace.prompt, 70)}  → {short(trace.final_answer, 20)}")
    if count > arguments.limit:
        tell(f"  … and {count - arguments.limit} more")
    if values := store().meta_values(SHOWN_VALUES + 1):
        tell("meta, with the number of traces:")
    for key, found in values.items():
        shown = [f"{short(_spelt(text), 30)} ({times})" for text, times in found.items()]
        tell(f"  {key}: {', '.join(shown[:SHOWN_VALUES])}{', …' if len(shown) > SHOWN_VALUES else ''}")
    if not count:
        tell("generate or import some: python -m lib traces --help")


def _spelt(value: str) -> str:
    """A value of meta, given as JSON, as a filter in YAML names it; of a list or an object it tells that it is one."""
    from lib.config import in_line

    if value in ("[]", "{}"):
        return "…".join(value)
    return in_line(json.loads(value)) if value.startswith('"') else value


def traces_show(arguments: argparse.Namespace) -> None:
    from lib.experiments.stages import find_traces
    from lib.trace import to_json

    found = find_traces(arguments.id)
    if as_json():
        for origin in found:
            tell_json({"trace": json.loads(to_json(origin.trace)), "file": origin.file, "line": origin.line})
        return
    if len(found) > 1:
        raise RequestError(f"trace {arguments.id}: {len(found)} ids begin so; give more of it, or --json for all")
    [origin] = found
    trace = origin.trace
    tell(f"{trace.id}  {trace.created_at}  from {origin}")
    tell(trace.prompt)
    for number, step in enumerate(trace.steps, 1):
        tell(f"{number}. {step.content}")
    tell(f"Answer: {trace.final_answer}")


def traces_verify(arguments: argparse.Namespace) -> None:
    from lib.experiments.stages import store, verify_traces

    found = verify_traces(store().scan())
    report(
        {"checked": found.checked, "true": found.true, "unknown": found.unknown, "problems": found.problems},
        [
            *found.problems[:SHOWN_PROBLEMS],
            *([f"… and {len(found.problems) - SHOWN_PROBLEMS} more"] if len(found.problems) > SHOWN_PROBLEMS else []),
            f"{found.checked} traces checked against their engine: {found.true} true in every step, "
            f"{len(found.problems)} not; {found.unknown} of no known game",
        ],
    )
    if found.problems:
        raise SystemExit(1)
