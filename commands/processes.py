"""Join the processes of a run, and watch them while it trains."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from ..configs.changes import Changes
from ..configs.run_config import RunConfig
from ..meshes import TrellaxError
from ..meshes.numbers import whole_number
from ..meshes.processes.join import join_processes
from ..meshes.processes.launchers import find_processes
from ..train.processes.abort_handler import handle_aborts
from ..train.processes.run_settings import collect_run_settings
from ..train.processes.watchdog import ProcessWatchdog
from ..train.run_folder import Start
from .arguments.processes import START_S

_MARGIN_S = 20
"""Seconds that jax waits longer than the watchdog, whose message names the lost process."""


@contextlib.contextmanager
def join_run(args: argparse.Namespace, config: RunConfig, *, start: Start, changes: Changes) -> Iterator[None]:
    """Join the other processes of a run, if there are any, and watch them inside the context.

    Raises:
        MeshError: the arguments contradict each other, or the other processes cannot be reached.
        RunError: the processes have different configs, corpora or versions.
        LostProcessError: some did not start within `--start-timeout`.
    """
    processes = find_processes(
        coordinator=args.coordinator,
        count=_read_number("--num-processes", args.num_processes),
        index=_read_number("--process-id", args.process_id),
    )
    start_s = _read_number("--start-timeout", args.start_timeout) or START_S
    if processes is None:
        yield
        return
    silence_s = config.run.silence_s
    facts = collect_run_settings(config, start=start, changes=changes)
    watch = ProcessWatchdog(processes, silence_s=silence_s)
    with _quiet_stdout(), handle_aborts(watch.explain_abort):
        join_processes(processes, silence_s=silence_s + _MARGIN_S, start_s=start_s, facts=facts)
        with watch:
            yield


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Discard what C++ writes to stdout, where Gloo reports its connections; stdout is for the result."""
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
        raise TrellaxError(f"{option} {text}: expected a whole number.", fix=f"write for example {option} 2.") from None
