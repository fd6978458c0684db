"""Whatever a model folder holds: exit code 0 or 2, a short message, a minute, 4 GB, and nothing of what is outside."""

import faulthandler
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from trellax.commands import generate as generate_command
from trellax.commands.cli import main

from ..hub.hub import GOLDEN
from .crafted import SECRET, Draw, add_tokenizer, craft, damage, set_trap

SECONDS, BYTES = 60, 4 << 30
SAMPLE = range(0, 300, 40)


class ReadyError(Exception):
    """A model is read, and would be compiled."""


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop where compiling begins: all that comes from the folder has been read by then."""

    def stop(*_: Any, **__: Any) -> None:
        raise ReadyError

    monkeypatch.setattr(generate_command, "Engine", stop)


@contextmanager
def limited() -> Iterator[None]:
    """Fail after a minute, or if memory grew to 4 GB; end the process where not even a signal is heard."""

    def ring(*_: Any) -> None:
        raise AssertionError(f"over {SECONDS} s")

    before, start, held = signal.signal(signal.SIGALRM, ring), time.monotonic(), reset_peak()
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
    assert time.monotonic() - start < SECONDS
    assert peak_bytes() - held < BYTES


def reset_peak() -> int:
    """Let the kernel measure this process's peak anew, whose tests before held more, and return what it holds."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def check(words: list[str], told: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> int:
    """Run a command; whatever it ends with, nothing of what must not happen has happened."""
    capfd.readouterr()
    with limited():
        try:
            code = main(words)
        except ReadyError:
            code = 0
    out, err = capfd.readouterr()
    assert code in (0, 2), (told, code, err)
    assert code == 0 or 0 < len(err.encode()) < 2_500, (told, err[:3_000])
    assert "Traceback" not in err, (told, err)
    assert "panicked" not in err, (told, err)
    assert "\x1b" not in out + err, (told, err)
    assert SECRET not in out + err, told
    assert (place / "secret").stat().st_atime == 1, (told, "the secret was read")
    files = [file for file in (place / "out").rglob("*") if file.is_file()]
    assert not any(SECRET.encode() in file.read_bytes() for file in files), told
    assert code == 0 or words[0] == "generate" or not list(place.glob("out*")), told
    return code


def try_folder(seed: int, place: Path, capfd: pytest.CaptureFixture[str]) -> set[int]:
    """Import a crafted folder and ask it; return both exit codes."""
    told = craft(place / "model", seed)
    codes = {
        check(["import-hf", str(place / "model"), str(place / "out")], told, place, capfd),
        check(["generate", str(place / "model"), "--prompt", "AB", "--max-new-tokens", "4"], told, place, capfd),
    }
    shutil.rmtree(place)
    return codes


def test_a_crafted_folder_is_read_or_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert {code for seed in SAMPLE for code in try_folder(seed, make_place(tmp_path, seed), capfd)} == {0, 2}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 300, 20))
def test_crafted_folders_are_read_or_refused(first: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(first, first + 20):
        try_folder(seed, make_place(tmp_path, seed), capfd)


@pytest.mark.slow
def test_other_entries_of_a_run_folder_are_read_or_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN / "llama3", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    assert main(["import-hf", str(tmp_path / "model"), str(tmp_path / "run")]) == 0
    for seed in range(60):
        place = make_place(tmp_path, seed)
        run = place / "model"
        shutil.copytree(tmp_path / "run", run)
        saves = run.rename(place / "saves") / "checkpoints"
        # Damage of saves themselves has tests of its own.
        run.mkdir()
        for file in saves.parent.iterdir():
            if file.is_file():
                file.rename(run / file.name)
        set_trap(place)
        told = damage(run, Draw(seed))
        saves.rename(run / "checkpoints")
        check(["export-hf", str(run), str(place / "out"), "--architecture", "llama"], told, place, capfd)
        check(["generate", str(run), "--prompt", "AB", "--max-new-tokens", "4"], told, place, capfd)
        shutil.rmtree(place)


def make_place(tmp_path: Path, seed: int) -> Path:
    """A folder for one folder and what must stay out of it."""
    place = tmp_path / str(seed)
    place.mkdir()
    return place
