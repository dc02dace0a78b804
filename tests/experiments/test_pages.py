"""Every page that is made, of real runs: valid HTML, and usable by anybody, in light and dark, on a desk and a phone.

`make test-pages` runs it: html-validate and axe-core, which it installs with npm into `.venv-pages`, and Chromium.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from inert import browser, static_problems

from lib.__main__ import main

TOOLS = Path(os.environ.get("RETRACE_PAGES_TOOLS", ".venv-pages")).resolve() / "node_modules"
SWEEP = """
name: seeds
base: configs/smoke.yaml
vary: {training.seed: [7, 8]}
"""
MAX_BYTES = 2_000_000
TICK = "for (const tick of document.querySelectorAll('#runs input')) tick.click(); new Promise(setTimeout)"
OPEN = "for (const one of document.querySelectorAll('details')) one.open = true"
AXE = """axe.run(document, {resultTypes: ['violations']}).then(found => found.violations.map(
  one => `${one.id}: ${one.nodes[0].html.slice(0, 200)} (${one.nodes[0].failureSummary})`))"""
SIDEWAYS = "document.documentElement.scrollWidth - innerWidth"

pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All pages of a sweep of two runs, of their comparison, of doing one again, and of two datasets."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "sweep.yaml").write_text(SWEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRACE_HOME", str(folder / "home"))
        assert main(["sweep", str(folder / "sweep.yaml")]) == 0
        one, other = sorted(path.parent.name for path in (folder / "home").glob("*/report.html"))
        assert main(["runs", "compare", one, other, "--output", str(folder / "compared.html")]) == 0
        assert main(["runs", "reproduce", one]) == 0
        assert main(["dataset", "build", "--name", "few", "--version", "v1", "--limit", "50"]) == 0
        assert main(["dataset", "diff", "smoke-v1", "few-v1", "--output", str(folder / "diff.html")]) == 0
        assert main(["runs", "list", "--html"]) == 0
    made = sorted(folder.rglob("*.html"))
    names = {path.stem for path in made}
    assert names >= {"index", "report", "compared", "sweep", "diff", "03_train"} and len(made) == 5 + 2 * 7
    return made


def test_every_page_is_valid_html_of_little_weight_and_asks_for_nothing(pages):
    (pages[0].parent / ".htmlvalidate.json").write_text(
        json.dumps({"extends": ["html-validate:standard"], "root": True})
    )
    command = ["node", str(TOOLS / "html-validate" / "bin" / "html-validate.mjs"), "--formatter", "json"]
    done = subprocess.run([*command, *map(str, pages)], capture_output=True, text=True, cwd=pages[0].parent)
    found = [f"{Path(page['filePath']).name}:{one['line']}: {one['ruleId']}: {one['message']}"
             for page in json.loads(done.stdout) for one in page["messages"]]  # fmt: skip
    assert not found, "\n".join(found[:30])
    assert [problem for page in pages for problem in static_problems(page)] == []
    assert max(page.stat().st_size for page in pages) < MAX_BYTES


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_and_no_page_scrolls_sideways(pages, width, scheme):
    axe = (TOOLS / "axe-core" / "axe.min.js").read_text("utf-8") + "; 0"
    problems = []
    with browser() as opened:
        for page in pages:
            *_, found, sideways = opened.ask(page, [TICK, OPEN, axe, AXE, SIDEWAYS], width, scheme)
            problems += [f"{page.name}: {problem}" for problem in found]
            problems += [f"{page.name}: {sideways} pixels wider than the window"] if sideways > 0 else []
    assert not problems, "\n".join(problems[:20])
