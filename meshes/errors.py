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
     +-- WeightsError       files of a Hugging Face model that cannot be read or written
     +-- TargetError        a machine to compile for that is not known, or cannot be compiled for here
     +-- ProgramError       a program that the compiler rejects
     +-- PlanError          a request that no layout can meet
     +-- ServeError         a request, or an engine, that cannot be served

Read `spec.py` next.
"""

import difflib
from collections.abc import Iterable


class TrellaxError(ValueError):
    """A mistake in what was asked, with what is true and how to fix it.

    The text has three parts: what was asked with its numbers, what is true, and after `Fix:` what to do.
    It is a `ValueError` so that validation libraries can collect several of them.
    """

    def __init__(self, problem: str, *, fix: str | None = None) -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(problem if fix is None else f"{problem}\n  Fix: {fix}")


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
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
