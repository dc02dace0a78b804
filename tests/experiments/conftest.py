"""Hostile texts, and evaluation outputs that hold them in every field."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.config import VerdictConfig
from lib.evaluation.compare import Comparison, compare, read_results
from lib.tasks import high_card_duel

PAYLOADS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><script>alert(1)</script></svg>",
    '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    "</pre></details></main><script>alert(1)</script>",
    "</title></style></textarea><script>alert(1)</script>",
    "<!-- <script>alert(1)</script> -->",
    "--><script>alert(1)</script><!--",
    "]]><script>alert(1)</script>",
    '<a href="javascript:alert(1)">x</a>',
    '<meta http-equiv="refresh" content="0;url=https://evil.example/">',
    '<base href="https://evil.example/"><link rel=stylesheet href="//evil.example/x.css">',
    "<style>@import url(https://evil.example/x.css)</style>",
    '<div style="background-color: url(https://evil.example/x.png)">x</div>',
    "[x](javascript:alert(1))",
    "![x](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "[x][1]\n\n[1]: https://evil.example/\n\nnote[^1]\n\n[^1]: note",
    "<https://evil.example/> https://evil.example/ www.evil.example evil.example",
    "me@evil.example mailto:me@evil.example ftp://evil.example/ //evil.example",
    "```\n<script>alert(1)</script>\n```",
    "~~~\n# out of the fence\n~~~",
    "`" * 3 + "\n# out\n" + "`" * 10 + "\n<script>alert(1)</script>\n" + "`" * 40,
    "one `code` and ``more`` **bold** __bold__ *it* _it_ ~~gone~~ \\` \\",
    "# A heading\n\nAnother\n=======\n\n- a list\n\n> a quote\n\n    code\n\n***",
    "| a | b |\n|---|---|\n| \\| | c |",
    "a|b\\|c",
    "$$\n\\frac{1}{2\n$$ $\\bad$ \\(x\\) \\[x\\] $a and $b",
    "$\\bad$ costs $5 or $6",
    "{{ 7 * 7 }} {% raw %} {# x #} ${7*7}",
    "&lt;script&gt; &amp; &#60;script&#62; &nbsp;",
    "bell \x07 escape \x1b[31m red \x85 next \u2028 line \u202e right-to-left",
]


@pytest.fixture(scope="session")
def payloads() -> list[str]:
    return PAYLOADS


@pytest.fixture(scope="session")
def completions(payloads: list[str]) -> set[str]:
    """What the models of `comparison_of` wrote."""
    return {completion_of(text) for text in payloads}


@pytest.fixture(params=PAYLOADS, ids=range(len(PAYLOADS)))
def payload(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def comparison_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Comparison]:
    """A comparison in which each text is every field of one item that was fixed and one that broke.

    It is their reasoning, too, so the right ones are right for the wrong reasons; the first text also names the
    models and the eval set.
    """

    def build(texts: list[str]) -> Comparison:
        folder = tmp_path_factory.mktemp("outputs")
        sides = {"before": ("wrong", "correct"), "after": ("correct", "wrong")}
        for name, verdicts in sides.items():
            lines = [_line(text, number, verdict, texts[0], name) for text in texts
                     for number, verdict in enumerate(verdicts)]  # fmt: skip
            (folder / name).write_text("\n".join(map(json.dumps, lines)))
        return compare(*(read_results(folder / name) for name in sides), VerdictConfig())

    return build


def _line(text: str, number: int, verdict: str, model: str, side: str) -> dict:
    meta = {
        "model": f"{model}{side}", "weights_sha256": model, "eval_set": model, "eval_set_sha256": model,
        "eval_id": f"{text}{number}", "category": text, "expected_answer": text, "task": high_card_duel.NAME,
        "state": high_card_duel.state_of(high_card_duel.deal(0)),
    }  # fmt: skip
    completion = completion_of(text)
    record = {"prompt": text, "completion": completion, "final_answer": text, "verdict": verdict, "num_tokens": 1}
    return record | {"meta": meta}


def completion_of(text: str) -> str:
    return f"Reasoning:\n1. {text}" if text.strip() else text


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
        monkeypatch.setattr(notebooks, "repository_root", lambda: folder.parent)

    return change
