"""Find the line of every section and key of a TOML text, for error messages.

`tomllib` gives no positions. `tomlkit` keeps the text between values, so a line number is the count of line ends in
all items before it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tomlkit.container import Container

Lines = dict[tuple[str, ...], int]
"""Line numbers, from 1, by path: `("train", "steps")`."""

_MAX_CHARACTERS = 100_000
"""tomlkit takes quadratic time: 0.2 s for 100,000 empty lines, 18 s for a million."""


def map_lines(text: str) -> Lines:
    r"""Return the line of every table and key of a TOML text; the first line, for a table written in several parts.

    >>> map_lines("[model]\nnum_layers = 2\n\n[data]\n")
    {('model',): 1, ('model', 'num_layers'): 2, ('data',): 4}

    The result is empty for a text of more than 100,000 characters, or one that tomlkit cannot parse.
    """
    if len(text) > _MAX_CHARACTERS:
        return {}
    # Needed only for configs with mistakes, and as slow to import as all of `configs`.
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(text)
    except (TOMLKitError, RecursionError):
        return {}
    lines: Lines = {}
    _walk(document, above=(), line=1, lines=lines)
    return lines


def _walk(container: "Container", *, above: tuple[str, ...], line: int, lines: Lines) -> int:
    """Add the lines of a container that starts at `line`, and return the line after it."""
    from tomlkit.items import AoT, Table

    for key, item in container.body:
        if key is None:  # blank lines and comments
            line += item.as_string().count("\n")
            continue
        name = (*above, key.key)
        lines.setdefault(name, line + item.trivia.indent.count("\n"))
        tables = [item] if isinstance(item, Table) else item.body if isinstance(item, AoT) else []
        for table in tables:
            # The implied [x] of [x.y], and the x of `x.y = 1`, have no line of their own.
            has_header = not table.is_super_table() and not key.is_dotted()
            line += (table.trivia.indent + table.trivia.trail).count("\n") if has_header else 0
            line = _walk(table.value, above=name, line=line, lines=lines)
        if not tables:
            line += (item.trivia.indent + item.as_string() + item.trivia.trail).count("\n")
    return line
