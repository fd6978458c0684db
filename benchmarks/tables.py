"""Format the results of a benchmark as Markdown tables, which RESULTS.md takes as they are printed."""

from collections.abc import Sequence

from trellax.meshes.columns import align_markdown

MIB = 2**20

Rows = list[tuple[str, ...]]
"""Rows of a table; the first one is its head."""


def format_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table below its title, with an empty line before each; the first row is the head."""
    return f"\n**{title}**\n\n{align_markdown(rows)}"
