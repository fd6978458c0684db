"""Collect the mistakes in a run file and its overrides, and report them in one error, a line each."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ..meshes import ConfigError
from ..meshes.errors import printable

_GENERAL_FIX = "`trellax train --help` lists every key."
_MAX_LINES = 10
_MAX_PLACE, _MAX_TEXT = 120, 500


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A mistake: the place where it was written, the problem, and a fix if one is known.

    `place` is `file:line`, words of the command line, or empty for values from a dict.
    """

    place: str
    text: str
    fix: str | None = None

    def __str__(self) -> str:
        # Each mistake is shortened by itself, so that a long one does not push out the others.
        text = printable(self.text, limit=_MAX_TEXT)
        return f"{printable(self.place, limit=_MAX_PLACE)}: {text}" if self.place else text


def make_config_error(mistakes: Sequence[Mistake]) -> ConfigError:
    """Return an error that lists the first ten mistakes, a line each, and counts the others."""
    if len(mistakes) == 1:
        return ConfigError(str(mistakes[0]), fix=mistakes[0].fix or _GENERAL_FIX)
    first = mistakes[:_MAX_LINES]
    lines = [f"{mistake} Fix: {mistake.fix}" if mistake.fix else str(mistake) for mistake in first]
    if len(mistakes) > len(first):
        lines.append(f"and {len(mistakes) - len(first):,} more mistakes.")
    return ConfigError("\n".join(lines), fix=_GENERAL_FIX)


def find_nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name most similar to `name`, or None if none is similar.

    >>> find_nearest("stpes", ["steps", "batch_size"])
    'steps'
    """
    if len(name) >= _MAX_PLACE:
        return None
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)
