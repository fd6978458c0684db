"""Every error a user can cause, as one tree; commands turn them into exit code 2.

    TrellaxError(ValueError)
     +-- MeshError          a mesh that does not fit its devices
     +-- ShardingError      a dimension that does not fit its mesh axis
     +-- ModelError         a model whose sizes contradict each other
     +-- ScheduleError      a pipeline schedule that cannot run
     +-- ConfigError        a run file or an override that is wrong
     +-- DataError          a corpus that is missing, empty or does not fit the model
     +-- CheckpointError    a saved run that is missing, damaged or of another shape
     +-- RunError           a run that cannot start, or cannot go on
     +-- LostProcessError   another process that did not come
     +-- WeightsError       files of a Hugging Face model that cannot be read or written
     +-- TargetError        a machine to compile for that is not known, or cannot be compiled for here
     +-- ProgramError       a program that the compiler rejects
     +-- PlanError          a request that no layout can meet
     +-- ServeError         a request, or an engine, that cannot be served

Read `spec.py` next.
"""

import difflib
import reprlib
from collections.abc import Iterable

_LONGEST_PROBLEM, _LONGEST_FIX, _LONGEST_NAME = 1_500, 400, 200


class TrellaxError(ValueError):
    """A mistake in what was asked, with what is true and how to fix it.

    The text has three parts: what was asked with its numbers, what is true, and after `Fix:` what to do.
    It is a `ValueError` so that validation libraries can collect several of them. Whatever a message quotes, it stays
    below 2 kB and has no character that a terminal would obey.
    """

    def __init__(self, problem: str, *, fix: str | None = None) -> None:
        self.problem = printable(problem, limit=_LONGEST_PROBLEM)
        self.fix = None if fix is None else printable(fix, limit=_LONGEST_FIX)
        super().__init__(self.problem if fix is None else f"{self.problem}\n  Fix: {self.fix}")


class MeshError(TrellaxError):
    """A mesh that does not fit its devices."""


class ShardingError(TrellaxError):
    """A dimension that does not fit the mesh axis it is split over."""


class ModelError(TrellaxError):
    """A model whose sizes contradict each other or its mesh."""


class ScheduleError(TrellaxError):
    """A pipeline schedule that cannot run."""


class ConfigError(TrellaxError):
    """A run file or an override that is wrong."""


class DataError(TrellaxError):
    """A corpus that is missing, empty or does not fit the model."""


class CheckpointError(TrellaxError):
    """A saved run that is missing, damaged or has another shape."""


class RunError(TrellaxError):
    """A run that cannot start in its folder, or cannot go on."""


class LostProcessError(TrellaxError):
    """Another process that did not come: no mistake of this one's, so commands end with 75 and may be given again."""


class WeightsError(TrellaxError):
    """Files of a Hugging Face model that cannot be read or written."""


class TargetError(TrellaxError):
    """A machine to compile for that is not known, or cannot be compiled for here."""


class ProgramError(TrellaxError):
    """A program that the compiler rejects."""


class PlanError(TrellaxError):
    """A request that no layout can meet."""


class ServeError(TrellaxError):
    """A request, or an engine, that cannot be served."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to `name`, or an empty string.

    >>> suggest("tenso", ["data", "tensor", "pipe"])
    " Did you mean 'tensor'?"
    """
    if len(name) > _LONGEST_NAME:
        return ""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def shown(value: object, *, limit: int = 80) -> str:
    r"""Return a value that somebody else wrote, as an error may quote it: its repr, cut to `limit` characters.

    Control characters, terminal escapes and lone surrogates are escaped. What a huge value costs is bounded too.

    >>> shown("\x1b[31mred")
    "'\\x1b[31mred'"
    """
    text = _Excerpt(limit).repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def printable(text: str, *, limit: int) -> str:
    r"""Return a text of many lines with every character escaped that does not print, cut to `limit` bytes.

    >>> printable("a\nb\x1b[2J", limit=80)
    'a\nb\\x1b[2J'
    """
    head = text[: limit + 1]
    if not head.replace("\n", "").isprintable():
        head = "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in head)
    encoded = head.encode()
    return head if len(encoded) <= limit else encoded[: limit - 3].decode(errors="ignore") + "…"


class _Excerpt(reprlib.Repr):
    """A repr that looks at no more of a value than it shows."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxstring = self.maxother = limit
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = limit // 2

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        # Python refuses to write integers of more than 4,300 digits in decimal.
        return repr(x) if x.bit_length() <= 256 else f"{hex(x)[:20]}…"
