"""The time of a step excludes validation, saving and profiling; measured with a simulated clock and device."""

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from trellax.train import loop
from trellax.train.intervals import Intervals
from trellax.train.loop import take_steps
from trellax.train.metrics import NoLog, step_timer
from trellax.train.metrics.plateau import Plateau
from trellax.train.metrics.progress import StepProgress
from trellax.train.metrics.step_timer import StepTimer
from trellax.train.metrics.throughput import Throughput
from trellax.train.run import Run
from trellax.train.saver import StateSaver

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
    """Traces the steps 5 and 6, and takes its time at both ends."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def begin_after(self, first_step: int, *, steps: int) -> None:
        pass

    def begins_with(self, step: int) -> bool:
        return step == 5

    def ends_with(self, step: int) -> bool:
        return step == 6

    def start(self, state: object) -> None:
        self._device.wait(self._device.work(PROFILE_S))

    def stop(self, state: object, compiled: object, *, num_devices: int) -> None:
        self._device.wait(self._device.work(PROFILE_S))

    def close(self) -> None:
        pass


class Checkpoints:
    """Checkpoints that take their time to save."""

    last_step = None

    def __init__(self, device: Device) -> None:
        self._device = device

    def save(self, state: object, setup: object, *, data: object) -> None:
        self._device.wait(self._device.work(SAVE_S))


def make_run(device: Device, monkeypatch: pytest.MonkeyPatch, *, eval_every: int = 0, save_every: int = 0) -> Run:
    monkeypatch.setattr(step_timer, "time", SimpleNamespace(perf_counter=lambda: device.now_s))
    monkeypatch.setattr(loop, "validate", lambda *_: device.wait(device.work(VALIDATION_S)) or 2.0)

    def train(state: Any, batch: object, peak_rate: object) -> tuple[Any, Any]:
        loss = Scalar(device, device.work(STEP_S))
        metrics = SimpleNamespace(
            loss=loss, grad_norm=loss, lr=loss, taken=loss, z_loss=None, router={}, preferences={}, noise={}, block={}
        )
        return SimpleNamespace(step=state.step + 1), metrics

    config = SimpleNamespace(train=SimpleNamespace(steps=9, batch_size=8))
    setup = SimpleNamespace(config=config, mesh=SimpleNamespace(devices=np.zeros(1)), peak_rate=None)
    data = SimpleNamespace(
        train_batch=lambda step: {},
        train=SimpleNamespace(num_sequences=lambda step: step),
        sets={},
        corpus=SimpleNamespace(sha256=""),
    )
    folder, checkpoints = SimpleNamespace(check=lambda: None), Checkpoints(device)
    shared: dict[str, Any] = {"setup": setup, "data": data}
    plateau = Plateau(0)
    saving: dict[str, Any] = {"checkpoints": checkpoints, "folder": folder, "plateau": plateau}
    own: dict[str, Any] = {"compiled": SimpleNamespace(train=train, evaluate=None), "profile": Profile(device)}
    return Run(
        **shared,
        **own,
        saver=StateSaver(**shared, **saving),
        plateau=plateau,
        intervals=Intervals(first_step=0, steps=9, log_every=3, eval_every=eval_every, save_every=save_every),
        timer=StepTimer(window=3),
        throughput=Throughput(tokens_per_step=8, flops_per_token=1.0, peak_flops_per_s=None),
        console=Console(file=io.StringIO()),
        last_loss=None,
    )


@pytest.mark.parametrize("due", [{}, {"eval_every": 1}, {"eval_every": 2, "save_every": 3}])
def test_step_time_excludes_all_that_happens_between_steps(
    due: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    run = make_run(device, monkeypatch, **due)
    recent_s: list[float] = []
    monkeypatch.setattr(StepProgress, "advance", lambda *_, **__: recent_s.append(run.timer.step_time_s))
    never: Any = SimpleNamespace(is_due=lambda step: False)
    state: Any = SimpleNamespace(step=0)
    taken = take_steps(run, state, log=NoLog(), stop=never)
    assert recent_s == [STEP_S] * 9
    assert run.timer.mean_step_time_s == STEP_S
    assert (taken.state.step, taken.last_loss) == (9, 2.5)
