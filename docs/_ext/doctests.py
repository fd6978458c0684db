"""A Griffe extension: show the `>>>` lines of docstrings as code, which Markdown would take for quotations."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1(?:\.\.\. ?|>>> ).*|\n\1(?!>>>)\S.*)*", flags=re.MULTILINE)


class Doctests(griffe.Extension):
    """Put every doctest into a fenced block of its own."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object before it is parsed."""
        if obj.docstring:
            obj.docstring.value = _DOCTEST.sub(_fence, obj.docstring.value)


def _fence(match: re.Match[str]) -> str:
    indent = match[1]
    return f"{indent}```pycon\n{match[0]}\n{indent}```"
