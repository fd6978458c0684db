"""`trellax train --profile N`: a trace of a few steps for TensorBoard (xprof) and for Perfetto, and its gist."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from ..hub.saves.arrays import explain_failure
from ..meshes.processes.messages import is_first
from ..programs.trace import format_operations, list_operations

_FAILURES = (OSError, RuntimeError, ValueError)
"""What jax's profiler raises where it cannot write, has begun already, or finds other traces than its own."""

WARM_UP_STEPS = 3
"""Steps before the first that is traced: the first ones load programs and fill caches."""


class StepProfile:
    """Traces `num_steps` steps of a run, once it is warm, and says where their time went.

    Of many processes the first traces its own devices. A trace that cannot be written or read costs the run nothing.

    Args:
        folder: of the run; the trace goes into its `profile`.
        num_steps: 0 traces nothing.
        say: takes the text.
    """

    def __init__(self, folder: Path, *, num_steps: int, say: Callable[[str], None]) -> None:
        self._folder, self._num_steps, self._say = folder / "profile", num_steps, say
        self._start, self._is_on = WARM_UP_STEPS, False

    def begin_after(self, first_step: int, *, steps: int) -> None:
        """Say with which step the run begins and with how many it ends; what does not fit between is not traced."""
        self._start = first_step + WARM_UP_STEPS
        most = max(0, steps - self._start)
        if self._num_steps > most:
            needed = self._start + self._num_steps
            fix = f"--profile {most}, or --train.steps {needed}" if most else f"--train.steps {needed}"
            self._say(
                f"profile   none: {WARM_UP_STEPS} steps to warm up and {self._num_steps} to trace are more than the "
                f"{steps - first_step} to take; ask for {fix}"
            )
            self._num_steps = 0

    def begins_with(self, step: int) -> bool:
        """Return whether this step, not taken yet, is the first to trace."""
        return bool(self._num_steps) and step == self._start

    def start(self, state: Any) -> None:
        """Begin to trace, once the devices have done what was asked of them."""
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
        """Return whether this step, just begun, is the last to trace."""
        return self._is_on and step + 1 == self._start + self._num_steps

    def stop(self, state: Any, compiled: Any, *, num_devices: int) -> None:
        """Wait for the last step, end the trace and say what was seen."""
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
        """Drop a trace that the end of the run cut off."""
        if self._is_on:
            self._is_on = False
            with suppress(*_FAILURES):
                jax.profiler.stop_trace()

    def _give_up(self, error: Exception) -> None:
        self._say(f"profile   none: {explain_failure(error)}; the run goes on")
