"""Tell errors in the code of a class of the user's as mistakes with a file and a line."""

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...meshes import ModelError, TrellaxError

_NOT_OWN = ("trellax", "flax")
"""Packages of the modules that trellax makes by itself."""


@contextmanager
def code_of(own: Any) -> Iterator[None]:
    """Turn an exception that a class or module of the user's raises into a `ModelError` with its place.

    Errors of trellax's own layers inside it say themselves what is wrong, and pass.

    Raises:
        ModelError: the code raises something else; that is its cause.
    """
    try:
        yield
    except TrellaxError:
        raise
    except Exception as error:
        cls = own if inspect.isclass(own) else type(own)
        if cls.__module__.partition(".")[0] in _NOT_OWN:
            raise
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"{cls.__name__}{_place_in(cls, error)}: {type(error).__name__}: {lines[0] if lines else 'no message'}",
            fix="correct the class; from Python, load_config and train show the whole traceback.",
        ) from error


def _place_in(cls: type[Any], error: Exception) -> str:
    """Return file and line of the last call in the file of a class, as text behind its name; "" outside of it."""
    try:
        file = inspect.getfile(cls)
    except (OSError, TypeError):
        return ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({file}, line {lines[-1]})" if lines else ""
