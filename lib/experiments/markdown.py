r"""Text that others wrote, in a Markdown file: nothing in it means anything there.

    inline("a | *b*")        # a \| \*b\*
    fenced("```")            # a block whose fence is of four

What is written is read in a terminal too, so characters that a terminal obeys are shown instead.
"""

import re
from typing import Any

# What is obeyed and not seen: control characters by a terminal, overrides of the writing direction by the reader's eye.
_OBEYED = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_OBEYED |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def fenced(text: str) -> str:
    """The text as a code block that it cannot leave, nor hide anything in."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{printable(text)}\n{fence}"


def inline(text: str) -> str:
    """The text within a line of Markdown, with nothing in it that means something there, a bare URL included."""
    line = printable(" ".join(text.split()))
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$@]|:(?=//)|(?<=[a-z])\.(?=\w))", r"\\\1", line, flags=re.IGNORECASE)


def printable(text: str) -> str:
    """The text with a picture for each control character: `\x1b[2J` clears a terminal, `␛[2J` is read."""
    return text.translate(_OBEYED)
