"""What a run counts as the time of its steps, on a clock of our own: no device, no training."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from trellax.train import pace, run
from trellax.train.metrics import NoLog
from trellax.train.run import Run

STEP_S, VALIDATION_S, SAVE_S, PROFILE_S = 1.0, 7.0, 11.0, 13.0


class Device:
    """A device that works through what it was given, in order, and a clock that only waiting moves."""

    def __init__(self) -> None:
        self.now_s = self.is_free_at_s = 0.0

    def work(self, time_s: float) -> float:
        self.is_free_at_s = max(self.now_s, self.is_free_at_s) + time_s
        return self.is_free_at_s

    def wait(self, until_s: float) -> None:
        self.now_s = max(self.now_s, until_s)


class Scalar:
    """A number that is there when its step is done."""

    def __init__(self, device: Device, ready_s: float) -> None:
        self._device, self._ready_s = device, ready_s

    def __float__(self) -> float:
        self._device.wait(self._ready_s)
        return 2.5

    def __bool__(self) -> bool:
        return True


class Profile:
    """Traces the steps 4 and 5, and takes its time at both ends."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def begin_after(self, first_step: int, *, steps: int) -> None:
        pass

    def begins_with(self, step: int) -> bool:
        return step == 4

    def ends_with(self, step: int) -> bool:
        return step == 5

    def start(self, state: object) -> None:
        self._device.wait(self._device.work(PROFILE_S))

    def stop(self, state: object, compiled: object, *, num_devices: int) -> None:
        self._device.wait(self._device.work(PROFILE_S))

    def close(self) -> None:
        pass


def make_run(device: Device, monkeypatch: pytest.MonkeyPatch, **due: int) -> Any:
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: device.now_s))
    monkeypatch.setattr(Run, "_make_batch", lambda self, step: {})
    taken: Any = object.__new__(Run)

    def step(state: int, batch: object, peak_rate: object) -> tuple[int, Any]:
        loss = Scalar(device, device.work(STEP_S))
        return state + 1, SimpleNamespace(loss=loss, grad_norm=loss, lr=loss, taken=loss)

    train = SimpleNamespace(steps=9, eval_every=due.get("eval_every", 0), log_every=3)
    checkpoint = SimpleNamespace(every=due.get("save_every", 0))
    taken.config = SimpleNamespace(train=train, checkpoint=checkpoint, run_folder=Path())
    taken.setup = SimpleNamespace(mesh=SimpleNamespace(devices=np.zeros(1)), peak_rate=None)
    taken.console, taken.profile = Console(file=io.StringIO()), Profile(device)
    taken.pace, taken.state, taken.first_step, taken.train_step = pace.Pace(window=3), 0, 0, step
    taken.tokens_per_step, taken.flops_per_token, taken.peak_flops, taken._bad_in_a_row = 8, 1.0, None, 0
    taken.validate = lambda: device.wait(device.work(VALIDATION_S)) or 2.0
    taken.save = lambda: device.wait(device.work(SAVE_S))
    return taken


@pytest.mark.parametrize("due", [{}, {"eval_every": 1}, {"eval_every": 2, "save_every": 3}])
def test_a_step_takes_as_long_whatever_comes_between_steps(
    due: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    taken = make_run(device, monkeypatch, **due)
    recent_s: list[float] = []
    monkeypatch.setattr(run.StepProgress, "advance", lambda *_, **__: recent_s.append(taken.pace.step_time_s))
    taken.take_steps(SimpleNamespace(is_due=lambda step: False), NoLog())
    assert recent_s == [STEP_S] * 9
    assert taken.pace.mean_step_time_s == STEP_S
