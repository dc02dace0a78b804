"""Links between the notebooks of the repository, led to where a run has executed them."""

import re

from nbformat import NotebookNode

from lib.experiments.stages import NOTEBOOKS


def linked(notebook: NotebookNode, kind: str) -> NotebookNode:
    """With links between notebooks that lead to the executed notebooks of a run, or (kind `html`) to their pages."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((\w+)\.ipynb\)", lambda link: f"]({_stage_of(link[1])}.{kind})", cell.source)
    return notebook


def _stage_of(notebook: str) -> str:
    """The last stage of a notebook: 04_evaluate is executed twice, and to be read of is the tuned model."""
    return [stage for stage, name in NOTEBOOKS.items() if notebook in (stage, name)][-1]
