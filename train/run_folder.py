"""The folder of a run, held by one run at a time: opened, locked, and cleared of what a killed run left."""

import contextlib
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TextIO

from ..meshes import ConfigError, RunError
from .metrics import METRICS_FILE, PLOT_FILE, SUMMARY_FILE
from .save_folder import FOLDER, SaveFolder, free_name
from .together import first_does

LOCK_FILE = "lock"
ASIDE = "aside"
_LEFT_BY_A_RUN = (METRICS_FILE, SUMMARY_FILE, PLOT_FILE, "tensorboard", FOLDER)
"""Saves last: moved in part, it is still a run. The rest is no run's: an imported model's config and tokenizer."""

Start = Literal["resume", "fresh", "replace"]
"""Go on from the newest save; start over, where nothing is saved; or start over and set aside what is there."""


@contextlib.contextmanager
def open_run_folder(folder: Path, *, start: Start, say: Callable[[str], object]) -> Iterator[None]:
    """Hold a run's folder as its only run; all processes of a run call it together.

    Raises:
        ConfigError: it cannot be written.
        RunError: another run holds it, or a fresh start would overwrite what is there.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
                held.enter_context(_lock(folder, say))
                SaveFolder(folder / FOLDER).drop_unfinished()
                if start != "resume":
                    _clear(folder, start=start, say=say)
            except OSError as error:
                raise ConfigError(
                    f"the run folder {folder} cannot be written: {error.strerror}.",
                    fix="make room, or set run.folder to a place that can.",
                ) from None

        first_does(take)
        yield


@contextlib.contextmanager
def _lock(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """The kernel lets go of the lock when its process ends, however it ends: a lock is never stale."""
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"the run folder {folder} is in use by {_read_holder(file)}.",
                fix="wait for that run, stop it, or set another run.name.",
            ) from None
        if (before := _read_holder(file)) != _NOBODY:
            say(f"the run before, {before}, ended without a goodbye")
        _write_holder(file, {"process": os.getpid(), "host": socket.gethostname()})
        try:
            yield
        finally:
            _write_holder(file, None)


_NOBODY = "another process"


def _read_holder(file: TextIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['process']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return _NOBODY


def _write_holder(file: TextIO, holder: Mapping[str, object] | None) -> None:
    file.truncate(0)
    if holder:
        file.write(json.dumps(holder))
    file.flush()


def _clear(folder: Path, *, start: Start, say: Callable[[str], object]) -> None:
    saves = SaveFolder(folder / FOLDER)
    if saves.is_empty and not (folder / METRICS_FILE).exists():
        return
    what = f"saves of steps {', '.join(map(str, saves.steps))}" if saves.steps else "an unsaved run"
    if start == "fresh":
        raise RunError(
            f"{folder} already holds {what}.",
            fix="leave out --fresh to go on from there, set another run.name, or add --force, which moves what is "
            "there into a folder beside.",
        )
    aside = free_name(folder / ASIDE)
    aside.mkdir()
    for name in _LEFT_BY_A_RUN:
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    say(f"moved     {what} to {aside}")
