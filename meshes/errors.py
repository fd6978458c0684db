"""Every error that a user can cause, as one tree; commands turn them into exit code 2, LostProcessError into 75.

    ValueError
     +-- TrellaxError              a mistake in the input, with its fix
          |
          |   sizes and layouts
          +-- MeshError            the mesh does not fit the devices
          +-- ShardingError        a dimension does not fit its mesh axis
          +-- ModelError           the sizes of a model contradict each other
          +-- ScheduleError        a pipeline schedule cannot run
          +-- PlanError            no layout meets the request
          |
          |   files and settings
          +-- ConfigError          a run file or an override is wrong
          +-- DataError            a corpus is missing, empty or does not fit the model
          +-- CheckpointError      a save is missing, damaged or of another shape
          +-- WeightsError         files of a Hugging Face model cannot be read or written
          |
          |   running
          +-- RunError             a run cannot start or cannot continue
          +-- LostProcessError     another process did not arrive in time
          +-- ServeError           a request or an engine cannot be served
          |
          |   compiling
          +-- TargetError          a machine to compile for is unknown, or cannot be compiled for here
          +-- ProgramError         the compiler rejects a program

All are importable from `trellax.meshes`. Read `spec.py` next.
"""

import difflib
import reprlib
from collections.abc import Iterable

_LONGEST_PROBLEM, _LONGEST_FIX, _LONGEST_NAME = 1_500, 400, 200


class TrellaxError(ValueError):
    """A mistake in the input, with the facts and a fix.

    The text has three parts: what was asked with its numbers, what is true, and after `Fix:` what to do.
    It is a `ValueError` so that validation libraries can collect several of them. A message is at most 2 kB long and
    contains no control characters, whatever it quotes.
    """

    def __init__(self, problem: str, *, fix: str | None = None) -> None:
        self.problem = printable(problem, limit=_LONGEST_PROBLEM)
        self.fix = None if fix is None else printable(fix, limit=_LONGEST_FIX)
        super().__init__(self.problem if fix is None else f"{self.problem}\n  Fix: {self.fix}")


class MeshError(TrellaxError):
    """The mesh does not fit the devices."""


class ShardingError(TrellaxError):
    """A dimension does not fit the mesh axis that it is split over."""


class ModelError(TrellaxError):
    """The sizes of a model contradict each other or the mesh."""


class ScheduleError(TrellaxError):
    """A pipeline schedule cannot run."""


class ConfigError(TrellaxError):
    """A run file or an override is wrong."""


class DataError(TrellaxError):
    """A corpus is missing, empty or does not fit the model."""


class CheckpointError(TrellaxError):
    """A save is missing, damaged or of another shape."""


class RunError(TrellaxError):
    """A run cannot start in its folder, or cannot continue."""


class LostProcessError(TrellaxError):
    """Another process did not arrive in time; commands exit with 75, since a second try may succeed."""


class WeightsError(TrellaxError):
    """Files of a Hugging Face model cannot be read or written."""


class TargetError(TrellaxError):
    """A machine to compile for is unknown, or cannot be compiled for here."""


class ProgramError(TrellaxError):
    """The compiler rejects a program."""


class PlanError(TrellaxError):
    """No layout meets the request."""


class ServeError(TrellaxError):
    """A request or an engine cannot be served."""


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
    r"""Return the repr of an untrusted value for an error message, cut to `limit` characters.

    Control characters, terminal escapes and lone surrogates are escaped. The time for a huge value is bounded too.

    >>> shown("\x1b[31mred")
    "'\\x1b[31mred'"
    """
    text = _Excerpt(limit).repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def printable(text: str, *, limit: int) -> str:
    r"""Escape the unprintable characters of a text of several lines and cut it to `limit` bytes.

    >>> printable("a\nb\x1b[2J", limit=80)
    'a\nb\\x1b[2J'
    """
    head = text[: limit + 1]
    if not head.replace("\n", "").isprintable():
        head = "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in head)
    encoded = head.encode()
    return head if len(encoded) <= limit else encoded[: limit - 3].decode(errors="ignore") + "…"


class _Excerpt(reprlib.Repr):
    """A `repr` whose time is bounded by the length that it prints."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxstring = self.maxother = limit
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = limit // 2

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        # Python refuses to write integers of more than 4,300 digits in decimal.
        return repr(x) if x.bit_length() <= 256 else f"{hex(x)[:20]}…"
