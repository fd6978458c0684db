"""Mistakes in a run file or an override, collected so that one error reports all of them, a line each."""

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
    """One mistake: where it was written, what is wrong with it, and how to fix it where that is known.

    `place` is `file:line`, words of the command line, or empty for values from a dict.
    """

    place: str
    text: str
    fix: str | None = None

    def __str__(self) -> str:
        # Each mistake is cut on its own, so that a long one leaves room for the others.
        text = printable(self.text, limit=_MAX_TEXT)
        return f"{printable(self.place, limit=_MAX_PLACE)}: {text}" if self.place else text


def make_config_error(mistakes: Sequence[Mistake]) -> ConfigError:
    """Return one error that lists the mistakes, each on its own line; of more than ten it counts the rest."""
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
