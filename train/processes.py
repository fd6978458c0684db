"""The words of `trellax train` for many processes, and a run that they share."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from ..meshes import Processes, TrellaxError, find_processes, join_processes
from ..meshes.numbers import whole_number
from .watch import ProcessWatch

_MARGIN_S = 20
"""So much longer jax itself waits: our own watch knows names."""


def join_run(args: argparse.Namespace, *, silence_s: int) -> contextlib.AbstractContextManager[object]:
    """Join the other processes, if there are any, and watch them as long as the context lasts.

    Raises:
        MeshError: the words contradict each other, or the others cannot be reached.
    """
    processes = find_processes(
        coordinator=args.coordinator,
        count=_read_number("--num-processes", args.num_processes),
        index=_read_number("--process-id", args.process_id),
    )
    if processes is None:
        return contextlib.nullcontext()
    return _watch(processes, silence_s=silence_s)


@contextlib.contextmanager
def _watch(processes: Processes, *, silence_s: int) -> Iterator[None]:
    join_processes(processes, silence_s=silence_s + _MARGIN_S)
    with _quiet_stdout(), ProcessWatch(processes, silence_s=silence_s):
        yield


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Gloo prints who it is connected to, from C++; stdout is for the result."""
    sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)
        os.close(nowhere)


def _read_number(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return whole_number(text)
    except ValueError:
        raise TrellaxError(f"{option} {text}: expected a whole number.", fix=f"write {option} 2, say.") from None
