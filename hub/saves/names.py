"""Name, publish and remove the saves in a folder, so that the process may be killed at any moment.

    40            a finished save of step 40
    40.part       a save being written (also Orbax's names that start with it)
    40.removing   a save being removed
    40.damaged    a damaged save, kept for a person to inspect

Every change of state is one rename, which is atomic. Other names, such as `007` or `photos.part`, do not belong to
trellax, and are never read, renamed or removed.
"""

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ...meshes import CheckpointError
from ...meshes.files.own_file import free_name

FOLDER = "checkpoints"
"""The name of the folder of saves in a run folder."""

_STEP = r"(?P<step>0|[1-9][0-9]{0,17})"
_NAME = re.compile(
    _STEP + r"(?P<rest>|\.part(?:\.orbax-checkpoint-tmp[\w.-]*)?|\.removing(?:-[0-9]+)?|\.damaged(?:-[0-9]+)?)",
    re.ASCII,
)


def is_own_name(name: str) -> bool:
    """Return whether an entry of a folder of saves belongs to trellax, by its name."""
    return _NAME.fullmatch(name) is not None


def read_step(name: str) -> int | None:
    """Return the step of a finished save, by its name; None for every other name."""
    return int(name) if re.fullmatch(_STEP, name) else None


@dataclass(frozen=True)
class SaveFolder:
    """The saves under one path, which need not exist yet."""

    path: Path

    @property
    def steps(self) -> list[int]:
        """Steps of the finished saves, damaged or not, oldest first."""
        return sorted(step for name in self.names if (step := read_step(name)) is not None)

    @property
    def names(self) -> list[str]:
        """Names of everything in the folder.

        Raises:
            CheckpointError: the folder is a link, so its target is not a part of the run.
        """
        if self.path.is_symlink():
            raise CheckpointError(
                f"{self.path} is a link, and the saves of a run are in a folder of its own.",
                fix="put a copy of what it leads to in its place; the run folder itself may be a link.",
            )
        return sorted(os.listdir(self.path)) if self.path.is_dir() else []  # noqa: PTH208

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a finished save nor a damaged one that was set aside."""
        return not any(is_own_name(name) and not _is_unfinished(name) for name in self.names)

    def __truediv__(self, step: int) -> Path:
        return self.path / str(step)

    def part(self, step: int) -> Path:
        """Return the folder in which the save of a step is written."""
        return self.path / f"{step}.part"

    def publish(self, step: int) -> None:
        """Flush a written save to the disk and rename it to its step; older saves may be removed afterwards.

        Raises:
            OSError: there is a save of that step already, or the system refuses.
        """
        part = self.part(step)
        # Content before names: a name on the disk whose content is lost would look like a finished save.
        for path in (*part.rglob("*"), part):
            _force_to_disk(path)
        part.rename(self / step)
        _force_to_disk(self.path)

    def remove(self, step: int) -> None:
        """Remove a finished save.

        Raises:
            OSError: it cannot be renamed.
        """
        gone = free_name(self.path / f"{step}.removing")
        (self / step).rename(gone)
        _remove_tree(gone)

    def set_aside(self, step: int) -> Path:
        """Rename a damaged save, and return its new path.

        Raises:
            OSError: the folder cannot be changed.
        """
        return (self / step).rename(free_name(self.path / f"{step}.damaged"))

    def drop_unfinished(self, step: int | None = None) -> None:
        """Remove unfinished saves, of one step or of all; do not call it while another process writes here."""
        for name in self.names:
            found = _NAME.fullmatch(name)
            if found and _is_unfinished(name) and step in (None, int(found["step"])):
                _remove_tree(self.path / name)

    def prune(self, *, keep: int, keep_every: int) -> None:
        """Remove all saves except the newest `keep` and those of multiples of `keep_every` steps (0: none).

        Raises:
            OSError: a save cannot be renamed.
        """
        for step in self.steps[:-keep]:
            if not (keep_every and step % keep_every == 0):
                self.remove(step)


def _is_unfinished(name: str) -> bool:
    found = _NAME.fullmatch(name)
    return found is not None and found["rest"].startswith((".part", ".removing"))


def _remove_tree(path: Path) -> None:
    # rmtree follows no links. It gives up on folders nested a thousand deep, which trellax never makes.
    with contextlib.suppress(RecursionError):
        shutil.rmtree(path, ignore_errors=True)


def _force_to_disk(path: Path) -> None:
    # Orbax does not flush its metadata; after a power cut the renamed save could lack it.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
