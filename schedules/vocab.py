"""Placement of embedding and head: on the end stages, or split over all ranks. `orders.py` places actions by it."""

from typing import Literal, get_args

from ..meshes.arguments import check_choice
from ..meshes.errors import ScheduleError

Vocab = Literal["ends", "split"]
"""Placement of embedding and head: on the first and last stage, or split by vocabulary over all ranks.

With "split" all ranks compute the loss of a microbatch together, after the forward of its last stage. The ranks wait
for each other least if all of them run forwards in that turn, so the last stage's backward comes one tick later.
"""


def check_vocab(vocab: Vocab) -> None:
    """Raise unless the value is "ends" or "split".

    Raises:
        ScheduleError: the value is neither; the message suggests the nearest.
    """
    check_choice("vocab", vocab, get_args(Vocab), error=ScheduleError)


def backward_delay(vocab: Vocab) -> int:
    """Return the number of ticks by which backwards are delayed, compared with the vocabulary at the ends."""
    return 1 if vocab == "split" else 0
