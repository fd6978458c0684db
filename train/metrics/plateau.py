"""Watch the validation losses of a run, and tell when they no longer fall: the run is on a plateau."""

import math
from collections.abc import Mapping
from typing import Any

PLATEAU = "plateau"
"""What ended a run whose validation loss no longer fell."""

BEST, WITHOUT_GAIN = "best_val_loss", "validations_without_gain"


class Plateau:
    """Count the validations in a row whose loss is not below the lowest one before them.

    Saves hold the count, so a resumed run ends after the same step. Each process counts the same losses by itself.

    >>> plateau = Plateau(2)
    >>> for loss in (3.0, 2.5, 2.7, 2.5):
    ...     plateau.add(loss)
    >>> plateau.is_reached
    True

    Args:
        patience: validations without a lower loss after which the plateau is reached; 0 is never.
        record: what `record` returned at the save from which the run is resumed.
    """

    def __init__(self, patience: int, *, record: Mapping[str, Any] | None = None) -> None:
        self._patience, record = patience, record or {}
        best = record.get(BEST)
        self._best, self._without_gain = math.inf if best is None else float(best), record.get(WITHOUT_GAIN) or 0

    def add(self, loss: float) -> None:
        """Count the loss of a validation; one that is not a number is no gain."""
        self._best, self._without_gain = (loss, 0) if loss < self._best else (self._best, self._without_gain + 1)

    @property
    def is_reached(self) -> bool:
        """Whether there were as many validations without a lower loss as the run has patience for."""
        return 0 < self._patience <= self._without_gain

    @property
    def record(self) -> dict[str, Any]:
        """The lowest loss, None before the first, and the number of validations since, for a save."""
        return {BEST: self._best if math.isfinite(self._best) else None, WITHOUT_GAIN: self._without_gain}

    def __str__(self) -> str:
        return (
            f"plateau   {self._without_gain} validations in a row without a loss below {self._best:.4f} "
            f"(train.patience={self._patience})"
        )
