"""The configuration of a run: frozen dataclasses, read from strict YAML, changed by `a.b=value` overrides.

    config = load_config("configs/quickstart.yaml", ["training.num_steps=50"])
    config.training.num_steps     # 50

An unknown key, a wrong type, a duplicate key or a value out of bounds is refused with the file, the key, what
was expected and what was got. Each field is read exactly where it acts, and no field is there that nothing reads.
YAML is read by version 1.2's rules for scalars, as people expect them: `1e-5` is a number and `no` is a word.
"""

import dataclasses
import difflib
import json
import math
import re
import types
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from lib.cards import card
from lib.errors import RequestError
from lib.files import NAME, repository_root

MAX_DEPTH = 20
MAX_BYTES = 1 << 15  # a configuration has some thousand; PyYAML reads this much within a second
# By engine the games that it plays.
GAMES = {
    "builtin": ("high_card_duel", "arithmetic"),
    "ungar": ("high_card_duel",),
    "reasoning-gym": ("gsm_symbolic",),
}


def bounded(
    default: Any = dataclasses.MISSING,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    of: tuple = (),
    make: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field whose value is checked: from `low` to `high`, or one of `of`; of a list, at least `low`."""
    return field(default=default, default_factory=make, metadata={"low": low, "high": high, "of": of})


class Shown:
    """A section of the configuration shows itself as a card in a notebook."""

    def _repr_html_(self) -> str:
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        facts = {name: value.changed() if isinstance(value, Shown) else value for name, value in fields.items()}
        return card(type(self).__name__.removesuffix("Config"), facts)

    def changed(self) -> dict[str, Any]:
        """What is not at its default."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value != getattr(type(self)(), name)}


@dataclass(frozen=True)
class ModelConfig(Shown):
    """The model that is tuned."""

    # "tiny" (from scratch, on a CPU), or a released Gemma by its hub name or folder.
    name: str = "tiny"
    # What is computed in; softmax, norms and loss are float32 in either. With bfloat16, weights that are trained
    # are float32 still, and those that are not (LoRA's base) bfloat16.
    dtype: str = bounded("float32", of=("float32", "bfloat16"))
    # Longest conversation in tokens, prompt and answer together; a longer one is refused, never cut.
    max_length: int = bounded(512, low=8, high=1_000_000)


@dataclass(frozen=True)
class TracesConfig(Shown):
    """What is generated before the dataset is built; by default nothing."""

    # The game that the run's traces are generated from; empty: use what the store holds.
    game: str = bounded("", of=("", *dict.fromkeys(game for games in GAMES.values() for game in games)))
    # Number of episodes to play; 0 with no game.
    count: int = bounded(0, low=0, high=10_000_000)
    # Episode i is drawn with seed + i.
    seed: int = bounded(42, low=0)
    # Who plays it: our own engine (builtin), for high_card_duel the UNGAR package too, for gsm_symbolic reasoning-gym.
    engine: str = bounded("builtin", of=tuple(GAMES))
    # The interpreter that has UNGAR installed; empty: the one that runs this.
    ungar_python: str = ""


@dataclass(frozen=True)
class CurationConfig(Shown):
    """Rules by which a trace that matches the filters is left out nevertheless."""

    # Characters of a trace, at least: of its question, steps and answer together.
    min_characters: int = bounded(0, low=0)
    # The same, at most; null: any number.
    max_characters: int | None = bounded(None, low=1)
    # Steps of its reasoning, at least.
    min_steps: int = bounded(0, low=0)
    # The same, at most; null: any number.
    max_steps: int | None = bounded(None, low=1)
    # At least this share of the characters is ASCII: 0.9 leaves out text in another script.
    min_ascii: float = bounded(0.0, low=0.0, high=1.0)
    # Writing systems by their names in Unicode, as [Latin, Han]: text in any other is left out. Empty: all stay.
    scripts: list[str] = field(default_factory=list)
    # With scripts: at least this share of the letters is of one of them. Digits, signs and blanks belong to none.
    min_in_scripts: float = bounded(0.9, low=0.0, high=1.0)
    # Only traces of a game whose engine finds every step and the answer true.
    verified: bool = False
    # Of traces with the same question, steps and answer, only the first in the dataset's order.
    unique: bool = False
    # Of traces whose runs of three words overlap by this share (Jaccard) or more, only the first; null: all of them.
    near_duplicates: float | None = bounded(None, low=0.1, high=1.0)


@dataclass(frozen=True)
class DatasetConfig(Shown):
    """Which traces of the store are trained on."""

    # With the version the key, NAME-VERSION, under which the dataset is kept.
    dataset_name: str
    # A key never means anything else afterwards: for another choice of traces take another version.
    dataset_version: str
    # Equality on meta keys; a list means any of these.
    filters: dict[str, Any] = field(default_factory=dict)
    # These act before the limit.
    curation: CurationConfig = field(default_factory=CurationConfig)
    # At most so many traces; null: all that match.
    limit: int | None = bounded(None, low=1)
    # latest: the youngest first, where all that the run plays is of one moment, the newest; random: drawn by the seed.
    selection_strategy: str = bounded("latest", of=("latest", "random"))
    # What the random strategy draws and orders by; required there.
    seed: int | None = bounded(None, low=0)


PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig(Shown):
    """Two thin matrices beside each projection, trained in its place (arXiv:2106.09685)."""

    # The rank: the inner dimension of the two matrices.
    rank: int = bounded(8, low=1, high=1024)
    # What they add is multiplied by alpha / rank.
    alpha: float = bounded(16.0, low=0.0)
    # Which projections: of the attention query, key, value, output; of the feed-forward gate, up, down.
    projections: list[str] = bounded(low=1, of=PROJECTIONS, make=lambda: list(PROJECTIONS[:4]))


@dataclass(frozen=True)
class TrainingConfig(Shown):
    """How the model is trained."""

    # Who trains: builtin, or tunix, Google's, where it is installed (requirements-tunix.txt).
    trainer: str = bounded("builtin", of=("builtin", "tunix"))
    # Optimizer updates.
    num_steps: int = bounded(100, low=1)
    # Peak of the learning rate: linear warm-up to it, cosine decay to 0.
    learning_rate: float = bounded(1e-5, low=0.0)
    # Updates until the peak; fewer than num_steps.
    warmup_steps: int = bounded(0, low=0)
    # Rows on a device at once, at most; × grad_accum_steps = rows an update, on however many devices.
    per_device_batch_size: int = bounded(2, low=1)
    # An example a row: padded to the longest of all, or, bucketed, to that of its step, which has examples of like
    # length. packed: rows of model.max_length, filled with examples that do not see one another.
    batching: str = bounded("padded", of=("padded", "bucketed", "packed"))
    # Batches that one update is made of: the same update in less memory.
    grad_accum_steps: int = bounded(1, low=1)
    # adamw, or adafactor, which keeps hardly any state beside the weights.
    optimizer: str = bounded("adamw", of=("adamw", "adafactor"))
    # Decoupled weight decay, as in AdamW, of matrices alone.
    weight_decay: float = bounded(0.01, low=0.0)
    # Gradients are scaled down to this global norm.
    max_grad_norm: float = bounded(1.0, low=0.0)
    # Compute each layer twice, the second time for the gradient, so that its activations need not be kept.
    remat: bool = False
    # Train adapters beside the frozen weights; null: train all weights.
    lora: LoraConfig | None = None
    # Of the initial weights (where the model starts from scratch) and of the order of the examples.
    seed: int = bounded(42, low=0)
    # Updates from one line of metrics to the next.
    log_every: int = bounded(10, low=1)
    # Updates from one held-out loss to the next.
    eval_every: int = bounded(50, low=1)
    # Updates from one checkpoint to the next.
    checkpoint_every: int = bounded(50, low=1)


@dataclass(frozen=True)
class ParallelismConfig(Shown):
    """How many devices share the work; results differ only by rounding. data × fsdp × tensor is all that jax sees."""

    # Each has all weights, and its own rows of every batch.
    data: int = bounded(1, low=1)
    # Each has its own rows, and keeps a part of weights and optimizer.
    fsdp: int = bounded(1, low=1)
    # Each computes some of the heads, a part of the feed-forward and of the vocabulary, for the same rows.
    tensor: int = bounded(1, low=1)


ONE_DEVICE = ParallelismConfig()


@dataclass(frozen=True)
class VerdictConfig(Shown):
    """What the report calls a change: a rule that is set before the run."""

    # Significance level of the test: exact McNemar, and where items share groups the clustered t and the sign-flip test
    # over groups as well.
    alpha: float = bounded(0.05, low=0.0001, high=0.5)
    # Smallest change of accuracy that is called one: 0.01 is one percentage point.
    min_effect: float = bounded(0.01, low=0.0, high=1.0)
    # "No detectable change" is said only where a change of detectable_effect (of min_effect, if that is larger)
    # would have given p < alpha with this probability; otherwise the verdict is "underpowered".
    power: float = bounded(0.8, low=0.5, high=0.999)
    # The change of accuracy that is not to be missed: 0.05 is five percentage points.
    detectable_effect: float = bounded(0.05, low=0.001, high=1.0)


@dataclass(frozen=True)
class SamplingConfig(Shown):
    """How the next token is chosen."""

    # 0 takes the likeliest token; above, one is drawn, the more freely the higher.
    temperature: float = bounded(0.0, low=0.0, high=10.0)
    # Draw from the so many likeliest tokens; 0: from all.
    top_k: int = bounded(0, low=0)
    # Draw from the fewest tokens that hold this share of the probability; equally likely ones stay or go together.
    top_p: float = bounded(1.0, low=0.001, high=1.0)
    # Completions of each item; more than one needs a temperature.
    samples: int = bounded(1, low=1, high=1000)
    # Of what is drawn.
    seed: int = bounded(42, low=0, high=2**32 - 1)


@dataclass(frozen=True)
class EvaluationConfig(Shown):
    """Which questions both models answer, and how."""

    # Name of an eval set in evalsets/, without .jsonl, or the path of one.
    eval_set: str = "high_card_duel_v1"
    # Items answered, from the head of the set; null: all.
    limit: int | None = bounded(None, low=1)
    # Items answered at once.
    batch_size: int = bounded(64, low=1)
    # A completion that is not over by then counts as truncated.
    max_new_tokens: int = bounded(256, low=1)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    # Items that each model answers a second time, in another order and batch: where that changes a score, the report
    # says so.
    control_limit: int = bounded(64, low=1)
    verdict: VerdictConfig = field(default_factory=VerdictConfig)


@dataclass(frozen=True)
class Config:
    """A run, whole."""

    # Names the run folder.
    name: str
    dataset: DatasetConfig
    # What is trained on: trace_sft_v1 (reasoning and answer), answer_sft_v1 (the answer alone), or shuffled_answers
    # (reasoning and answer of another trace: a control, which must not win).
    recipe: str = bounded("trace_sft_v1", of=("trace_sft_v1", "answer_sft_v1", "shuffled_answers"))
    # Put before every prompt, in training and evaluation alike.
    system_instruction: str = ""
    traces: TracesConfig = field(default_factory=TracesConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    # Who else is told of a run (docs/tracking.md): tensorboard (event files beside metrics.jsonl, while it trains) and
    # mlflow (when it ends), each from a package of its own: requirements-tensorboard.txt, requirements-mlflow.txt.
    tracking: list[str] = bounded(of=("tensorboard", "mlflow"), make=list)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration of a YAML file, with `a.b=value` overrides applied. Raises RequestError.

    A relative path is looked for from the working directory, then from the repository, so that a notebook
    and the command line name the same file alike.
    """
    tree = load_tree(path)
    for override in overrides:
        _apply(tree, override)
    config = build(Config, tree, str(path))
    _check_together(config, str(path))
    check_size(config, str(path))
    return config


def load_tree(path: str | Path) -> dict[str, Any]:
    """What a YAML file holds, as plain values, the file looked for as above. Raises RequestError."""
    return parse_yaml(_read(_find(Path(path))), str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping as plain values. No tags, aliases, duplicate keys or deep nesting. Raises RequestError."""
    try:
        value = yaml.load(text, _StrictLoader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RequestError(f"{where}:{line}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RequestError(f"{where}: not readable as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise RequestError(f"{where}: expected a mapping of keys to values, got {_kind(value)}")
    return value


def build(kind: type, tree: dict[str, Any], where: str) -> Any:
    """A frozen dataclass from a mapping, every key and type checked. Raises RequestError."""
    return _build(kind, tree, where, "")


def check_size(config: Any, where: str) -> None:
    """Raises RequestError where what a run or a sweep stores of it could not be read again."""
    if (size := len(to_yaml(config).encode())) > MAX_BYTES:
        raise RequestError(
            f"{where}: written out, every item of a list on its own line, it has {size} bytes, and a configuration "
            f"can have {MAX_BYTES}; give shorter lists or texts"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration, whole, as plain values: what a run stores."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The configuration, or a part of it such as a request, as text that reads back as the same values."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def in_line(text: str) -> str:
    """A text as it may stand in a line of YAML and reads back as itself: `Topic`, `"1"`, `""`."""
    plain = yaml.dump([text], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf).strip()
    return text if plain == f"[{text}]" else json.dumps(text, ensure_ascii=False)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases, tags and duplicate keys, and with YAML 1.2's plain scalars."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=self.peek_event().start_mark)
        event = self.peek_event()
        if getattr(event, "tag", None) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="tags and anchors are not read", problem_mark=event.start_mark)
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH}", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def fetch_flow_collection_start(self, kind: type) -> None:
        if self.flow_level >= MAX_DEPTH:  # the scanner would first look for a key in the next thousand
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH}", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(kind)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("null", r"|~|null|Null|NULL", ["", "~", "n", "N"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]:
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


class _Dumper(yaml.SafeDumper):
    """Quotes a text that the loader above would read as something else."""

    yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _build(kind: type, tree: Any, where: str, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise RequestError(f"{where}: {prefix.rstrip('.') or 'the file'}: expected a mapping, got {_kind(tree)}")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in tree:
        if key not in fields:
            raise RequestError(f"{where}: {_unknown(str(key), list(fields), prefix)}")
    hints = get_type_hints(kind)
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in tree:
            raise RequestError(f"{where}: {prefix}{name}: is required")
    return kind(
        **{key: _value(hints[key], value, fields[key].metadata, where, prefix + key) for key, value in tree.items()}
    )


def _value(hint: Any, value: Any, bounds: Any, where: str, key: str) -> Any:
    """The value as its field's type wants it; a whole number serves for a float, nothing else is turned."""
    kinds = get_args(hint) if get_origin(hint) is types.UnionType else (get_origin(hint) or hint,)
    if dataclasses.is_dataclass(kinds[0]) and not (value is None and types.NoneType in kinds):
        return _build(kinds[0], value, where, f"{key}.")
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds:
        expected = " or ".join("null" if kind is types.NoneType else _NAMES[kind] for kind in kinds)
        raise RequestError(f"{where}: {key}: expected {expected}, got {_shown(value)}")
    if isinstance(value, dict):
        _check_filters(value, where, key)
    if get_origin(hint) is list and not bounds:
        _check_items(value, *get_args(hint), where, key)
    if value is not None and bounds:
        _check_bounds(value, bounds, where, key)
    return value


def _check_bounds(value: Any, bounds: Any, where: str, key: str) -> None:
    if isinstance(value, list):
        _check_some(value, bounds, where, key)
    elif bounds["of"] and value not in bounds["of"]:
        choices = ", ".join(repr(choice) for choice in bounds["of"])
        raise RequestError(f"{where}: {key}: expected one of {choices}, got {_shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{where}: {key}: expected a finite number, got {value}")
    if isinstance(value, (int, float)) and not bounds["low"] <= value <= min(bounds["high"], 2**63 - 1):
        low, high = f"{bounds['low']:g}", f"{min(bounds['high'], 2**63 - 1):g}"
        limits = f"at least {low}" if value < bounds["low"] and bounds["high"] == math.inf else f"{low} to {high}"
        raise RequestError(f"{where}: {key}: expected {limits}, got {_shown(value)}")


def _check_some(values: list, bounds: Any, where: str, key: str) -> None:
    twice = len(set(map(str, values))) < len(values)
    if len(values) < bounds["low"] or twice or any(value not in bounds["of"] for value in values):
        choices = ", ".join(repr(choice) for choice in bounds["of"])
        raise RequestError(f"{where}: {key}: expected some of {choices}, each once, got {_shown(values)}")


def _check_items(values: list, kind: type, where: str, key: str) -> None:
    for number, item in enumerate(values):
        if type(item) is not kind:
            raise RequestError(f"{where}: {key}[{number}]: expected {_NAMES[kind]}, got {_shown(item)}")


def _check_filters(filters: dict, where: str, key: str) -> None:
    for name, wanted in filters.items():
        for item in wanted if isinstance(wanted, list) else [wanted]:
            finite = not isinstance(item, float) or math.isfinite(item)
            if not isinstance(name, str) or not isinstance(item, (str, int, float, bool)) or not finite:
                raise RequestError(
                    f"{where}: {key}.{name}: expected a text, a number or a list of these, got {_shown(item)}"
                )


def _check_together(config: Config, where: str) -> None:
    """What no field can tell by itself."""
    for key, name in [
        ("name", config.name),
        ("dataset.dataset_name", config.dataset.dataset_name),
        ("dataset.dataset_version", config.dataset.dataset_version),
    ]:
        if not NAME.fullmatch(name):
            raise RequestError(f"{where}: {key}: expected letters, digits and . _ + -, got {_shown(name)}")
    if config.dataset.selection_strategy == "random" and config.dataset.seed is None:
        raise RequestError(f"{where}: dataset.seed: is required by selection_strategy random")
    if bool(config.traces.game) != bool(config.traces.count):
        raise RequestError(
            f"{where}: traces: game and count go together; give both, or neither to use the store as it is"
        )
    if config.traces.game:
        check_engine(config.traces.engine, config.traces.game, f"{where}: traces.engine")
    if config.evaluation.sampling.samples > 1 and not config.evaluation.sampling.temperature:
        raise RequestError(
            f"{where}: evaluation.sampling.temperature: expected above 0 where samples is more than 1, as the "
            "likeliest completion is always the same one"
        )
    if config.training.warmup_steps >= config.training.num_steps:
        raise RequestError(
            f"{where}: training.warmup_steps: expected less than num_steps, got {config.training.warmup_steps}"
        )
    _check_parallelism(config, where)


def check_engine(engine: str, game: str, where: str) -> None:
    """Raises RequestError where the engine does not play the game."""
    if game not in GAMES[engine]:
        others = [name for name, games in GAMES.items() if game in games]
        instead = f"; take {' or '.join(others)}" if others else ""
        raise RequestError(f"{where}: {engine} plays {' and '.join(GAMES[engine])}, not {_shown(game)}{instead}")


def _check_parallelism(config: Config, where: str) -> None:
    training, parallelism = config.training, config.parallelism
    rows, parts = training.per_device_batch_size * training.grad_accum_steps, parallelism.data * parallelism.fsdp
    if rows % parts:
        raise RequestError(
            f"{where}: parallelism: data × fsdp, {parts}, does not divide the {rows} rows of an update "
            "(training.per_device_batch_size × training.grad_accum_steps); change one of them"
        )
    if training.trainer == "tunix" and parts * parallelism.tensor > 1:
        raise RequestError(f"{where}: training.trainer: tunix trains on one device here; leave out parallelism")


def _apply(tree: dict[str, Any], override: str) -> None:
    """Put the value of one `a.b=value` into the tree; the value is read as YAML."""
    path, found, text = override.partition("=")
    if not found or not path.strip():
        raise RequestError(f"override {override!r}: expected KEY=VALUE, such as training.num_steps=50")
    *parents, last = path.strip().split(".")
    for name in parents:
        if tree.get(name) is None:  # as a stored configuration says of what is left out
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise RequestError(f"override {override!r}: {name} holds a value, not a mapping")
    tree[last] = parse_yaml(f"value: {text}", f"override {override!r}")["value"]


def _find(path: Path) -> Path:
    with suppress(OSError):  # a name longer than a file system takes
        for candidate in (path, repository_root() / path):
            if candidate.is_file():
                return candidate
    known = sorted(file.name for file in (repository_root() / "configs").glob("*.yaml"))
    meant = [f"configs/{name}" for name in known if name == f"{path.stem}.yaml"]
    hint = f"did you mean {meant[0]}?" if meant else f"configs/ holds {', '.join(known) or 'none'}"
    raise RequestError(f"{path}: no such file; {hint}")


def _read(file: Path) -> str:
    if file.stat().st_size > MAX_BYTES:
        raise RequestError(f"{file}: larger than a configuration can be ({MAX_BYTES} bytes)")
    try:
        return file.read_text("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise RequestError(f"{file}: not readable as UTF-8 text ({error})") from None


def _unknown(key: str, known: list[str], prefix: str) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
    return f"{prefix}{key}: no such key; {hint}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _kind(value: Any) -> str:
    return _NAMES.get(type(value), "nothing" if value is None else type(value).__name__)


_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
}
