"""Draw rows of text as aligned columns, and fit them to a terminal.

Not rich.table: that wraps words inside of cells where a terminal is narrow, and this keeps every number whole, drawing
tables below each other instead. It imports nothing, so that commands without jax start as fast as they can.
"""

from collections.abc import Collection, Sequence

GAP = "  "


def align(rows: Sequence[Sequence[str]], *, left: int | Collection[int] = 1) -> str:
    """Return rows of words as lines of columns, two spaces apart and without spaces at the end.

    >>> print(align([("mesh", "bytes"), ("data=2", "7")]))
    mesh    bytes
    data=2      7

    Args:
        left: the columns that are aligned to the left, by their places, or how many of the first; the others are
            aligned to the right, as numbers are.
    """
    return "\n".join(GAP.join(words).rstrip() for words in _pad(rows, left))


def align_within(rows: Sequence[Sequence[str]], *, width: int | None, left: int = 1) -> str:
    """Return rows as columns, or, where they are wider than the width, as several tables below each other.

    Each of the tables begins with the first column, which names the rows.

    Args:
        width: columns of the terminal; None does not limit it.
        left: how many of the first columns are aligned to the left.
    """
    tables: list[list[int]] = [[0]]
    widths = _measure_columns(rows)
    for place in range(1, len(widths)):
        used = sum(widths[one] + len(GAP) for one in tables[-1]) + widths[place]
        if width is not None and used > width and tables[-1] != [0]:
            tables.append([0])
        tables[-1].append(place)
    return "\n\n".join(align([[row[place] for place in table] for row in rows], left=left) for table in tables)


def align_markdown(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return rows of words as a Markdown table, the first row its head, in aligned columns.

    >>> print(align_markdown([("mesh", "bytes"), ("data=2", "7")]))
    | mesh   | bytes |
    |--------|-------|
    | data=2 |     7 |

    Args:
        left: how many of the first columns are aligned to the left.
    """
    rule = "-|-".join("-" * width for width in _measure_columns(rows))
    head, *body = [f"| {' | '.join(words)} |" for words in _pad(rows, left)]
    return "\n".join([head, f"|-{rule}-|", *body])


def _pad(rows: Sequence[Sequence[str]], left: int | Collection[int]) -> list[list[str]]:
    """Return the rows with every word padded to the width of its column."""
    places = range(left) if isinstance(left, int) else left
    widths = _measure_columns(rows)
    return [
        [
            word.ljust(width) if place in places else word.rjust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]


def _measure_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of every column: that of its longest word."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
