"""JSON files taken apart into the bytes of their records, whatever is wrong with these.

    for pieces in read_pieces(file, "mine.jsonl"):
        pieces          # Pieces(first=1, raws=[b'{"trace_version"…', b'{"trace…', b""], fault=None)

A file is JSONL, a JSON array, or an object with the key `traces` (scalars beside that key describe the file
and are not read). All are streamed, and no record is held past the cap. In the last two kinds an element counts
as a line.
"""

import re
from collections.abc import Iterator
from typing import IO, NamedTuple

from lib.errors import RequestError
from lib.trace import MAX_BYTES, InvalidTrace, shown

BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 20
LINES_CHUNK = 1 << 16  # so small that what is made of its lines stays in the processor's cache


class Pieces(NamedTuple):
    """The bytes of records that stand on neighbouring lines, the number of the first line, and what is wrong there.

    Each is at most a little over the cap. Of a row of a table, `raws` is the JSON that its values make, `text` the row.
    """

    first: int
    raws: list[bytes]
    fault: InvalidTrace | None = None
    text: bytes = b""


def read_pieces(file: IO[bytes], name: str) -> Iterator[Pieces]:
    """The records of the file, in order. Raises RequestError where it is no text."""
    return _pieces(file, _head(file, name))


_STRING = rb'"(?:[^"\\]|\\.)*+"'
_MEMBER = _STRING + rb"\s*+:\s*+(?:" + _STRING + rb"|[\w.+-]++)"
_OF_TRACES = rb'"traces"\s*+:\s*+\[(?!\s*+")'  # a record may have a list of texts of this name
_OPENING = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*+(?:\[|\{\s*+(?:" + _MEMBER + rb"\s*+,\s*+)*?" + _OF_TRACES + rb")", re.DOTALL
)
_CLOSING = re.compile(rb"\s*+(?:,\s*+" + _MEMBER + rb"\s*+)*+\}\s*+", re.DOTALL)
_NOTHING = re.compile(rb"\s*+")
_OUTSIDE = re.compile(rb'[\[{]++|[\]}]++|,|"|[^\[\]{},"]++')
_INSIDE = re.compile(rb'"|(?:[^"\\]++|\\.)++|\\\Z', re.DOTALL)
_ESCAPED = re.compile(rb".", re.DOTALL)


def _head(file: IO[bytes], name: str) -> bytes:
    head = file.read(1 << 16)
    if b"\0" in head and not head.removeprefix(BOM).lstrip().startswith((b"{", b"[")):
        raise RequestError(f"{name}: is no UTF-8 text; expected JSONL, a JSON array, or an object with `traces`")
    return head


def _pieces(file: IO[bytes], head: bytes) -> Iterator[Pieces]:
    if opening := _OPENING.match(head):
        file.seek(opening.end())
        return _elements(file, 1 + opening[0].count(b"\n"), _CLOSING if b"{" in opening[0] else _NOTHING)
    file.seek(len(BOM) if head.startswith(BOM) else 0)
    return _lines(file)


def _lines(file: IO[bytes]) -> Iterator[Pieces]:
    """The lines of a JSONL file; what a line holds past the cap is passed over."""
    first = 1
    while chunk := file.read(LINES_CHUNK):
        if not chunk.endswith(b"\n"):
            chunk += _rest_of_line(file)
        lines = chunk.removesuffix(b"\n").split(b"\n")
        if b"\r" in chunk:
            lines = [line.removesuffix(b"\r") for line in lines]
        yield Pieces(first, lines)
        first += len(lines)


def _rest_of_line(file: IO[bytes]) -> bytes:
    most = MAX_BYTES + 2  # one too many for the cap, and the line end
    rest = more = file.readline(most)
    while len(more) == most and not more.endswith(b"\n"):
        more = file.readline(most)
    return rest


def _elements(file: IO[bytes], line: int, closing: re.Pattern[bytes]) -> Iterator[Pieces]:
    """The elements of a JSON array, from behind its bracket on: what stands between its commas.

        {"prompt": "a, b"}, {"prompt": …}]      gives `{"prompt": "a, b"}` and `{"prompt": …}`

    Only brackets, commas and strings are looked at, so that one bad element does not spoil the next.
    """
    piece, begin, depth, elements = bytearray(), line, 0, 0
    tokens = _tokens(file)
    for text, bare in tokens:
        if bare and text[0] in b"[{":
            depth += len(text)
        elif bare and text[0] in b"]}":
            if len(text) > depth:
                piece += text[:depth]
                if piece or elements:
                    yield _element(begin, piece)
                yield from _ending(line, text[depth:], tokens, closing)
                return
            depth -= len(text)
        elif bare and text == b"," and depth == 0:
            yield _element(begin, piece)
            elements += 1
            piece.clear()
            begin = line
            continue
        if not piece:
            line += text.count(b"\n", 0, len(text) - len(text.lstrip()))
            text, begin = text.lstrip(), line
        line += text.count(b"\n")
        if len(piece) <= MAX_BYTES:
            piece += text
    yield Pieces(begin, [bytes(piece)], InvalidTrace("record", "the array's closing ]", "the end of the file"))


def _element(begin: int, piece: bytearray) -> Pieces:
    fault = None if piece else InvalidTrace("record", "a trace between the commas", "nothing")
    return Pieces(begin, [bytes(piece)], fault)


def _ending(
    line: int, text: bytes, tokens: Iterator[tuple[bytes, bool]], closing: re.Pattern[bytes]
) -> Iterator[Pieces]:
    """Nothing, if the array closes and only what belongs there comes after it."""
    for more, _ in tokens:
        text += more if len(text) <= MAX_BYTES else b""
    if text[:1] != b"]":
        yield Pieces(line, [text], InvalidTrace("record", "the array's closing ]", shown(text[:1].decode())))
    elif not closing.fullmatch(text, 1):
        got = shown(text[1:200].decode(errors="replace"))
        yield Pieces(line, [text], InvalidTrace("record", "the end of the file after the array", got))


def _tokens(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The whole text in pieces: runs of opening or closing brackets, commas, and what is between them.

    The flag is True outside strings. A piece never spans two chunks of the file, a string may.
    """
    pattern = _OUTSIDE
    while chunk := file.read(CHUNK):
        at = 0
        while at < len(chunk):
            text = pattern.match(chunk, at)[0]
            at += len(text)
            yield text, pattern is _OUTSIDE
            if pattern is _ESCAPED:
                pattern = _INSIDE
            elif text == b'"':
                pattern = _INSIDE if pattern is _OUTSIDE else _OUTSIDE
            elif pattern is _INSIDE and text == b"\\":  # the chunk ends between it and what it escapes
                pattern = _ESCAPED
