"""What the processes of a run say to each other between steps; with one process nothing is sent."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..meshes import RunError, TrellaxError

_TEXT_BYTES = 1024


def is_first() -> bool:
    """Whether this is the process that talks and writes the run folder's own files."""
    return jax.process_index() == 0


def gather_texts(text: str) -> list[str]:
    """Return every process's text, cut to 1024 bytes, in the order of processes; all must call it."""
    if jax.process_count() == 1:
        return [text]
    own = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    own[: encoded.size] = encoded
    rows = np.asarray(multihost_utils.process_allgather(own))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def text_of_first(text: str) -> str:
    """Return the first process's text; all must call it, the others' is not looked at."""
    return gather_texts(text)[0]


def first_does(action: Callable[[], None]) -> None:
    """Let the first process do what only one may; returns on every process once it is done.

    Raises:
        TrellaxError: what the action raised, on every process.
    """
    raised: TrellaxError | None = None
    if is_first():
        try:
            action()
        except TrellaxError as error:
            raised = error
    told = text_of_first(str(raised) if raised else "")
    if raised:
        raise raised
    if told:
        raise RunError(told)
