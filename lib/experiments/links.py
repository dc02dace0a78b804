"""Links between the notebooks of the repository, led to where a run has executed them."""

import re

from nbformat import NotebookNode

from lib.experiments.stages import NOTEBOOKS


def linked(notebook: NotebookNode, kind: str) -> NotebookNode:
    """With links between notebooks that lead to the executed notebooks of a run, or (kind `html`) to their pages.

    A link to a notebook that no run executes stays as it is.
    """
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((\w+)\.ipynb\)", lambda link: _led(link, kind), cell.source)
    return notebook


def _led(link: re.Match[str], kind: str) -> str:
    """To the last stage of a notebook: 04_evaluate is executed twice, and to be read of is the tuned model."""
    stages = [stage for stage, name in NOTEBOOKS.items() if link[1] in (stage, name)]
    return f"]({stages[-1]}.{kind})" if stages else link[0]
