"""How wide a terminal is, and prose that keeps within it.

A pipe or a file has no width: lines are as long as they need, for grep and for editors. COLUMNS, where it is set, is
the width of either. Colours follow rich: none in a pipe, none with NO_COLOR.
"""

import os
import sys
import textwrap
from typing import TextIO

_NARROWEST = 40


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Return the columns of a stream's terminal (of stdout if left out), None for pipes and files without COLUMNS."""
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdigit() and int(given) > 0:
        return max(_NARROWEST, int(given))
    try:
        return max(_NARROWEST, os.get_terminal_size((stream or sys.stdout).fileno()).columns or _NARROWEST)
    except (OSError, ValueError, AttributeError):
        return None


def fold(text: str, *, width: int | None) -> str:
    """Return a text whose lines are broken at words where they are longer than the width, and go on indented."""
    if width is None:
        return text
    lines: list[str] = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        rest = {"subsequent_indent": f"{indent}  ", "break_long_words": False, "break_on_hyphens": False}
        lines += textwrap.wrap(line, width, **rest) if len(line) > width else [line]
    return "\n".join(lines)
