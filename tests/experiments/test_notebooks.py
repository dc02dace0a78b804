"""The committed notebooks are as they should be, wrong parameters start no kernel, and their pages are inert."""

import ast
import os
import re
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from bs4 import BeautifulSoup
from jupyter_client.manager import KernelManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from traitlets.config import Config as TraitletsConfig
from traitlets.config import PyFileConfigLoader

from lib.config import Config, DatasetConfig
from lib.errors import RequestError, RetraceError
from lib.experiments import notebooks
from lib.experiments.links import linked
from lib.experiments.notebooks import Stage, check_parameters, execute
from lib.experiments.pages import render
from lib.experiments.pipeline import STAGES
from lib.experiments.run import create_run
from lib.experiments.stages import NOTEBOOKS, PAGES, find_eval_set, make_traces
from lib.files import repository_root
from lib.model.released import find_released

FOLDER = repository_root() / "notebooks"
EXPLORE = "00_explore"  # for looking around: no part of a run
NAMES = ["01_traces", "02_dataset", "03_train", "04_evaluate", "05_compare"]
MIMES = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/vnd.mermaid"]
MIMES += ["text/plain", "application/javascript", "application/json", "application/vnd.jupyter.widget-view+json"]
METADATA = {"width": "1 onerror=alert(1)", "height": '1" onload="alert(1)', "alt": '"><script>alert(1)</script>'}
METADATA |= {"unconfined": '" onerror="alert(1)', "needs_background": '" onerror="alert(1)', "isolated": True}


def notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook(name).cells if cell.cell_type == "code"]


# ---- as committed -----------------------------------------------------------------------------------------


def test_these_are_the_notebooks_and_the_pipeline_runs_each_of_them():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == [EXPLORE, *NAMES]
    assert {stage.notebook for stage in STAGES} == set(NAMES)


@pytest.mark.parametrize("name", [EXPLORE, *NAMES])
def test_a_notebook_is_valid_and_without_outputs(name):
    nbformat.validate(notebook(name))
    for cell in code_cells(name):
        assert cell.outputs == [] and cell.execution_count is None
    assert notebook(name).metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("name", [EXPLORE, *NAMES])
def test_a_notebook_has_one_parameters_cell_of_plain_values_that_check(name):
    tagged = [cell for cell in notebook(name).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(tagged[0].source).body}
    assert values["run_dir"] == values.get("overrides", "") == values.get("question", "") == ""
    assert (name == EXPLORE) != (values.get("config") == "configs/smoke.yaml")
    check_parameters(FOLDER / f"{name}.ipynb", values)
    # papermill's own inspector must see each of them too, or it would warn and go on
    assert list(papermill.inspect_notebook(FOLDER / f"{name}.ipynb")) == list(values)


@pytest.mark.parametrize("name", [EXPLORE, *NAMES])
def test_a_notebook_narrates_with_calls_and_defines_nothing(name):
    cells = notebook(name).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith(f"# {int(name[:2])} · ")
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id) for cell in cells)
    assert len({cell.id for cell in cells}) == len(cells)
    for cell in code_cells(name):
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda}
        assert len(cell.source.splitlines()) <= 15, cell.id
    assert re.search(r"\.conclu(de|sion)\(", code_cells(name)[-1].source) and cells[-1].cell_type == "code"


@pytest.mark.parametrize("name", [EXPLORE, *NAMES])
def test_links_between_notebooks_lead_somewhere(name):
    text = "\n".join(cell.source for cell in notebook(name).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links and all((FOLDER / link).is_file() for link in links)


def test_the_welcome_page_leads_to_every_notebook_and_only_to_what_is_there():
    links = re.findall(r"\]\(([^)]*)\)", (FOLDER / "Welcome.md").read_text("utf-8"))
    assert {f"{name}.ipynb" for name in [EXPLORE, *NAMES]} <= set(links)
    assert all((FOLDER / link).is_file() for link in links)


@pytest.fixture
def lab() -> TraitletsConfig:
    """What `make lab` is configured with."""
    assert 'JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter" ' in (repository_root() / "Makefile").read_text("utf-8")
    return PyFileConfigLoader("jupyter_lab_config.py", str(repository_root() / ".jupyter")).load_config()


def test_lab_opens_the_repository_on_its_welcome_page(lab):
    assert Path(lab.ServerApp.root_dir) == repository_root()
    assert (repository_root() / lab.LabApp.default_url.removeprefix("/lab/tree/")) == FOLDER / "Welcome.md"


def test_the_kernel_of_lab_is_this_python_and_sees_an_edit(lab, tmp_path):
    kernel = KernelManager(kernel_name="python3", kernel_spec_manager=lab.ServerApp.kernel_spec_manager_class())
    kernel.start_kernel(cwd=str(tmp_path))
    client = kernel.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        seen = []
        for value in (1, 2):
            (tmp_path / "edited.py").write_text(f"value = {value}")
            os.utime(tmp_path / "edited.py", (value, value))
            code = "import sys, edited; sys.executable, edited.value"
            expression = {"now": code.rpartition("; ")[2]}
            reply = client.execute(code.partition("; ")[0], user_expressions=expression, reply=True, timeout=60)
            seen.append(ast.literal_eval(reply["content"]["user_expressions"]["now"]["data"]["text/plain"]))
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert seen == [(sys.executable, 1), (sys.executable, 2)]


# ---- parameters -------------------------------------------------------------------------------------------


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(papermill, "execute_notebook", started)


@pytest.fixture
def run():
    return create_run(Config("toy", DatasetConfig("toy", "v1")))


def files(run) -> list[str]:
    return sorted(path.name for path in run.folder.rglob("*"))


@pytest.mark.parametrize(
    "name, hint",
    [
        ("modle", "did you mean model?"),
        ("overides", "did you mean overrides?"),
        ("x", "known: config, run_dir, overrides, model"),
        ("x=1;import os #", "known: config"),
    ],
)
def test_f15_f40_an_unknown_parameter_is_refused_before_a_kernel_starts(name, hint, run, no_kernel):
    before = files(run)
    with pytest.raises(RequestError) as refused:
        execute(Stage("04_evaluate_before", "04_evaluate", {name: "before"}), run)
    assert f"04_evaluate.ipynb: {name!r}: no such parameter; {hint}" in str(refused.value)
    assert files(run) == before


@pytest.mark.parametrize("value", [7, 1.5, float("nan"), True, None, ["before"]])
def test_f16_a_parameter_of_another_type_is_refused_before_a_kernel_starts(value, run, no_kernel):
    before = files(run)
    with pytest.raises(RequestError, match=f"model: expected str, got {type(value).__name__}"):
        execute(Stage("04_evaluate_before", "04_evaluate", {"model": value}), run)
    assert files(run) == before


def test_f16_a_number_is_asked_for_where_the_notebook_has_one(tmp_path):
    cell = new_code_cell("count = 3\nshare = 0.5", metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "toy.ipynb")
    check_parameters(tmp_path / "toy.ipynb", {"count": 4, "share": 0.25})
    for wrong in ({"count": "hello"}, {"count": float("nan")}, {"count": True}, {"share": "nan"}):
        with pytest.raises(RequestError, match=f"{next(iter(wrong))}: expected (int|float), got"):
            check_parameters(tmp_path / "toy.ipynb", wrong)


def test_a_kernel_has_the_same_home_wherever_it_works(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: seen.append(os.environ["RETRACE_HOME"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETRACE_HOME", "here")
    with pytest.raises(RetraceError, match="ended before its last cell"):
        execute(Stage("04_evaluate_before", "04_evaluate", {"model": "before"}), run)
    assert seen == [str(tmp_path / "here")] and os.environ["RETRACE_HOME"] == "here"


def test_the_checks_above_can_fail(run, no_kernel):
    with pytest.raises(AssertionError, match="a kernel was started"):
        execute(Stage("04_evaluate_before", "04_evaluate", {"model": "before"}), run)


# ---- pages ------------------------------------------------------------------------------------------------


def outputs(text: str) -> list[nbformat.NotebookNode]:
    """The text as every kind of output there is, and in the metadata of images."""
    found = [new_output("stream", name=name, text=text) for name in ("stdout", "stderr")]
    found.append(new_output("error", ename=text, evalue=text, traceback=[text, f"\x1b[31m{text}\x1b[0m"]))
    for mime in MIMES:
        data = {mime: {"model_id": text}, "text/plain": text} if mime.endswith("json") else {mime: text}
        metadata = METADATA | {mime: METADATA | {"title": text}}
        found.append(new_output("display_data", data=data, metadata=metadata))
        found.append(new_output("execute_result", data=data | {"text/plain": text}, metadata=metadata))
    return found


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory, payloads: list[str]) -> BeautifulSoup:
    # nbconvert reads a few kinds of payload differently at the start of a text and within it
    texts = [*payloads, "\n\n".join(payloads), "text " + " ".join(payloads)]
    cells = [new_code_cell(text, outputs=outputs(text), execution_count=1) for text in texts]
    cells += [new_markdown_cell(text) for text in texts]
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": {"x": "<script>alert(1)</script>"}}}
    path = tmp_path_factory.mktemp("pages") / "hostile.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata={"widgets": widgets, "title": texts[0]}), path)
    return BeautifulSoup(render(path), "html.parser")


def test_f41_f42_hostile_outputs_leave_no_script_and_no_handler(hostile_page):
    active = ["script", "iframe", "object", "embed", "link", "base", "form", "svg", "audio", "video", "template"]
    assert not hostile_page.find_all(active)
    for element in hostile_page.find_all(True):
        assert not [name for name in element.attrs if name.startswith("on") or name in ("srcdoc", "formaction")]
    for image in hostile_page.find_all("img"):
        assert set(image.attrs) <= {"src", "alt"} and re.match(r"data:image/(png|jpeg|svg\+xml);base64,", image["src"])
    metas = [meta.get("http-equiv") for meta in hostile_page.find_all("meta") if meta.get("http-equiv")]
    assert metas == ["Content-Security-Policy"] and hostile_page.head.find("meta", attrs={"http-equiv": metas[0]})


def test_f43_hostile_outputs_leave_no_address(hostile_page):
    for element in hostile_page.find_all(True):
        for name, value in element.attrs.items():
            value = " ".join(value) if isinstance(value, list) else value
            if name in ("href", "src", "style", "background", "action", "poster", "srcset", "cite"):
                assert not re.search(r"//|javascript:|url\(", value.partition("base64,")[0]), (element.name, value)
    for style in hostile_page.find_all("style"):
        assert not re.search(r"url\(\s*['\"]?(?!data:)|@import", style.text)


def test_f41_hostile_text_is_still_there_to_be_read(hostile_page):
    shown = hostile_page.get_text()
    # in a code cell, two streams, an error and ten more outputs, at least
    assert shown.count("<img src=x onerror=alert(1)>") > 3 * 14


def test_a_page_keeps_figures_tables_links_to_its_neighbours_and_the_policy(tmp_path):
    from lib.experiments.report import show_table

    table, path = show_table([{"what": "traces", "n": 3}]).data, tmp_path / "page.ipynb"
    image = new_output("display_data", data={"image/png": "iVBORw0KGgo="}, metadata={"image/png": {"alt": "Loss"}})
    cells = [
        new_markdown_cell("Next: [2 · Dataset](02_dataset.ipynb)"),
        new_code_cell("table", outputs=[new_output("execute_result", data={"text/html": table}), image]),
    ]
    nbformat.write(new_notebook(cells=cells), path)
    soup = BeautifulSoup(render(path), "html.parser")
    assert soup.find("img")["alt"] == "Loss" and soup.find("img")["src"] == "data:image/png;base64,iVBORw0KGgo="
    assert [cell.get_text() for cell in soup.select("tbody td")] == ["traces", "3"]
    assert soup.select_one("tbody td:last-child")["style"] == "text-align: right;"
    assert "02_dataset.ipynb" in [link.get("href") for link in soup.find_all("a")]
    policy = soup.head.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert policy.startswith("default-src 'none'; ") and "script-src" not in policy and "http" not in policy


def test_the_page_of_a_run_leads_to_the_other_pages_and_says_where_it_comes_from(run):
    notebook = new_notebook(
        cells=[new_markdown_cell("[2](02_dataset.ipynb) [4](04_evaluate.ipynb)"), new_code_cell("x")]
    )
    nbformat.write(notebook, run.path(".03_train.tmp.ipynb"))
    soup = BeautifulSoup(render(run.path(".03_train.tmp.ipynb"), run), "html.parser")
    assert [link["href"] for link in soup.select(".notebook a")] == ["02_dataset.html", "04_evaluate_after.html"]
    linked = [link["href"] for link in soup.select("nav a")]
    made = {f"{name}.html" for name in ["report", *(stage.name for stage in STAGES)]}
    assert set(linked) == made - {"03_train.html"} and soup.select_one("[aria-current]").get_text() == "3 · Train"
    foot = soup.footer.get_text()
    assert run.name in foot and run.state["run_id"] in foot and f"runs reproduce {run.name}" in foot
    assert soup.select_one("details.code pre").get_text().strip() == "x" and not soup.select("details[open]")


@pytest.mark.parametrize("kind", ["ipynb", "html"])
def test_a_link_to_a_notebook_that_no_run_executes_stays_as_it_is(kind):
    text = "[0 · Explore](00_explore.ipynb) [mine](mine.ipynb)"
    [cell] = linked(new_notebook(cells=[new_markdown_cell(text)]), kind).cells
    assert cell.source == text


def test_the_stages_of_a_report_are_those_of_the_pipeline():
    assert {stage.name: stage.notebook for stage in STAGES} == NOTEBOOKS
    assert [name for name, _ in PAGES] == ["report", *NOTEBOOKS]


def test_what_can_be_moved_stands_still_in_a_page(tmp_path):
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/html": "<b>still</b><img src=x>"}
    cell = new_code_cell("view", outputs=[new_output("display_data", data=view)])
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "page.ipynb")
    soup = BeautifulSoup(render(tmp_path / "page.ipynb"), "html.parser")
    assert soup.select_one(".scroll b").text == "still" and not soup.find("img")


@pytest.mark.parametrize("name", [EXPLORE, *NAMES])
def test_f43_the_page_of_a_committed_notebook_has_no_script_and_no_address(name):
    soup = BeautifulSoup(render(Path(FOLDER / f"{name}.ipynb")), "html.parser")
    assert not soup.find_all(["script", "iframe", "link", "base"]) and soup.find("h1")
    assert not [tag for tag in soup.find_all(["a", "img"]) if "//" in (tag.get("href") or tag.get("src") or "")]


def test_an_empty_store_is_told_of_where_no_game_is_asked_for(home):
    with pytest.raises(RequestError, match="holds no trace, and traces.game asks for none"):
        make_traces(Config("toy", DatasetConfig("toy", "v1")))
    assert not home.exists()


def test_a_bar_that_was_switched_off_is_off_in_kernels_on_a_terminal_too(monkeypatch):
    monkeypatch.setattr(notebooks, "terminal", lambda: "/dev/tty")
    with notebooks._kernel_environment():
        assert os.environ["RETRACE_PROGRESS"] == ""  # as -q sets it
    monkeypatch.delenv("RETRACE_PROGRESS")
    with notebooks._kernel_environment():
        assert os.environ["RETRACE_PROGRESS"] == "/dev/tty"


def test_a_relative_path_leads_from_where_the_run_was_started_in_its_kernels_too(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_bytes((repository_root() / "evalsets" / "eval_v1.jsonl").read_bytes())
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    with notebooks._kernel_environment():
        monkeypatch.chdir(repository_root() / "notebooks")  # as papermill does
        assert find_eval_set("mine.jsonl").name == "mine"
        assert find_released("weights") == tmp_path / "weights"
    with pytest.raises(RequestError, match="no such file"):
        find_eval_set("mine.jsonl")
