"""A run that is asked to stop, loses what it needs, or learns nonsense: it says so, and what was saved stays."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from trellax.train.metrics import read_metrics

from .conftest import losses
from .zygote import Zygote, is_alive

Golden = Callable[[str, str], None]


def saved_steps(run_folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_folder / "checkpoints").glob("*") if path.name.isdigit())


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP))],
)
def test_run_that_is_asked_to_stop_saves_and_goes_on_later(
    number: signal.Signals, zygote: Zygote, folder: Path, tiny_words: str
) -> None:
    # As many steps as other tests here ask for: the number is compiled into the training step, which jax caches.
    words = f"{tiny_words} --train.steps 4000 --run.name {number.name}"
    child = zygote.start(words)
    child.wait_for("step 200/4000")
    asked = time.monotonic()
    child.kill(number)
    assert zygote.wait(child) == 0, child.said()
    assert time.monotonic() - asked < 25
    (step,) = saved_steps(folder / number.name)
    assert f"stopped by {number.name} after step {step}" in child.out.read_text()
    assert json.loads((folder / number.name / "summary.json").read_text())["ended"] == number.name
    assert max(losses(folder / number.name)) == step >= 200
    again = zygote.start(words)
    again.wait_for(f"resumed   at step {step} ")
    again.kill()
    zygote.wait(again)


@pytest.mark.slow
def test_second_interrupt_stops_at_once(zygote: Zygote, folder: Path, tiny_words: str) -> None:
    child = zygote.start(f"{tiny_words} --train.steps 4000 --run.name twice")
    child.wait_for("compiled  validation")
    # Asked while it stands still, it gets both before it can take a step.
    child.kill(signal.SIGSTOP)
    child.kill(signal.SIGINT)
    child.kill(signal.SIGCONT)
    child.wait_for("once more stops at once")
    child.kill(signal.SIGINT)
    assert zygote.wait(child) in (130, 0), child.said()


def test_interrupt_saves_though_nobody_reads_any_more(zygote: Zygote, folder: Path, tiny_words: str) -> None:
    # As `2>&1 | tee log` does: Ctrl-C ends tee first.
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = zygote.start(f"{tiny_words} --train.steps 4000 --run.name tee", err=pipe)
    said = b""
    while b"step 200/4000" not in said:
        with contextlib.suppress(BlockingIOError):
            said += os.read(reader, 1 << 16)
        assert is_alive(child.pid), said.decode()
        time.sleep(0.01)
    os.close(reader)
    child.kill(signal.SIGINT)
    assert zygote.wait(child) == 0
    assert saved_steps(folder / "tee") == [max(losses(folder / "tee"))]


@pytest.mark.slow
def test_run_whose_outputs_are_full_is_done_and_saved(zygote: Zygote, folder: Path, tiny_words: str) -> None:
    full = Path("/dev/full")
    child = zygote.start(f"{tiny_words} --train.steps 4 --run.name full", out=full, err=full)
    assert zygote.wait(child) == 0
    assert json.loads((folder / "full" / "summary.json").read_text())["ended"] == "done"
    assert saved_steps(folder / "full") == [4]
    json_asked = zygote.start(f"{tiny_words} --train.steps 4 --run.name full --json", out=full)
    assert zygote.wait(json_asked) == 1
    assert f"No space left on device; all is in {folder / 'full'}" in json_asked.said()


def test_lock_refuses_a_second_run_and_is_released_by_a_kill(zygote: Zygote, tiny_words: str) -> None:
    words = f"{tiny_words} --train.steps 4000 --run.name locked"
    first = zygote.start(words)
    # The report comes after the lock, and before the steps are compiled.
    first.wait_for("sha256")
    code, second = zygote.run(words)
    assert code == 2
    assert f"is in use by process {first.pid} on" in second.said()
    first.kill()
    zygote.wait(first)
    third = zygote.start(words)
    third.wait_for(f"the run before, process {first.pid} on")
    third.wait_for("sha256")
    third.kill()
    zygote.wait(third)


DIVERGES = "--train.steps 6 --optimizer.learning_rate 1e30 --optimizer.warmup_steps 0 --checkpoint.every 1"


def test_loss_that_is_not_finite_stops_the_run_with_the_last_good_state(
    zygote: Zygote, folder: Path, tiny_words: str, golden: Golden
) -> None:
    code, child = zygote.run(f"{tiny_words} {DIVERGES} --run.name diverged")
    assert code == 2
    message = child.said()[child.said().index("RunError") :]
    golden("errors/train/run_diverged.txt", message.replace(str(folder), "RUNS"))
    bad = [line for line in read_metrics(folder / "diverged") if "skipped" in line]
    assert len(bad) == 1
    assert saved_steps(folder / "diverged")[-1] == bad[0]["step"] - 1


@pytest.mark.slow
def test_bad_batches_are_skipped_if_asked_up_to_ten_in_a_row(zygote: Zygote, folder: Path, tiny_words: str) -> None:
    words = f"{tiny_words} {DIVERGES} --train.steps 40 --train.bad_step skip --run.name skipped"
    code, child = zygote.run(words)
    assert code == 2
    assert "the batch is left out" in child.said()
    assert "10 steps before it were bad too" in child.said()


@pytest.mark.slow
def test_loss_that_leaps_is_a_spike(zygote: Zygote, folder: Path, tiny_words: str) -> None:
    leap = "--train.steps 6 --optimizer.learning_rate 10 --optimizer.warmup_steps 0"
    code, child = zygote.run(f"{tiny_words} {leap} --run.name leaps")
    assert code == 0, child.said()
    assert max(losses(folder / "leaps").values()) > 10
    code, child = zygote.run(f"{tiny_words} {leap} --train.spike_ratio 1.5 --run.name spike")
    assert code == 2
    assert "is a spike" in child.said()


def test_file_of_the_corpus_that_is_lost_ends_the_run_saved(zygote: Zygote, folder: Path, tiny_words: str) -> None:
    tokens = folder / "tokens.bin"
    np.arange(20_000, dtype=np.uint16).__mod__(250).tofile(tokens)
    child = zygote.start(f"{tiny_words} --data.source tokens --data.paths {tokens} --train.steps 4000 --run.name lost")
    child.wait_for("step 200/4000")
    os.truncate(tokens, 1000)
    assert zygote.wait(child) == 2
    (step,) = saved_steps(folder / "lost")
    assert f"{tokens}: changed while the run read it: 1,000 bytes, not 40,000. Step {step} is saved." in child.said()


def test_save_that_the_system_refuses_ends_the_run_and_the_one_before_stays(
    zygote: Zygote, folder: Path, tiny_words: str, golden: Golden
) -> None:
    words = f"{tiny_words} --checkpoint.every 4 --run.name refused"
    code, _ = zygote.run(f"{words} --train.steps 4")
    assert code == 0
    child = zygote.start(f"{words} --train.steps 20 --override", largest_file=100_000)
    assert zygote.wait(child) == 2
    message = child.said()[child.said().index("CheckpointError") :]
    golden("errors/train/checkpoint_refused.txt", message.replace(str(folder), "RUNS"))
    assert "Traceback" not in child.said()
    assert saved_steps(folder / "refused") == [4]


@pytest.mark.slow
def test_run_whose_save_was_refused_goes_on_later(zygote: Zygote, folder: Path, tiny_words: str) -> None:
    words = f"{tiny_words} --checkpoint.every 4 --train.steps 20 --run.name later"
    child = zygote.start(words, largest_file=100_000)
    assert zygote.wait(child) == 2
    code, again = zygote.run(words)
    assert code == 0, again.said()
    assert saved_steps(folder / "later")[-1] == 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB, which only root may mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_full_disk_ends_the_run_and_what_was_saved_stays(zygote: Zygote, small_disk: Path, tiny_words: str) -> None:
    words = f"{tiny_words} --run.folder {small_disk} --checkpoint.every 1 --checkpoint.keep 9 --train.steps 20"
    code, child = zygote.run(words)
    assert code == 2
    assert "No space left on device" in child.said()
    assert "Traceback" not in child.said()
    newest = saved_steps(small_disk / "tiny-dense")[-1]
    assert f"The save of step {newest} is still there." in child.said()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    code, again = zygote.run(words)
    assert code == 0, again.said()
    assert f"resumed   at step {newest} " in again.said()


@pytest.mark.slow
def test_folder_that_cannot_be_written_is_refused(zygote: Zygote, small_disk: Path, tiny_words: str) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, child = zygote.run(f"{tiny_words} --run.folder {small_disk}/runs")
    assert code == 2
    assert "cannot be written: Read-only file system" in child.said()
