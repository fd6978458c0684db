"""What a run writes down can be read back, survives a kill and a resume, and can be drawn."""

import json
from pathlib import Path

import pytest
from tensorboardX.record_writer import RecordWriter
from trellax.train.metrics import (
    MetricsLog,
    Summary,
    draw_loss,
    last_loss,
    peak_memory_bytes,
    read_metrics,
    write_summary,
)


def write_steps(folder: Path, steps: range, *, resumed_step: int = 0) -> None:
    with MetricsLog(folder, resumed_step=resumed_step) as log:
        for step in steps:
            log.write(step, {"loss": 5.0 / step, "val_loss": 5.5 / step if step % 2 == 0 else None})


def test_lines_are_read_back_as_written(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 2.5, "val_loss": 2.75}]


def test_resume_drops_the_lines_that_will_come_again(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, range(4, 7), resumed_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, range(1, 2))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write_steps(tmp_path, range(4, 5), resumed_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_lines_that_a_crash_has_damaged_are_left_out(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\xff\xfe\n3\n{"loss": 1.0}\n{"step": 3, "loss": 2.0}\n')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_last_loss_is_that_of_a_step_that_was_taken(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None, "skipped": 1}, {"step": 3, "val_loss": 2.0}]
    assert last_loss([*lines, {"step": 4, "loss": 1.0}], step=3) == 3.0
    assert last_loss(lines, step=0) is None


@pytest.mark.timeout(30)
def test_full_disk_is_told_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fill(log: MetricsLog) -> None:
        for step in range(1, 100):
            log.write(step, {"loss": 1.0})

    with MetricsLog(tmp_path) as log:
        monkeypatch.setattr(RecordWriter, "write", refuse)
        with pytest.raises(OSError, match="No space left"):
            fill(log)


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_number_that_is_not_finite_becomes_null(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": float("nan"), "peak_memory_bytes": 7})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "peak_memory_bytes": 7}\n'
    assert capfd.readouterr().err == ""


def test_tensorboard_gets_its_events(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"val_loss" in events.read_bytes()


def test_summary_says_what_became_of_the_run(tmp_path: Path) -> None:
    summary = Summary(
        ended="done",
        steps=20,
        final_train_loss=2.5,
        final_val_loss=float("nan"),
        tokens_per_s=1234.5,
        wall_time_s=9.75,
        mesh="data=2 tensor=2 pipe=2",
        schedule="1f1b",
        folder=str(tmp_path),
    )
    path = write_summary(summary)
    assert json.loads(path.read_text()) == {
        "ended": "done",
        "steps": 20,
        "final_train_loss": 2.5,
        "final_val_loss": None,
        "tokens_per_s": 1234.5,
        "wall_time_s": 9.75,
        "mesh": "data=2 tensor=2 pipe=2",
        "schedule": "1f1b",
        "folder": str(tmp_path),
    }
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_loss_is_drawn_as_a_picture(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 9))
    path = draw_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_run_without_a_line_has_no_picture(tmp_path: Path) -> None:
    assert draw_loss(tmp_path) is None


def test_peak_memory_counts_what_the_process_held() -> None:
    assert 50e6 < peak_memory_bytes() < 1e12
