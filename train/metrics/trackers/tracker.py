"""What every tracker of experiments does. Read `open.py` for the choice between them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Lines = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl."""

Ended = Literal["whole", "failed"]
"""How a command ended: as it was asked to, or with an error."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a tracker is told of a run.

    Args:
        name: name of the run.
        folder: the run folder, in which a tracker may have a folder of its own.
        hyperparameters: values by name.
        lines: the lines of metrics.jsonl before the first step of this command.
    """

    name: str
    folder: str
    hyperparameters: Mapping[str, object]
    lines: Lines


class Tracker(ABC):
    """A run in a tracker, which a resumed command goes on with by its id."""

    id: str
    """The id of the run."""

    place: str
    """Where it can be seen."""

    @abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of one step, all of them finite."""

    @abstractmethod
    def close(self, ended: Ended) -> None:
        """End the command."""


def finite_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl, without its step and without nulls."""
    return {name: value for name, value in line.items() if name != "step" and value is not None}
