"""How long steps take, and what the host does meanwhile: waits for input, waits for the devices, or works itself."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Wait = Literal["input", "device"]
"""What the host waits for."""


class Pace:
    """Seconds per step, over the last `window` steps and over all, without pauses for validation and saving.

    >>> pace = Pace(window=10)
    >>> with pace.waiting("input"):
    ...     pass
    >>> pace.tick()
    >>> sorted(pace.parts_s)
    ['device_s', 'host_s', 'input_s']
    """

    def __init__(self, *, window: int) -> None:
        self._recent_s: deque[tuple[float, float, float]] = deque(maxlen=window)
        self._total_s, self._num_steps = 0.0, 0
        self.restart()

    @contextmanager
    def waiting(self, what: Wait) -> Iterator[None]:
        """Count the time inside as waited."""
        start_s = time.perf_counter()
        yield
        self._waited_s[what] += time.perf_counter() - start_s

    def tick(self) -> None:
        """End a step and begin the next."""
        now_s = time.perf_counter()
        step_s = now_s - self._last_s
        self._recent_s.append((step_s, self._waited_s["input"], self._waited_s["device"]))
        self._total_s += step_s
        self._num_steps += 1
        self._begin(now_s)

    def restart(self) -> None:
        """Begin a step now; what came before belongs to none."""
        self._begin(time.perf_counter())

    def _begin(self, now_s: float) -> None:
        self._last_s, self._waited_s = now_s, {"input": 0.0, "device": 0.0}

    @property
    def step_time_s(self) -> float:
        """Mean of the last steps."""
        return self._mean_recent(0)

    @property
    def parts_s(self) -> dict[str, float]:
        """What the last steps' mean consists of on the host; where the devices set the pace, most is `device_s`."""
        input_s, device_s = self._mean_recent(1), self._mean_recent(2)
        return {"device_s": device_s, "input_s": input_s, "host_s": self.step_time_s - input_s - device_s}

    @property
    def mean_step_time_s(self) -> float:
        """Mean of all steps; infinite if there was none."""
        return self._total_s / self._num_steps if self._num_steps else math.inf

    def _mean_recent(self, index: int) -> float:
        return sum(step[index] for step in self._recent_s) / len(self._recent_s)
