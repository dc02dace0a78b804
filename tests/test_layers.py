"""The shape of the house, held over the syntax trees: who may import whom, and no configuration that nothing reads.

experiments → evaluation, training → model, data → tasks → trace, config, files, errors, progress, cards
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from lib.files import repository_root

LAYERS = [
    {"trace", "config", "files", "errors", "progress", "cards"},
    {"tasks"},
    {"data", "model"},
    {"training", "evaluation"},
    {"experiments"},
    {"commands"},
    {"__main__"},
]
BESIDE = {("model", "data")}  # a model's folder holds its tokenizer
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
OPTIONAL = {"transformers", "torch", "tunix", "ungar", "lm_eval", "reasoning_gym", "submitit", "tensorboardX", "mlflow"}
WITHOUT_JAX = {"trace", "config", "files", "errors", "progress", "cards", "experiments.report", "experiments.figures"}
WITHOUT_JAX |= {"experiments.dataset_card", "experiments.dataset_diff"}
WITHOUT_JAX |= {"experiments.trials"}
WITHOUT_JAX |= {
    f"evaluation.{name}"
    for name in (
        "scoring",
        "numbers",
        "statistics",
        "verdict",
        "metrics",
        "evalsets",
        "leaks",
        "results",
        "compare",
        "reasoning_gym_items",
    )
}


class Import(NamedTuple):
    """A module that is named in an import statement; at_start where it runs when the importer is imported."""

    name: str
    at_start: bool


@cache
def imports(source: str) -> list[Import]:
    return list(_imports(ast.parse(source), at_start=True))


def _imports(node: ast.AST, at_start: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_start) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            # `from lib.tasks import high_card_duel` names a module or a value: both are tried.
            assert child.level == 0, "relative imports hide what they name"
            yield Import(child.module, at_start)
            yield from (Import(f"{child.module}.{alias.name}", at_start) for alias in child.names)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, at_start and not inside)


def sources() -> dict[str, str]:
    """`data.store` → its text, for every module of lib; a package's `__init__` goes by the package's name."""
    folder = repository_root() / "lib"
    return {_module(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))}


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix("__init__").rstrip(".")


SOURCES = sources()


@cache
def ours(source: str, at_start: bool = False) -> set[str]:
    """The modules of lib that a source imports, their packages among them."""
    named = {found.name for found in imports(source) if found.at_start or not at_start}
    modules = {name.removeprefix("lib.") for name in named if name.startswith("lib.")} & SOURCES.keys()
    return modules | {name.rpartition(".")[0] for name in modules} - {""}


@cache
def roots(source: str, at_start: bool = False) -> set[str]:
    return {found.name.partition(".")[0] for found in imports(source) if found.at_start or not at_start}


def layer(module: str) -> int:
    [number] = [number for number, names in enumerate(LAYERS) if module.partition(".")[0] in names]
    return number


def upward(module: str, source: str) -> set[str]:
    """What a module imports and may not."""
    return {name for name in ours(source) if not allowed(module.partition(".")[0], name.partition(".")[0])}


def allowed(own: str, other: str) -> bool:
    if own == other or (own, other) in BESIDE:
        return True
    return layer(other) < layer(own) or layer(other) == layer(own) == 0


def reaches(module: str, wanted: set[str]) -> set[str]:
    """The modules through which importing `module` would import one of `wanted`."""
    seen, found, todo = set(), set(), {module}
    while todo:
        name = todo.pop()
        seen.add(name)
        if roots(SOURCES[name], at_start=True) & wanted:
            found.add(name)
        todo |= ours(SOURCES[name], at_start=True) - seen
    return found


def test_the_checks_themselves_find_what_they_look_for():
    source = "import jax.numpy as jnp\ndef f():\n    from lib.experiments import report\nif True:\n    import torch"
    assert Import("jax.numpy", True) in imports(source) and Import("torch", True) in imports(source)
    assert Import("lib.experiments.report", False) in imports(source)
    assert roots(source, at_start=True) == {"jax", "torch"}
    assert upward("data.store", "from lib.training import loop\nfrom lib.trace import Trace") == {
        "training",
        "training.loop",
    }
    assert upward("data.store", "from lib.model.weights import Model") == {"model", "model.weights"}
    assert upward("trace", "from lib.errors import X\nfrom lib.tasks import TASKS") == {"tasks"}
    assert not upward("model.weights", "from lib.data.tokenizer import Tokenizer\nfrom lib.model.gemma import Gemma")
    assert reaches("training.loop", JAX) >= {"training.loop", "model.gemma"}


@pytest.mark.parametrize("module", [name for name in SOURCES if name])
def test_every_module_imports_only_what_lies_below_it(module: str):
    assert upward(module, SOURCES[module]) == set()


def test_no_module_imports_itself_by_a_detour():
    below = {name: ours(source) - {name.rpartition(".")[0], name} for name, source in SOURCES.items() if name}
    while leaves := {name for name, imported in below.items() if not imported & below.keys()}:
        below = {name: imported for name, imported in below.items() if name not in leaves}
    assert below == {}


def without_jax() -> list[str]:
    own = {name for name in SOURCES if name.partition(".")[0] in ("tasks", "data") and name != "data.batches"}
    return sorted((own | WITHOUT_JAX) & SOURCES.keys())


@pytest.mark.parametrize("module", without_jax())
def test_what_needs_no_arrays_never_imports_jax(module: str):
    assert not roots(SOURCES[module]) & JAX
    assert reaches(module, JAX) == set()


def test_what_needs_no_arrays_starts_without_jax_for_real():
    program = f"import sys\nfor name in {without_jax()}:\n    __import__('lib.' + name)\nprint('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=repository_root(), capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


def test_papermill_has_one_door():
    users = {name for name, source in SOURCES.items() if "papermill" in roots(source)}
    assert len(users) <= 1 and all(name.startswith("experiments.") for name in users)


def test_widgets_are_for_exploring_alone():
    assert {name for name, source in SOURCES.items() if "ipywidgets" in roots(source)} == {"experiments.explore"}
    assert not [name for name, source in SOURCES.items() if "experiments.explore" in ours(source)]


@pytest.mark.parametrize("module", SOURCES)
def test_optional_packages_are_never_needed_at_the_start(module: str):
    assert not roots(SOURCES[module], at_start=True) & OPTIONAL


def config_fields() -> list[str]:
    """`TrainingConfig.num_steps`, …"""
    classes = [node for node in ast.parse(SOURCES["config"]).body if isinstance(node, ast.ClassDef)]
    return [
        f"{kind.name}.{item.target.id}"
        for kind in classes
        if any("dataclass" in ast.unparse(mark) for mark in kind.decorator_list)
        for item in kind.body
        if isinstance(item, ast.AnnAssign)
    ]


# How each section is called where it is read: from the whole configuration, or as an argument by itself.
CALLED = {
    "Config": ("config",),
    "ModelConfig": ("config.model",),
    "TracesConfig": ("config.traces", "asked"),
    "DatasetConfig": ("config.dataset", "request"),
    "CurationConfig": ("request.curation", "rule"),
    "TrainingConfig": ("config.training", "training", "config"),
    "LoraConfig": ("model.lora", "config"),
    "ParallelismConfig": ("config.parallelism", "parallelism"),
    "EvaluationConfig": ("config.evaluation", "config"),
    "SamplingConfig": ("config.sampling", "sampling"),
    "VerdictConfig": ("rule",),
}


def reads(field: str) -> list[str]:
    """`TrainingConfig.seed` → `.config.training.seed`, `.training.seed` and `.config.seed`: how it may be read."""
    kind, _, name = field.partition(".")
    return [f".{called}.{name}" for called in CALLED[kind]]


@cache
def read_attributes() -> set[str]:
    """`.run.config.training.seed`, …: whatever is read of something, with all that stands before it."""
    trees = [ast.parse(source) for name, source in SOURCES.items() if name != "config"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {f".{ast.unparse(node)}" for node in found}


def test_the_fields_of_the_configuration_are_found():
    assert {"TrainingConfig.num_steps", "DatasetConfig.filters", "Config.recipe"} <= set(config_fields())


def test_what_reads_one_field_of_the_configuration_reads_no_other():
    every = [read for field in config_fields() for read in reads(field)]
    assert len(every) == len(set(every))


@pytest.mark.parametrize("field", config_fields())
def test_every_field_of_the_configuration_is_read_somewhere(field: str):
    assert [found for found in read_attributes() if found.endswith(tuple(reads(field)))]
