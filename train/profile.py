"""Trace a few steps of a run for TensorBoard (xprof) and Perfetto, and print where their time went."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from ..hub.saves.arrays import explain_failure
from ..meshes.processes.messages import is_first
from ..programs.trace import format_operations, list_operations

_FAILURES = (OSError, RuntimeError, ValueError)
"""Errors of jax's profiler: the folder cannot be written, a trace is already running, or other traces are in it."""

WARM_UP_STEPS = 3
"""Steps before the first that is traced; they load programs and fill caches."""


class StepProfile:
    """Trace `num_steps` steps of a run after its warm-up.

    With many processes the first one traces its own devices. A trace that cannot be written or read does not stop the
    run. Steps are numbered as in `Intervals`: the first of a run is 1.

    Args:
        folder: the run folder; the trace goes into its folder `profile`.
        num_steps: 0 traces nothing.
        say: called with each message.
    """

    def __init__(self, folder: Path, *, num_steps: int, say: Callable[[str], None]) -> None:
        self._folder, self._num_steps, self._say = folder / "profile", num_steps, say
        self._first, self._is_on = WARM_UP_STEPS + 1, False

    @property
    def is_wanted(self) -> bool:
        """Whether steps are to be traced."""
        return self._num_steps > 0

    def begin_after(self, first_step: int, *, steps: int) -> None:
        """Choose the steps to trace, in a run that takes the steps after `first_step` up to `steps`.

        Nothing is traced, and a message says why, if they do not fit.
        """
        before = first_step + WARM_UP_STEPS
        self._first = before + 1
        most = max(0, steps - before)
        if self._num_steps > most:
            needed = before + self._num_steps
            fix = f"--profile {most}, or --train.steps {needed}" if most else f"--train.steps {needed}"
            self._say(
                f"profile   none: {WARM_UP_STEPS} steps to warm up and {self._num_steps} to trace are more than the "
                f"{steps - first_step} to take; ask for {fix}"
            )
            self._num_steps = 0

    def begins_with(self, step: int) -> bool:
        """Return whether this step is the first to trace."""
        return bool(self._num_steps) and step == self._first

    def start(self, state: Any) -> None:
        """Start the trace once the devices have computed the state, so that no earlier step is in it."""
        jax.block_until_ready(state)
        if not is_first():
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
        except _FAILURES as error:
            self._give_up(error)
        else:
            self._is_on = True

    def ends_with(self, step: int) -> bool:
        """Return whether this step is the last to trace, and a trace is running."""
        return self._is_on and step == self._first + self._num_steps - 1

    def stop(self, state: Any, compiled: Any, *, num_devices: int) -> None:
        """Wait for the state, stop the trace, and print its largest operations."""
        self._is_on = False
        jax.block_until_ready(state)
        try:
            jax.profiler.stop_trace()
            operations = list_operations(self._folder, compiled, num_devices=num_devices)
        except _FAILURES as error:
            self._give_up(error)
            return
        self._say(f"\nprofile   {self._num_steps} steps in {self._folder}, for TensorBoard and ui.perfetto.dev")
        self._say(format_operations(operations, num_steps=self._num_steps))

    def close(self) -> None:
        """Stop a trace that the end of the run has cut off."""
        if self._is_on:
            self._is_on = False
            with suppress(*_FAILURES):
                jax.profiler.stop_trace()

    def _give_up(self, error: Exception) -> None:
        self._say(f"profile   none: {explain_failure(error)}; the run goes on")
