"""An executed notebook as a page that can be trusted with whatever stands in a trace.

    render(Path("02_dataset.ipynb"), run)       # '<!DOCTYPE html>…', with links to the other pages of the run

nbconvert makes it, and of the outputs bleach leaves plain markup alone.
"""

import re
from functools import cache
from pathlib import Path

import bleach
import nbformat
from bleach.css_sanitizer import CSSSanitizer
from markupsafe import Markup, escape
from nbconvert import HTMLExporter

from lib.experiments.links import linked
from lib.experiments.markdown import printable
from lib.experiments.report import frame_of
from lib.experiments.run import Run
from lib.experiments.stages import PAGES, provenance_of

# What the rendered page may hold of Markdown and HTML in a notebook; anything else is shown as text.
TAGS = """a b blockquote br code dd details div dl dt em h1 h2 h3 h4 h5 h6 hr i li ol p pre small span strong sub
summary sup table tbody td th thead tr ul""".split()
STYLES = """background-color border border-collapse border-radius color font-family font-size font-weight line-height
margin max-width opacity overflow-wrap padding table-layout text-align vertical-align white-space width""".split()


def render(notebook: Path, run: Run | None = None) -> str:
    """The notebook as one page that runs no script, loads nothing, and keeps only plain markup of its outputs.

    Of a `run`, the page leads to its other pages, and says where it comes from.
    """
    content, name = nbformat.read(notebook, as_version=4), notebook.name.removeprefix(".").partition(".")[0]
    frame = frame_of(name, PAGES, provenance_of(run) if run else None)
    about = {"metadata": {"name": frame.title}, "frame": frame}
    page, _ = _exporter().from_notebook_node(linked(content, "html") if run else content, about)
    return page


@cache
def _exporter() -> HTMLExporter:
    """One for all pages, as it takes longer to come up than to write one."""
    return HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(Path(__file__).parent / "templates")],
        sanitize_html=True,
        exclude_anchor_links=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"clean_html": _plain_markup, "ansi2html": _plain_text},
    )


def _plain_text(printed: str) -> Markup:
    """What was printed, without its colours; whatever else a terminal would obey is shown.

    nbconvert's own filter raises at a colour that breaks off, so a trace that holds one would fail the run.
    """
    return escape(printable(re.sub(r"\x1b\[[\d;]*m", "", printed)))


def _plain_markup(html: str) -> str:
    styles = CSSSanitizer(allowed_css_properties=STYLES)
    return bleach.clean(html, tags=TAGS, attributes=_keeps, css_sanitizer=styles)


def _keeps(tag: str, attribute: str, value: str) -> bool:
    """A link leads to a file beside the page or to a place in it; a style calls no function, so it names no URL."""
    if attribute == "href":
        return tag == "a" and bool(re.fullmatch(r"[\w.-]*(#.*)?", value))
    if attribute == "scope":
        return tag == "th" and value in ("row", "col")
    return attribute == "class" or attribute == "style" and "(" not in value
