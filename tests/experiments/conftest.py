"""Comparisons of models whose answers are given texts, and notebooks in which one cell is another."""

from collections.abc import Callable
from pathlib import Path

import hostile
import pytest

from lib.evaluation.compare import Comparison


@pytest.fixture(scope="session")
def payloads() -> list[str]:
    return list(hostile.PAYLOADS.values())


@pytest.fixture(scope="session")
def completions(payloads: list[str]) -> set[str]:
    """What the models of `comparison_of` wrote."""
    return {hostile.completion_of(text) for text in payloads}


@pytest.fixture(params=hostile.PAYLOADS.values(), ids=hostile.PAYLOADS)
def payload(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def comparison_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Comparison]:
    """`hostile.comparison` of the given texts."""
    return lambda texts: hostile.comparison(tmp_path_factory.mktemp("outputs"), texts)


@pytest.fixture
def repository_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Let the pipeline find a copy of the notebooks in which one cell has another source."""
    import nbformat

    from lib.experiments import notebooks
    from lib.files import repository_root

    def change(name: str, cell: str, source: str) -> None:
        folder = tmp_path / "repository" / "notebooks"
        folder.mkdir(parents=True)
        for path in (repository_root() / "notebooks").glob("*.ipynb"):
            notebook = nbformat.read(path, as_version=4)
            for found in notebook.cells:
                if (path.stem, found.id) == (name, cell):
                    found.source = source
            nbformat.write(notebook, folder / path.name)
        monkeypatch.setattr(notebooks, "source_of", lambda notebook: folder / f"{notebook}.ipynb")

    return change
