"""Whether a page does nothing: read by an HTML parser, and opened in Chromium, where every address is watched.

    assert_inert([run / "report.html", run / "01_traces.html"])

A page passes when it holds no element, attribute, address or style sheet that acts or loads, no script but that of
the table of runs as it stands in the repository, a policy that forbids all others and the network, and when a browser,
with that policy and without it, asks for nothing, opens nothing and keeps title and address, whatever in the page is
clicked and waited for. Any host name leads the browser to a server of our own, so nothing leaves this machine. Needs
Chromium (`apt-get install chromium`); without it the test that asks is skipped.
"""

import json
import os
import re
import shutil
import socketserver
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tinycss2
import websocket
from bs4 import BeautifulSoup, Tag

from lib.experiments.index import script

BINARIES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-extensions --disable-default-apps --disable-dev-shm-usage
--metrics-recording-only --autoplay-policy=no-user-gesture-required --remote-debugging-port=0""".split()
# Where a browser calls by itself, for updates and the time: nowhere, so that whoever calls us was sent by a page.
OWN_CALLS = ("google.com", "googleapis.com", "gstatic.com", "gvt1.com", "googleusercontent.com")
SECONDS = 20  # until an answer of the browser is given up
PATIENCE_MS = 1500  # of the page's time, in which whatever waits there may happen

TAGS = """html head meta title style body main header nav section article footer h1 h2 h3 h4 h5 h6 p pre code kbd br hr
a abbr b bdi blockquote del details dd div dl dt em figcaption figure i img ins li mark ol q s small span strong sub
summary sup table tbody td tfoot th thead time tr ul label input button""".split()
# What matplotlib writes, and our own drawings.
SVG_TAGS = """svg metadata rdf:rdf cc:work cc:agent dc:type dc:date dc:format dc:creator dc:title defs style clippath
g path rect circle use text tspan""".split()
ATTRIBUTES = """class id style href src alt role lang charset content name http-equiv type title colspan rowspan scope
start open datetime dir width height tabindex for hidden autocomplete""".split()
OWN = script()
GRANTS = {
    "default-src": {"'none'"},
    "base-uri": {"'none'"},
    "form-action": {"'none'"},
    "script-src": {"'none'", f"'sha256-{OWN.sha256}'"},
}
GRANTS |= {"style-src": {"'unsafe-inline'"}, "img-src": {"data:"}, "font-src": {"data:"}}
REQUIRED = ("default-src", "base-uri", "form-action")
POLICY = re.compile(r"<meta[^>]*Content-Security-Policy[^>]*>", re.IGNORECASE)


class Element(NamedTuple):
    """An element as a parser saw it, `within` the names of its ancestors, all in lower case."""

    tag: str
    attributes: dict[str, str]
    within: frozenset[str]


class Visit(NamedTuple):
    """What a page did when it was opened, and what it held in the end."""

    acts: list[str]
    text: str
    elements: list[Element]


def letters(text: str) -> str:
    """What there is to see of a text: a browser puts a blank for a control character in a title, and joins blanks."""
    return "".join(letter for letter in text if letter.isprintable() and not letter.isspace())


def assert_inert(pages: Iterable[Path], policy: bool = True) -> dict[Path, str]:
    """Fail, naming each page and what it could do or did; `policy` asks each for a Content-Security-Policy.

    Returns what a reader sees of each.
    """
    found: dict[str, list[str]] = {}
    texts: dict[Path, str] = {}
    with browser() as opened:
        for page in pages:
            problems = static_problems(page, policy)
            for visit in (opened.visit(page), opened.visit_without_policy(page)):
                problems += visit.acts + element_problems(visit.elements)
                texts[page] = visit.text
            if problems:
                found[str(page)] = sorted(set(problems))
        if opened.reached:
            found["all pages"] = [f"reached {text}" for text in opened.reached]
    assert not found, "\n".join(f"{page}: {problem}" for page, list_ in found.items() for problem in list_[:20])
    return texts


# ---- read by a parser -------------------------------------------------------------------------------------


def static_problems(page: Path, policy: bool = True) -> list[str]:
    """What an HTML parser finds in a page that acts, loads or leads away."""
    soup = _parsed(page.read_text())
    problems = element_problems(_element(tag) for tag in soup.find_all(True))
    for style in soup.find_all("style"):
        problems += css_problems(style.get_text())
    return problems + (policy_problems(soup) if policy else [])


def element_problems(elements: Iterable[Element]) -> list[str]:
    return [problem for element in elements for problem in _element_problems(element)]


@lru_cache
def css_problems(sheet: str) -> list[str]:
    """Whatever a style sheet, or the declarations of a `style`, would load: but for data and places in the page."""
    return [f"style loads {address[:80]}" for address in _addresses(tinycss2.parse_component_value_list(sheet))
            if not address.startswith(("data:", "#"))]  # fmt: skip


def policy_problems(soup: BeautifulSoup) -> list[str]:
    """Whether the head begins with a policy that grants no script and no network."""
    head = soup.head.find_all(True) if soup.head else []
    place = next((i for i, tag in enumerate(head) if tag.get("http-equiv") == "Content-Security-Policy"), None)
    if place is None or {tag.name for tag in head[:place]} - {"meta", "title"}:
        return ["no Content-Security-Policy before what it should govern"]
    rules = [rule.split() for rule in head[place]["content"].split(";") if rule.strip()]
    problems = [f"the policy lacks {name}" for name in REQUIRED if name not in [rule[0] for rule in rules]]
    return problems + [f"the policy grants {' '.join(rule)}" for rule in rules
                       if not set(rule[1:]) <= GRANTS.get(rule[0], set())]  # fmt: skip


@lru_cache(maxsize=1)  # each page is asked for three times in a row
def _parsed(text: str) -> BeautifulSoup:
    return BeautifulSoup(text, "html.parser")


def _element(tag: Tag) -> Element:
    attributes = {name: " ".join(value) if isinstance(value, list) else value for name, value in tag.attrs.items()}
    attributes |= {"text": tag.get_text()} if tag.name == "script" else {}
    return Element(tag.name.lower(), attributes, frozenset(parent.name.lower() for parent in tag.parents))


def _element_problems(element: Element) -> Iterator[str]:
    tag, attributes, within = element
    if tag == "script" and attributes == {"text": OWN.text}:
        return
    drawn = tag == "svg" or "svg" in within
    if tag not in (SVG_TAGS if drawn else TAGS):
        yield f"<{tag}>"
    if tag == "meta" and not _harmless_meta(attributes):
        yield f"<meta {attributes}>"
    for name, value in attributes.items():
        if name.lower().startswith("on") or not drawn and not _known(name):
            yield f"<{tag} {name}={value[:80]!r}>"
        elif not _harmless(tag, name, value, drawn):
            yield f"<{tag} {name}={value[:80]!r}> is an address or loads one"


def _known(name: str) -> bool:
    return name in ATTRIBUTES or name.startswith(("aria-", "data-"))


def _harmless_meta(attributes: dict[str, str]) -> bool:
    return (
        attributes.keys() <= {"charset"}
        or attributes.get("name") in ("viewport", "color-scheme", "description")
        or attributes.get("http-equiv") == "Content-Security-Policy"
    )


def _harmless(tag: str, name: str, value: str, drawn: bool) -> bool:
    """Whether an attribute's value leads only to a file beside the page, or to a place in it."""
    if name in ("href", "xlink:href", "src"):
        if tag == "a" and not drawn:
            return bool(re.fullmatch(r"(?![/\\])[\w./+~%-]*(#.*)?", value, re.ASCII | re.DOTALL))
        if tag == "img":
            return bool(re.match(r"data:image/(png|jpeg|svg\+xml);base64,", value))
        return tag == "use" and value.startswith("#")
    if drawn and (name.startswith("xmlns") or name == "rdf:resource"):  # names that nothing loads
        return True
    return name not in ("style", "clip-path", "fill", "stroke", "filter", "mask") or not css_problems(value)


def _addresses(values: Iterable[Any]) -> Iterator[str]:
    """Every address in CSS, however it is written: `url(x)`, `url("x")`, `@import "x"`, `image-set("x" 1x)`."""
    importing = False
    for value in values:
        if value.type == "url":
            yield value.value
        elif value.type == "function" and value.lower_name in ("url", "src", "image-set", "-webkit-image-set"):
            yield from (inner.value for inner in value.arguments if inner.type == "string")
        elif value.type == "function" and value.lower_name in ("expression", "image", "element", "paint"):
            yield value.lower_name
        elif value.type == "at-keyword":
            importing = value.lower_value == "import"
        elif value.type == "string" and importing:
            yield value.value
        elif value.type == "literal" and value.value == ";":
            importing = False
        yield from _addresses(getattr(value, "content", None) or getattr(value, "arguments", None) or [])


# ---- opened in a browser ----------------------------------------------------------------------------------

# Everything that a reader could do to a page, but for following its links to its neighbours.
POKE = """
(function poke(page) {
  for (const element of page.querySelectorAll('*')) {
    if (element.contentDocument) poke(element.contentDocument)
    if (element.localName === 'a' && element.protocol === 'file:') continue
    for (const kind of ['mouseover', 'mouseenter', 'mousemove', 'click', 'dblclick', 'contextmenu'])
      element.dispatchEvent(new MouseEvent(kind, {cancelable: true}))
    for (const kind of ['focus', 'blur', 'input', 'toggle', 'scroll', 'wheel', 'keydown', 'copy', 'select'])
      element.dispatchEvent(new Event(kind))
  }
})(document)
"""
SEE = """
for (const element of document.querySelectorAll('details')) element.open = true
const elements = [...document.querySelectorAll('*')]
const places = new Map(elements.map((element, place) => [element, place]))
const seen = elements.map(element => [
  element.tagName.toLowerCase(), Object.fromEntries([
    ...[...element.attributes].map(one => [one.name, one.value]),
    ...element.tagName === 'SCRIPT' ? [['text', element.text]] : []]),
  places.get(element.parentElement) ?? -1])
JSON.stringify({title: document.title, address: location.href, text: document.body?.innerText ?? '', seen})
"""
LOADED = "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', () => done()))"


@contextmanager
def browser() -> Iterator["Browser"]:
    """Chromium without a window, and the server that every address leads to, for as long as the block runs."""
    with _canary() as canary, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [_binary(), *FLAGS, f"--user-data-dir={folder}/profile", _rules(canary), "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield Browser(_socket(Path(folder, "profile", "DevToolsActivePort"), process), canary, Path(folder))
        finally:
            process.terminate()
            process.wait(SECONDS)


class _Restless(Exception):
    """A page that keeps the browser busy, or went away while it was looked at."""


class Browser:
    """Pages opened one after the other, each in a tab of its own, over the DevTools protocol."""

    def __init__(self, socket: websocket.WebSocket, canary: "_Canary", folder: Path):
        self._socket, self._folder, self.reached = socket, folder, canary.received
        self._sent, self._events = 0, []
        self._blank = folder / "blank.html"  # of a file, as the pages are: going there changes no process
        self._blank.write_text("<!DOCTYPE html><title></title>")

    def visit(self, page: Path) -> Visit:
        """Open the page, wait, poke everything in it, wait again, and tell what it did."""
        title = _parsed(page.read_text()).title
        return self._visit(page, title.get_text() if title else "")

    def visit_without_policy(self, page: Path) -> Visit:
        """The same with the policy taken out: what is escaped must not need it."""
        title = _parsed(page.read_text()).title
        bare = self._folder / page.name
        bare.write_text(POLICY.sub("", page.read_text()))
        return self._visit(bare, title.get_text() if title else "")

    def ask(self, page: Path, expressions: Iterable[str], width: int = 1280, scheme: str = "light") -> list[Any]:
        """Open the page and evaluate one expression after the other in it, waiting for each; their values.

        Whatever the page writes to the console fails.
        """
        target = self._call("Target.createTarget", url=self._blank.as_uri())["targetId"]
        tab = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._events = []
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable", tab)
        self._call(
            "Emulation.setDeviceMetricsOverride", tab, width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", tab, features=features)
        self._call("Page.navigate", tab, url=page.as_uri())
        answers = [self._call("Runtime.evaluate", tab, expression=one, awaitPromise=True, returnByValue=True)
                   for one in (LOADED, *expressions)]  # fmt: skip
        self._call("Target.closeTarget", targetId=target)
        loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        said = [event["params"] for event in self._events if event["method"] in loud]
        said += [answer["exceptionDetails"] for answer in answers if "exceptionDetails" in answer]
        assert not said, said[0]
        return [answer["result"].get("value") for answer in answers[1:]]

    def _visit(self, page: Path, title: str) -> Visit:
        self._events, before = [], len(self.reached)
        target = self._call("Target.createTarget", url=self._blank.as_uri())["targetId"]
        try:
            seen = self._look(page, self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
            acts = list(self._acts(page, title, seen))
        except _Restless as error:
            seen, acts = {"text": "", "seen": []}, [f"the page did not come to rest: {error}"]
        self._call("Target.closeTarget", targetId=target)
        return Visit(acts + [f"reached {words}" for words in self.reached[before:]], seen["text"],
                     _elements(seen["seen"]))  # fmt: skip

    def _look(self, page: Path, tab: str) -> dict[str, Any]:
        for domain in ("Page", "Network", "Runtime"):
            self._call(f"{domain}.enable", tab)
        self._call("Page.navigate", tab, url=page.as_uri())
        self._wait("Page.loadEventFired")
        self._pass_time(tab)
        self._call("Runtime.evaluate", tab, expression=POKE)
        self._pass_time(tab)
        answer = self._call("Runtime.evaluate", tab, expression=SEE)["result"]
        if "value" not in answer:
            raise _Restless(str(answer)[:200])
        return json.loads(answer["value"])

    def _acts(self, page: Path, title: str, seen: dict[str, Any]) -> Iterator[str]:
        if letters(seen["title"]) != letters(title):
            yield f"the title became {seen['title'][:80]!r}"
        if seen["address"] != page.as_uri():
            yield f"the address became {seen['address'][:80]}"
        for event in self._events:
            if event["method"] == "Page.javascriptDialogOpening":
                yield f"opened a dialog: {event['params']['message'][:80]!r}"
            elif event["method"] == "Network.requestWillBeSent":
                address = event["params"]["request"]["url"]
                if address != page.as_uri() and not address.startswith("data:image/"):
                    yield f"asked for {address[:80]}"
            elif event["method"] in ("Network.webSocketCreated", "Page.windowOpen", "Page.downloadWillBegin"):
                yield f"{event['method']}: {event['params'].get('url', '')[:80]}"

    def _pass_time(self, tab: str) -> None:
        self._call("Emulation.setVirtualTimePolicy", tab, policy="pauseIfNetworkFetchesPending", budget=PATIENCE_MS)
        self._wait("Emulation.virtualTimeBudgetExpired")

    def _call(self, method: str, tab: str = "", **params: Any) -> dict[str, Any]:
        sent = self._send(method, tab, params)
        answer = self._until(method, lambda message: message.get("id") == sent)
        if "error" in answer:
            raise _Restless(f"{method}: {answer['error']}")
        return answer["result"]

    def _wait(self, method: str) -> None:
        if not any(event["method"] == method for event in self._events):
            self._until(method, lambda message: message.get("method") == method)
        self._events = [event for event in self._events if event["method"] != method]

    def _until(self, what: str, awaited: Callable[[dict], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if awaited(message := self._receive()):
                return message
        raise _Restless(f"no {what} within {SECONDS} s")

    def _send(self, method: str, tab: str, params: dict[str, Any]) -> int:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params} | ({"sessionId": tab} if tab else {})
        self._socket.send(json.dumps(message))
        return self._sent

    def _receive(self) -> dict[str, Any]:
        """The next message; an event is kept, and a dialog closed, or everything would wait for it."""
        message = json.loads(self._socket.recv())
        if "method" in message:
            self._events.append(message)
            if message["method"] == "Page.javascriptDialogOpening":
                self._send("Page.handleJavaScriptDialog", message["sessionId"], {"accept": True})
        return message


def _elements(seen: list[list]) -> list[Element]:
    """From tag, attributes and the place of the parent; a parent comes before its children."""
    found: list[Element] = []
    for tag, attributes, parent in seen:
        within = found[parent].within | {found[parent].tag} if parent >= 0 else frozenset()
        found.append(Element(tag, attributes, within))
    return found


def _binary() -> str:
    """Where there is none the test is skipped, but where RETRACE_BROWSER is `required` it fails."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BINARIES)), None)
    if not found:
        missing = f"no browser to open pages in ({', '.join(BINARIES)}): apt-get install chromium, or set CHROMIUM"
        (pytest.fail if os.environ.get("RETRACE_BROWSER") == "required" else pytest.skip)(missing)
    return found


def _rules(canary: "_Canary") -> str:
    """No host name means what it says: the browser's own lead nowhere, all others to us."""
    nowhere = [f"MAP {host} ~NOTFOUND" for name in OWN_CALLS for host in (name, f"*.{name}")]
    return "--host-resolver-rules=" + ", ".join([*nowhere, f"MAP * 127.0.0.1:{canary.server_address[1]}"])


def _socket(port_file: Path, process: subprocess.Popen) -> websocket.WebSocket:
    """The connection, as soon as the browser has written down where it listens."""
    deadline = time.monotonic() + SECONDS
    while not (port_file.is_file() and len(port_file.read_text().split()) == 2):
        assert time.monotonic() < deadline and process.poll() is None, "the browser did not start"
        time.sleep(0.02)
    port, path = port_file.read_text().split()
    return websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=SECONDS, suppress_origin=True)


class _Canary(socketserver.ThreadingTCPServer):
    """Remembers the first words of whoever connects, and answers with a page that leaves the mark."""

    daemon_threads = True
    received: list[str]


class _Answer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.settimeout(0.1)
        with suppress(OSError):  # a connection made in advance says nothing, and is one all the same
            words = b""
            words = self.request.recv(4096)
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\nPWNED")
        self.server.received.append(repr(words[:60]))


@contextmanager
def _canary() -> Iterator[_Canary]:
    with _Canary(("127.0.0.1", 0), _Answer) as server:
        server.received = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
