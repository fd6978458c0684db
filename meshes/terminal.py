"""Find how wide a terminal is, and fold prose to that width.

Pipes and files have no width: lines there are as long as they need to be, for grep and editors. COLUMNS, where it is
set, is the width of a terminal, a pipe or a file.
"""

import os
import sys
import textwrap
from typing import TextIO

_MIN_WIDTH = 40


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Return the columns of a stream's terminal, at least 40, or None for pipes and files without COLUMNS.

    Args:
        stream: stdout if left out.
    """
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdigit() and int(given) > 0:
        return max(_MIN_WIDTH, int(given))
    try:
        return max(_MIN_WIDTH, os.get_terminal_size((stream or sys.stdout).fileno()).columns)
    except (OSError, ValueError, AttributeError):
        return None


def fold(text: str, *, width: int | None) -> str:
    """Return a text with its long lines broken at words; what follows a break is indented by two spaces more.

    >>> print(fold("  one two three", width=11))
      one two
        three
    """
    if width is None:
        return text
    lines: list[str] = []
    for line in text.splitlines():
        if len(line) <= width:
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line, width, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)
