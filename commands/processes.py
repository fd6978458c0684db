"""Join the processes of a run or of a server, and watch them while they work."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..configs.changes import Changes
from ..configs.run_config import RunConfig
from ..meshes import TrellaxError
from ..meshes.numbers import whole_number
from ..meshes.processes.agreement import Facts
from ..meshes.processes.join import join_processes
from ..meshes.processes.launchers import find_processes
from ..train.processes.abort_handler import handle_aborts
from ..train.processes.run_settings import collect_run_settings
from ..train.processes.watchdog import SAVED_STAYS, ProcessWatchdog
from ..train.run_folder import Start
from .arguments.processes import START_S
from .standard_streams import guarded_stdout

_MARGIN_S = 20
"""Seconds that jax waits longer than the watchdog, whose message names the lost process."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The processes of a command once they have joined: their watch, None for a single one, and this one's stdout."""

    stdout: Any
    watch: ProcessWatchdog | None = None


@contextlib.contextmanager
def join_run(args: argparse.Namespace, config: RunConfig, *, start: Start, changes: Changes) -> Iterator[None]:
    """Join the other processes of a run, if there are any, and watch them inside the context.

    Raises:
        MeshError: the arguments contradict each other, or the other processes cannot be reached.
        RunError: the processes have different configs, corpora or versions.
        LostProcessError: some did not start within `--start-timeout`.
    """
    facts = partial(collect_run_settings, config, start=start, changes=changes)
    with join_others(args, silence_s=config.run.silence_s, facts=facts):
        yield


@contextlib.contextmanager
def join_others(
    args: argparse.Namespace,
    *,
    silence_s: int,
    facts: Callable[[], Facts],
    before_end: Callable[[str], None] = lambda _: None,
    parting: str = SAVED_STAYS,
) -> Iterator[Joined]:
    """Join the other processes that the arguments name, if there are any, and watch them inside the context.

    Args:
        silence_s: seconds without a heartbeat after which a process counts as lost.
        facts: returns what must be the same in all processes.
        before_end: called with the reason before the watch ends this process.
        parting: what the watch says last when it ends this process.

    Raises:
        MeshError, RunError, LostProcessError: as `join_run`.
    """
    processes = find_processes(
        coordinator=args.coordinator,
        count=_read_number("--num-processes", args.num_processes),
        index=_read_number("--process-id", args.process_id),
    )
    start_s = _read_number("--start-timeout", args.start_timeout) or START_S
    if processes is None:
        yield Joined(stdout=sys.stdout)
        return
    watch = ProcessWatchdog(processes, silence_s=silence_s, before_end=before_end, parting=parting)
    with _quiet_stdout() as stdout, handle_aborts(watch.explain_abort):
        join_processes(processes, silence_s=silence_s + _MARGIN_S, start_s=start_s, facts=facts())
        with watch:
            yield Joined(stdout=stdout, watch=watch)


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[Any]:
    """Discard what C++ writes to stdout, where Gloo reports its connections; yields a stream for results until then."""
    sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield guarded_stdout(own)
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
