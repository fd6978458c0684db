"""Pictures, tables and text as HTML, for the `_repr_html_` by which a notebook shows a value.

Everything is returned as one self-contained string: pictures travel inside it as data URIs. This file imports neither
jax nor matplotlib, so that a value's class may use it without making its room slower to import.
"""

import base64
import html
from collections.abc import Sequence
from typing import Literal

_MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml"}


def picture_html(picture: bytes, *, format: Literal["png", "svg"], alt: str) -> str:  # noqa: A002
    """Return an `<img>` tag that holds a PNG or SVG.

    An SVG is embedded as a picture too, so that the ids of its elements cannot clash with those of another one on the
    same page.

    >>> picture_html(b"...", format="png", alt="a plan")
    '<img alt="a plan" style="max-width: 100%" src="data:image/png;base64,Li4u">'
    """
    data = base64.b64encode(picture).decode("ascii")
    source = f"data:{_MEDIA_TYPES[format]};base64,{data}"
    return f'<img alt="{html.escape(alt)}" style="max-width: 100%" src="{source}">'


def table_html(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a `<table>`, whose first row is its head; the first `left` columns are aligned left, the others right.

    The arguments are those of `columns.align`, which prints the same table as text.
    """
    head, *body = rows
    lines = [_row_html("th", head, left=left), *(_row_html("td", row, left=left) for row in body)]
    return "\n".join(["<table>", *lines, "</table>"])


def text_html(text: str) -> str:
    """Return a `<pre>` block that shows a text as a terminal does, with its columns kept."""
    return f'<pre style="white-space: pre; overflow-x: auto">{html.escape(text)}</pre>'


def _row_html(tag: Literal["td", "th"], words: Sequence[str], *, left: int) -> str:
    cells = [
        f'<{tag} style="text-align: {side}">{html.escape(word)}</{tag}>'
        for word, side in zip(words, _sides(len(words), left=left), strict=True)
    ]
    return "".join(["<tr>", *cells, "</tr>"])


def _sides(num_columns: int, *, left: int) -> list[str]:
    return ["left" if place < left else "right" for place in range(num_columns)]
