"""Eval sets: frozen questions with one short answer each, one JSON object a line.

    {"id":"geometry-001","prompt":"How many sides …?","expected_answer":"6","category":"geometry",
     "difficulty":"easy"}

    eval_set = load_eval_set(Path("evalsets/eval_v1.jsonl"))
    eval_set.items[0].prompt

Generated items also carry `task` and `state`, from which their reasoning can be checked. A published set
never changes, or figures stop being comparable: `NAME.manifest.json` beside `NAME.jsonl` holds its sha256
and count, both are checked before an item is used, and a correction is a new version with a new name.
"""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from lib.errors import RequestError
from lib.evaluation.numbers import read_number
from lib.files import atomic_write, sha256_bytes
from lib.tasks import TASKS, arithmetic, high_card_duel, reasoning_gym

Text = Annotated[str, Meta(min_length=1, max_length=50_000, pattern=r"^[^\x00]*$")]
Label = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[^\x00]*$")]
Record = TypeVar("Record")


class EvalItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    id: Label
    prompt: Text
    # alternatives are separated by " | "; lib.evaluation.scoring states what counts as equal
    expected_answer: Text
    category: Label
    difficulty: Annotated[str, Meta(pattern="^(easy|medium|hard)$")]
    # how it is scored: empty (the same text or number), exact, number, set or reasoning_gym; lib.evaluation.scoring
    # states each
    scorer: Annotated[str, Meta(pattern="^(|exact|number|set|reasoning_gym)$")] = ""
    # how far a number may be off, absolute and in the answer's own unit; 0: not at all but for rounding
    tolerance: Annotated[float, Meta(ge=0)] = 0.0
    # items of one group (questions on one text, variants of one problem) are no independent evidence
    group: Annotated[str, Meta(max_length=64, pattern=r"^[^\x00]*$")] = ""
    # of generated items: which task, and the values from which each reasoning step can be recomputed
    task: str = ""
    state: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    sha256: str
    count: int
    description: str
    created_at: str
    # of sets that a command made: the command, and what it made them from
    origin: dict[str, Any] = {}


class EvalSet(NamedTuple):
    name: str
    path: Path
    sha256: str
    items: tuple[EvalItem, ...]


def load_eval_set(path: Path) -> EvalSet:
    """Read and verify an eval set; RequestError names file, line and field, what was expected and got."""
    content = _read(path)
    eval_set = EvalSet(path.stem, path, sha256_bytes(content), _items(content, path))
    sidecar = _sidecar(path)
    if sidecar.exists():
        manifest = _record(_read(sidecar), Manifest, str(sidecar))
        for field, got in [("name", path.stem), ("sha256", eval_set.sha256), ("count", len(eval_set.items))]:
            if (expected := getattr(manifest, field)) != got:
                raise _changed(path, f"{field} is {got}, {sidecar.name} says {expected}")
    return eval_set


def write_eval_set(
    path: Path, items: Iterable[EvalItem], description: str, created_at: str, origin: dict[str, Any] | None = None
) -> EvalSet:
    """Publish an eval set and, last, its manifest; a published one is never replaced by other content."""
    content = b"".join(msgspec.json.encode(item) + b"\n" for item in items)
    eval_set = EvalSet(path.stem, path, sha256_bytes(content), _items(content, path))
    sidecar = _sidecar(path)
    if sidecar.exists() and _record(_read(sidecar), Manifest, str(sidecar)).sha256 != eval_set.sha256:
        raise _changed(path, "it is already published with other content")
    manifest = Manifest(path.stem, eval_set.sha256, len(eval_set.items), description, created_at, origin or {})
    atomic_write(path, content)
    atomic_write(sidecar, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return eval_set


def high_card_duel_items(count: int, seed: int) -> list[EvalItem]:
    """`count` different deals of High Card Duel, drawn from all 2,652: how `high_card_duel_v1` was made.

    The closer the two ranks, the harder it is to guess: they are 5 or more apart (easy), 1 to 4 (medium), equal (hard).
    """
    deals = random.Random(seed).sample(high_card_duel.all_deals(), count)
    return [_duel_item(number, deal) for number, deal in enumerate(deals, 1)]


def _duel_item(number: int, deal: high_card_duel.Deal) -> EvalItem:
    gap = abs(deal.mine.value - deal.opponent.value)
    category, difficulty = (
        ("equal ranks", "hard") if gap == 0 else ("ranks 1 to 4 apart", "medium") if gap < 5
        else ("ranks 5 or more apart", "easy")
    )  # fmt: skip
    return EvalItem(
        id=f"high_card_duel-{number:03}",
        prompt=high_card_duel.question(deal),
        expected_answer=deal.result,
        category=category,
        difficulty=difficulty,
        task=high_card_duel.NAME,
        state=high_card_duel.state_of(deal),
    )


def arithmetic_items(count: int, seed: int) -> list[EvalItem]:
    """`count` different problems, as many of each category as of any other: how `arithmetic_v1` was made.

    The more digits, the harder: 2 (easy), 3 (medium), 4 (hard). That a + b is b + a is taken into account.
    """
    source, drawn = random.Random(seed), {}
    for number in range(count):
        category = arithmetic.CATEGORIES[number % len(arithmetic.CATEGORIES)]
        while (key := _question_key(problem := arithmetic.draw(category, source))) in drawn:
            pass
        drawn[key] = _arithmetic_item(number + 1, category, problem)
    return list(drawn.values())


def _question_key(problem: arithmetic.Problem) -> str:
    return str(arithmetic.canonical(arithmetic.state_of(problem)))


def _arithmetic_item(number: int, category: arithmetic.Category, problem: arithmetic.Problem) -> EvalItem:
    return EvalItem(
        id=f"arithmetic-{number:04}",
        prompt=arithmetic.question(problem),
        expected_answer=problem.result,
        category=str(category),
        difficulty={2: "easy", 3: "medium", 4: "hard"}[category.digits],
        task=arithmetic.NAME,
        state=arithmetic.state_of(problem),
    )


def _items(content: bytes, path: Path) -> tuple[EvalItem, ...]:
    items: dict[str, EvalItem] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        item = _record(line, EvalItem, f"{path}:{number}")
        _check_scorer(item, f"{path}:{number}")
        _check_state(item, f"{path}:{number}")
        if item.id in items:
            raise RequestError(
                f"{path}:{number}: field id: expected an id of its own, got {item.id!r} of line {lines[item.id]}"
            )
        items[item.id], lines[item.id] = item, number
    if not items:
        raise RequestError(f"{path}: expected one JSON object a line, got an empty file")
    return tuple(items.values())


def _check_scorer(item: EvalItem, where: str) -> None:
    """What is scored as a number must be one, text has no tolerance, and a verifier needs its entry."""
    if item.scorer == "number" and not all(map(read_number, item.expected_answer.split(" | "))):
        raise RequestError(f"{where}: field expected_answer: expected a number, got {item.expected_answer!r}")
    if item.scorer == "exact" and item.tolerance:
        raise RequestError(f"{where}: field tolerance: expected none with the scorer exact, got {item.tolerance}")
    if item.scorer == reasoning_gym.NAME and set(item.state) != set(reasoning_gym.STATE):
        keys = ", ".join(reasoning_gym.STATE)
        raise RequestError(f"{where}: field state: expected {keys} with the scorer {item.scorer}, got {item.state}")


def _check_state(item: EvalItem, where: str) -> None:
    """What the steps of a completion are to be checked against is there: better known before a model answers."""
    if item.task in TASKS:
        try:
            TASKS[item.task].episode_of(item.state)
        except ValueError as error:
            raise RequestError(f"{where}: field state, of task {item.task}: {error}") from None


def _record(line: bytes, kind: type[Record], where: str) -> Record:
    """Decode strictly: no coercion, no unknown field, no key twice."""
    try:
        return _decode(line, kind)
    except (ValueError, RecursionError) as error:  # msgspec's and Unicode's errors are ValueErrors
        raise RequestError(f"{where}: {error}") from None


def _decode(line: bytes, kind: type[Record]) -> Record:
    try:
        record = msgspec.json.decode(line, type=kind)
    except msgspec.ValidationError as error:
        raise ValueError(_explain(str(error), line)) from None
    json.loads(line, object_pairs_hook=_without_duplicates)
    return record


def _explain(problem: str, line: bytes) -> str:
    """Turn "Expected `str`, got `int` - at `$.id`" into "field id: expected `str`, got 7"."""
    if missing := re.fullmatch(r"Object missing required field `(.*)`", problem):
        return f"field {missing[1]}: expected a value, got none"
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", problem, re.DOTALL):
        return f"field {unknown[1]}: expected no such field, got one"
    place = re.fullmatch(r"(.*) - at `\$\.(\w+).*`", problem, re.DOTALL)
    if place is None:
        return problem
    expected, got = place[1].split(", got ")[0], repr(json.loads(line)[place[2]])
    shown = got if len(got) <= 80 else got[:80] + "…"
    return f"field {place[2]}: {expected[0].lower()}{expected[1:]}, got {shown}"


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record: dict[str, object] = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"field {key}: expected each key once, got it twice")
        record[key] = value
    return record


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot read this eval set: {error.strerror}") from None


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.stem}.manifest.json")


def _changed(path: Path, what: str) -> RequestError:
    return RequestError(f"{path}: {what}; an eval set is immutable: publish a correction as a new version")
