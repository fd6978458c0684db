"""The folder of a run's saves: which names mean what, so that a process may be killed at any moment.

`40` is a finished save; `40.part` (and Orbax's names that start with it) one that is being written, `40.removing` one
that is being removed, and `40.damaged` one that is kept for a person to look at. Every change of meaning is a rename.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

FOLDER = "checkpoints"
"""What a run folder calls the folder of its saves."""


@dataclass(frozen=True)
class SaveFolder:
    """The saves under one path, which need not exist yet."""

    path: Path

    @property
    def steps(self) -> list[int]:
        """Steps of the finished saves, damaged or not, oldest first."""
        return sorted(int(name) for name in self.names if name.isdigit())

    @property
    def names(self) -> list[str]:
        """Names of everything here."""
        return sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever saved here, nor set aside."""
        return not self.steps and not any(".damaged" in name for name in self.names)

    def __truediv__(self, step: int) -> Path:
        return self.path / str(step)

    def part(self, step: int) -> Path:
        """Where the save of a step is written."""
        return self.path / f"{step}.part"

    def publish(self, step: int) -> None:
        """Make a written save a finished one, on the disk for good: older ones may go once this returns.

        Raises:
            OSError: there is one of that step already, or the system refuses.
        """
        part = self.part(step)
        for path in (*part.rglob("*"), part):
            _force_to_disk(path)
        part.rename(self / step)
        _force_to_disk(self.path)

    def remove(self, step: int) -> None:
        """Remove a finished save."""
        gone = free_name(self.path / f"{step}.removing")
        (self / step).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def set_aside(self, step: int) -> Path:
        """Give a damaged save another name, and return it.

        Raises:
            OSError: the folder cannot be changed.
        """
        return (self / step).rename(free_name(self.path / f"{step}.damaged"))

    def drop_unfinished(self, step: int | None = None) -> None:
        """Remove what was not finished, of one step or of all; not while another process writes here."""
        for name in self.names:
            number, _, rest = name.partition(".")
            if rest.startswith(("part", "removing")) and step in (None, int(number) if number.isdigit() else None):
                shutil.rmtree(self.path / name, ignore_errors=True)

    def prune(self, *, keep: int, keep_every: int) -> None:
        """Remove all saves but the newest `keep` and those of every `keep_every` steps (0: of none)."""
        for step in self.steps[:-keep]:
            if not (keep_every and step % keep_every == 0):
                self.remove(step)


def _force_to_disk(path: Path) -> None:
    # Orbax leaves its own records to the system, which may write them after the rename that makes the save count.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(path: Path) -> Path:
    """Return the path, or the first of `path-2`, `path-3`, ... where it is taken."""
    names = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))]
    return next(name for name in names if not os.path.lexists(name))
