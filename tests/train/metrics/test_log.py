"""Metrics and summary are read back as written, survive a kill and a resume, and can be drawn."""

import json
from pathlib import Path

import pytest
from trellax.meshes import RunError
from trellax.train.metrics import (
    MetricsLog,
    Summary,
    draw_loss,
    last_loss,
    peak_memory_bytes,
    read_metrics,
    read_summary,
    write_summary,
)


def write_steps(folder: Path, steps: range, *, resumed_step: int = 0) -> None:
    with MetricsLog(folder, resumed_step=resumed_step) as log:
        for step in steps:
            log.write(step, {"loss": 5.0 / step, "val_loss": 5.5 / step if step % 2 == 0 else None})


def summary_of(folder: Path) -> Summary:
    return Summary(
        ended="done",
        steps=20,
        final_train_loss=2.5,
        final_val_loss=float("nan"),
        tokens_per_s=1234.5,
        wall_time_s=9.75,
        mesh="data=2 tensor=2 pipe=2",
        schedule="1f1b",
        folder=str(folder),
    )


def test_lines_are_read_back_as_written(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 2.5, "val_loss": 2.75}]


def test_resume_drops_the_lines_of_steps_to_be_retaken(tmp_path: Path) -> None:
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
def test_full_disk_is_an_error_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log, Path("/dev/full").open("wb", buffering=0) as full:
        log._events.close()
        log._events._file = full
        with pytest.raises(OSError, match="No space left"):
            log.write(1, {"loss": 1.0})


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_number_that_is_not_finite_becomes_null(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": float("nan"), "peak_memory_bytes": 7})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "peak_memory_bytes": 7}\n'
    assert capfd.readouterr().err == ""


def test_malformed_lines_are_left_out(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    strange = ['{"step": "3"}', '{"step": true}', '{"step": -1}', f'{{"step": {10**400}}}', "[" * 100_000]
    strange += ['{"step": 3, "loss": NaN}', f'{{"step": 3, "loss": {10**400}}}', '{"step": 3, "loss": [1]}']
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("".join(f"{text}\n" for text in strange))
    write_steps(tmp_path, range(3, 4), resumed_step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_removed_log_is_written_again_in_full(tmp_path: Path) -> None:
    told: list[str] = []
    with MetricsLog(tmp_path, say=told.append) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": 1.0})
            if step == 2:
                (tmp_path / "metrics.jsonl").unlink()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert told[0].endswith("metrics.jsonl was removed or replaced while the run wrote it; it is there again, whole")


def test_log_removed_after_its_last_line_is_written_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        (tmp_path / "metrics.jsonl").unlink()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_replaced_log_is_written_again_and_the_other_file_is_kept(tmp_path: Path) -> None:
    told: list[str] = []
    with MetricsLog(tmp_path, say=told.append) as log:
        log.write(1, {"loss": 1.0})
        (tmp_path / "other").write_text("other")
        (tmp_path / "other").rename(tmp_path / "metrics.jsonl")
        log.write(2, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl-2").read_text() == "other"
    assert told[0].endswith("whole, and the other file is metrics.jsonl-2")


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_log_of_a_moved_folder_is_not_split(is_made_anew: bool, tmp_path: Path) -> None:
    told = pytest.raises(RunError, match="run was moved or removed while the run wrote to it")
    with told, MetricsLog(tmp_path / "run") as log:
        log.write(1, {"loss": 1.0})
        (tmp_path / "run").rename(tmp_path / "away")
        if is_made_anew:
            (tmp_path / "run").mkdir()
        log.write(2, {"loss": 1.0})
    assert len(read_metrics(tmp_path / "away")) == 2
    assert read_metrics(tmp_path / "run") == []


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("theirs")
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "summary.json", "loss.png"):
        for end in ("", ".part"):
            (tmp_path / "run" / f"{name}{end}").symlink_to(tmp_path / "outside")
    write_steps(tmp_path / "run", range(1, 3))
    draw_loss(tmp_path / "run")
    write_summary(summary_of(tmp_path / "run"))
    assert (tmp_path / "outside").read_text() == "theirs"
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_symlink() or path.suffix == ".part"]


def test_summary_is_written_as_json(tmp_path: Path) -> None:
    path = write_summary(summary_of(tmp_path))
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
        "final_val_losses": {},
    }
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


STRANGE_SUMMARIES = ["[]", "{}", "[" * 100_000, '{"ended": 1}', "\0"]
STRANGE_VALUES = [("tokens_per_s", "fast"), ("tokens_per_s", None), ("wall_time_s", [1]), ("steps", {}), ("mesh", 7)]


@pytest.mark.parametrize("text", STRANGE_SUMMARIES)
def test_malformed_summary_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text)
    assert read_summary(tmp_path) is None


@pytest.mark.parametrize(("key", "value"), STRANGE_VALUES)
def test_summary_with_a_value_of_another_type_is_none(key: str, value: object, tmp_path: Path) -> None:
    path = write_summary(summary_of(tmp_path))
    assert read_summary(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert read_summary(tmp_path) is None


def test_loss_is_plotted(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 9))
    path = draw_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_run_without_a_loss_has_no_plot(tmp_path: Path) -> None:
    assert draw_loss(tmp_path) is None


def test_peak_memory_counts_what_the_process_held() -> None:
    assert 50e6 < peak_memory_bytes() < 1e12
