"""Open and lock the folder of a run, and remove the unfinished saves of a killed run.

A run folder may come from another person. So every entry that a run reads, writes or removes must be a regular file or
folder: a link would let the run write or remove outside of its folder. The folder itself may be a link, since the user
names it. `folder_lock.py` has the lock.
"""

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import jax

from ..configs.resolved_config import CONFIG_FILE, is_resolved_config
from ..hub.saves.names import FOLDER, SaveFolder, is_own_name
from ..hub.special_ids import ORIGIN
from ..hub.tokenized_text import TOKENS_FOLDER
from ..hub.tokenizer_files import TOKENIZER_FILES
from ..meshes import ConfigError, RunError
from ..meshes.files.own_file import free_name, identify_file
from ..meshes.files.regular_file import name_kind, walk_folder
from ..meshes.processes.messages import first_does, require_agreement, text_of_first
from .folder_lock import LOCK_FILE, lock_folder
from .metrics import BOARD_FOLDER, METRICS_FILE, PLOT_FILE, SUMMARY_FILE
from .metrics.trackers.open import TRACKERS_FILE

ASIDE = "aside"
PROFILE_FOLDER = "profile"
_LEFT_BY_A_RUN = (METRICS_FILE, SUMMARY_FILE, PLOT_FILE, TRACKERS_FILE, BOARD_FOLDER, FOLDER)
"""Entries that --force moves aside, besides the config.toml of a run. Saves are moved last: if the process is killed in
between, the folder still holds a run. The config and the tokenizer of an imported model stay."""

_FILES = {LOCK_FILE, METRICS_FILE, SUMMARY_FILE, PLOT_FILE, TRACKERS_FILE, *TOKENIZER_FILES, ORIGIN}
_FOLDERS = {BOARD_FOLDER, FOLDER, TOKENS_FOLDER, PROFILE_FOLDER}
_DEPTHS = {PROFILE_FOLDER: 8}
"""Levels of folders that a run writes below a folder; 1 for the others."""
_OLD_CACHE = "xla"

_VISIBLE_S = 10.0
"""Longest time until a network file system shows a file that another machine has written."""

Start = Literal["resume", "fresh", "replace"]
"""Go on from the newest save; start over if nothing is saved; or start over and move what is there aside."""


class HeldFolder:
    """A run folder that this run has locked; with many processes the first one holds the lock."""

    def __init__(self, path: Path, *, take_lock: Callable[[], object]) -> None:
        # Saves are written to the absolute path, so moving a folder above this one is detected too.
        self._path, self._take_lock = path.absolute(), take_lock
        self._ids = self._identify()

    def check(self) -> None:
        """Raise unless the folder is still the one that was opened, and locked; all processes call it.

        A lock file that was removed is made and locked again.

        Raises:
            RunError: the folder was moved or removed, or another run has locked it.
        """
        first_does(self._check)

    def _check(self) -> None:
        ids = self._identify()
        if ids == self._ids:
            return
        if ids[0] != self._ids[0]:
            raise RunError(
                f"{self._path} was moved or removed while the run wrote to it, so nothing more is saved.",
                fix="put it back where it was, then give the same command again.",
            )
        self._take_lock()
        self._ids = self._identify()

    def _identify(self) -> tuple[tuple[int, int] | None, ...]:
        return identify_file(self._path), identify_file(self._path / LOCK_FILE)


@contextlib.contextmanager
def open_run_folder(folder: Path, *, start: Start, say: Callable[[str], object]) -> Iterator[HeldFolder]:
    """Create and lock the folder of a run; all processes of a run call it together.

    Raises:
        ConfigError: it cannot be written.
        RunError: another run has locked it, a fresh start would overwrite a run, an entry is a link, or the processes
            see different folders.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # Tried out, since permissions do not show a full or read-only disk.
                with tempfile.TemporaryFile(dir=folder):
                    pass
                # Links are refused before the lock file is opened, and nothing is removed before the folder is locked.
                check_entries(folder)
                held.enter_context(lock_folder(folder, say=say))
                SaveFolder(folder / FOLDER).drop_unfinished()
                if start != "resume":
                    _clear(folder, start=start, say=say)
            except OSError as error:
                raise ConfigError(
                    f"the run folder {folder} cannot be written: {error.strerror}.",
                    fix="make room, or set run.folder to a place that can.",
                ) from None
            for message in _list_unread(folder):
                say(message)

        first_does(take)
        _require_one_folder(folder)
        yield HeldFolder(folder, take_lock=lambda: held.enter_context(lock_folder(folder, say=say)))


def _list_unread(folder: Path) -> Iterator[str]:
    """Yield a message for each entry that looks like a part of the run and is not read."""
    saves = SaveFolder(folder / FOLDER)
    for name in saves.names:
        if name.isdigit() and not is_own_name(name):
            yield f"{saves.path / name} is no save, since trellax writes no such number: it is not read"
    if (folder / _OLD_CACHE).is_dir():
        yield f"{folder / _OLD_CACHE}, where trellax once kept compiled programs, is not read: it may be removed"


def check_entries(folder: Path) -> None:
    """Raise unless every entry that a run reads, writes or removes is a regular file or folder.

    Raises:
        RunError: an entry is a link, a pipe or a device; the first is named.
        OSError: the folder cannot be read.
    """
    for entry in list(walk_folder(folder, max_depth=1)):
        name = entry.name.removesuffix(".part")
        if name in _FILES:
            _check_kind(entry, wanted="a file")
        elif name in _FOLDERS:
            _check_kind(entry, wanted="a folder")
            for inner in walk_folder(entry.path, max_depth=_DEPTHS.get(name, 1)):
                # Other entries beside the saves, such as a user's link to the best one, are never touched.
                if name != FOLDER or is_own_name(inner.name):
                    _check_kind(inner, wanted="a folder" if inner.is_dir(follow_symlinks=False) else "a file")


def _check_kind(entry: os.DirEntry[str], *, wanted: Literal["a file", "a folder"]) -> None:
    kind = name_kind(entry.stat(follow_symlinks=False).st_mode) or "a file"
    if kind == wanted:
        return
    where = f" to {Path(entry.path).readlink()}" if entry.is_symlink() else ""
    raise RunError(
        f"{entry.path} is {kind}{where}, where a run has {wanted} of its own.",
        fix="move it away, or put a copy of what it leads to in its place; the run folder itself may be a link.",
    )


def _require_one_folder(folder: Path) -> None:
    """Return once every process has read the first one's lock file, which shows that they share the folder."""
    if jax.process_count() == 1:
        return
    place = f"{folder.absolute()} on {socket.gethostname()}"
    held, first = text_of_first(_read_text(folder / LOCK_FILE)), text_of_first(place)
    end = time.monotonic() + _VISIBLE_S
    while not (is_seen := _read_text(folder / LOCK_FILE) == held) and time.monotonic() < end:
        time.sleep(0.2)
    require_agreement("run folder", {"run folder": first if is_seen else place})


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


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
    if is_resolved_config(folder / CONFIG_FILE):
        (folder / CONFIG_FILE).rename(aside / CONFIG_FILE)
    say(f"moved     {what} to {aside}")
