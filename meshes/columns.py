"""Rows of text as columns, within a width. It imports nothing, so that commands without jax print tables too."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return rows of words as columns: the first `left` begin together, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(width) if place < left else word.rjust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def align_within(rows: Sequence[Sequence[str]], *, width: int | None, left: int = 1) -> str:
    """Return rows as columns, and where they are wider than the width as tables below each other.

    Each of them begins with the first column, which names the rows.
    """
    tables: list[list[int]] = [[0]]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    for place in range(1, len(widths)):
        used = sum(widths[one] for one in tables[-1]) + widths[place] - 2
        if width is not None and used > width and tables[-1] != [0]:
            tables.append([0])
        tables[-1].append(place)
    return "\n\n".join(align([[row[place] for place in table] for row in rows], left=left) for table in tables)
