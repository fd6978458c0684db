"""TensorBoard gets every value of metrics.jsonl once, however often the run was killed or resumed."""

import os
from pathlib import Path
from typing import Any

import pytest
from trellax.train.metrics import MetricsLog, read_metrics
from trellax.train.metrics.tensorboard import read_steps

from .event_files import hyperparameters, read_events

Scalars = dict[tuple[str, int], float]


def drawn(folder: Path) -> Scalars:
    """What TensorBoard draws: files by name, a start drops later steps, and no number comes twice or out of order."""
    found: Scalars = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        for event in read_events(file):
            if event.session_log.status == 1:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                assert all(step < event.step for tag, step in found if tag == value.tag)
                found[value.tag, event.step] = value.simple_value
    return found


def recorded(folder: Path) -> dict[tuple[str, int], Any]:
    return {
        (name, line["step"]): pytest.approx(value, rel=1e-6)
        for line in read_metrics(folder)
        for name, value in line.items()
        if name != "step" and value is not None
    }


def call(folder: Path, steps: range, *, resumed_step: int) -> None:
    with MetricsLog(folder, resumed_step=resumed_step) as log:
        for step in steps:
            log.write(step, {"loss": 5.0 / step, "val_loss": 6.0 if step % 2 else None, "bad": float("nan")})


def test_every_value_is_an_event(tmp_path: Path) -> None:
    call(tmp_path, range(1, 5), resumed_step=0)
    assert drawn(tmp_path) == recorded(tmp_path)
    assert len(drawn(tmp_path)) == 6


def test_hyperparameters_are_given_to_the_plugin_and_are_no_scalars(tmp_path: Path) -> None:
    given = {"optimizer.learning_rate": 3e-4, "train.steps": 7, "model.mlp": "gelu", "flag": True}
    for resumed_step in (0, 1):
        with MetricsLog(tmp_path, resumed_step=resumed_step, hyperparameters=given) as log:
            log.write(resumed_step + 1, {"loss": 2.0})
    assert hyperparameters(tmp_path) == [given, given]
    assert read_steps(tmp_path / "tensorboard") == {"loss": {1, 2}}


def test_six_short_calls_in_a_row_lose_no_value(tmp_path: Path) -> None:
    for number in range(6):
        call(tmp_path, range(4 * number + 1, 4 * number + 5), resumed_step=4 * number)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 6
    assert drawn(tmp_path) == recorded(tmp_path)
    assert len(drawn(tmp_path)) == 36


def test_values_are_flushed_before_the_next_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 2.0})
        assert drawn(tmp_path) == {("loss", 1): 2.0}


@pytest.mark.parametrize("lost", [1, 40, 10_000])
def test_events_cut_off_by_a_kill_are_written_at_the_next_start(lost: int, tmp_path: Path) -> None:
    call(tmp_path, range(1, 8), resumed_step=0)
    (events,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(events, max(0, events.stat().st_size - lost))
    call(tmp_path, range(7, 9), resumed_step=6)
    assert drawn(tmp_path) == recorded(tmp_path)
    assert read_steps(tmp_path / "tensorboard") == {"loss": set(range(1, 9)), "val_loss": {1, 3, 5, 7}}


def test_whole_events_are_not_written_twice(tmp_path: Path) -> None:
    call(tmp_path, range(1, 5), resumed_step=0)
    call(tmp_path, range(5, 6), resumed_step=4)
    _, second = sorted((tmp_path / "tensorboard").iterdir())
    assert [event.step for event in read_events(second)] == [0, 5, 5]


def test_values_of_retaken_steps_are_drawn_once(tmp_path: Path) -> None:
    call(tmp_path, range(1, 9), resumed_step=0)
    call(tmp_path, range(4, 7), resumed_step=3)
    assert drawn(tmp_path) == recorded(tmp_path)


def test_clock_that_goes_back_keeps_the_order(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    for name in ("events.out.tfevents.9000000000.host", "events.out.tfevents.9000000000.000000005.host"):
        (tmp_path / "tensorboard" / name).write_bytes(b"")
    call(tmp_path, range(1, 3), resumed_step=0)
    assert sorted(file.name[:41] for file in (tmp_path / "tensorboard").iterdir())[-1].startswith(
        "events.out.tfevents.9000000001.000000000."
    )


@pytest.mark.parametrize("content", [bytes(1000), b"\xff" * 1000, b"text"])
def test_file_without_events_is_skipped(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1.broken").write_bytes(content)
    assert read_steps(tmp_path / "tensorboard") == {}
