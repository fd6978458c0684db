"""Time training steps, and split each into waiting for input, waiting for the devices, and work of the host."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Wait = Literal["input", "device"]
"""What the host waits for."""


class StepTimer:
    """Measure seconds per step, as a mean over the last `window` steps and over all of them.

    Validation and saving belong to no step: `restart` is called after them.

    >>> timer = StepTimer(window=10)
    >>> with timer.waiting("input"):
    ...     pass
    >>> timer.end_step()
    >>> sorted(timer.breakdown_s)
    ['device_s', 'host_s', 'input_s']
    """

    def __init__(self, *, window: int) -> None:
        # Of each step: its time, and the parts of it spent waiting for input and for the devices.
        self._recent_s: deque[tuple[float, float, float]] = deque(maxlen=window)
        self._total_s, self._num_steps = 0.0, 0
        self.restart()

    @contextmanager
    def waiting(self, what: Wait) -> Iterator[None]:
        """Count the time inside the context as waiting."""
        start_s = time.perf_counter()
        yield
        self._waited_s[what] += time.perf_counter() - start_s

    def end_step(self) -> None:
        """End the current step and begin the next one."""
        now_s = time.perf_counter()
        step_s = now_s - self._start_s
        self._recent_s.append((step_s, self._waited_s["input"], self._waited_s["device"]))
        self._total_s += step_s
        self._num_steps += 1
        self._begin(now_s)

    def restart(self) -> None:
        """Begin a step now; the time since the last `end_step` is not counted."""
        self._begin(time.perf_counter())

    def _begin(self, now_s: float) -> None:
        self._start_s, self._waited_s = now_s, {"input": 0.0, "device": 0.0}

    @property
    def step_time_s(self) -> float:
        """Mean time of the last `window` steps."""
        return self._mean_recent(0)

    @property
    def breakdown_s(self) -> dict[str, float]:
        """Parts of `step_time_s`: waiting for the devices, waiting for input, and the host's own work."""
        input_s, device_s = self._mean_recent(1), self._mean_recent(2)
        return {"device_s": device_s, "input_s": input_s, "host_s": self.step_time_s - input_s - device_s}

    @property
    def mean_step_time_s(self) -> float:
        """Mean time of all steps; infinite before the first."""
        return self._total_s / self._num_steps if self._num_steps else math.inf

    def _mean_recent(self, index: int) -> float:
        return sum(step[index] for step in self._recent_s) / len(self._recent_s)
