"""Read the newest whole save of a folder; skip damaged saves, or rename them.

    40     a file differs from its hash             -> skipped, or renamed to 40.damaged
    30     all files are right, arrays are loaded;
           an array differs from its checksum       -> the same
    20     all files and arrays are right           -> returned

With many processes, all call each method and get the same result; each checks its share of the files.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from ...meshes import CheckpointError
from ...meshes.processes.join import num_processes, process_index
from ...meshes.processes.messages import gather_texts, is_first, text_of_first
from .arrays import explain_failure, load_arrays
from .checksum import checksums
from .names import SaveFolder
from .seal import SEAL_FORMAT, Seal, find_damage, read_seal

Arrays = Mapping[str, jax.Array]
Shapes = Mapping[str, jax.ShapeDtypeStruct]

Damaged = Literal["set aside", "pass over"]
"""What to do with a damaged save: rename it, or leave it as it is, for readers that may not change the folder."""


def _say_nothing(_message: str) -> None:
    pass


def _find_nothing(_seal: Seal) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class SaveReader:
    """A reader of the saves in a folder.

    Args:
        folder: the folder of saves.
        damaged: what to do with damaged saves.
        say: called with a message for each damaged save.
        check: further check of a seal; returns the problem, or "" if there is none.
    """

    folder: SaveFolder
    damaged: Damaged = "pass over"
    say: Callable[[str], object] = _say_nothing
    check: Callable[[Seal], str] = _find_nothing

    def newest(self, *, without: Collection[int] = ()) -> Seal | None:
        """Return the seal of the newest save whose files match their hashes, or None; reads every file of a save once.

        Args:
            without: steps to ignore.

        Raises:
            CheckpointError: another format of trellax wrote it.
        """
        tried = set(without)
        # Process 0 names the step, since another may see the folder later. As text: "0" is a step, "" ends the loop.
        while step := text_of_first(str(max(set(self.folder.steps) - tried, default=""))):
            tried.add(int(step))
            seal, problem = self._examine(int(step))
            if not problem:
                return seal
            self._pass_by(int(step), problem)
        return None

    def require_newest(self) -> Seal:
        """Return the seal of the newest whole save.

        Raises:
            CheckpointError: there is no whole save, or another format of trellax wrote the newest.
        """
        was_empty = self.folder.is_empty
        if (seal := self.newest()) is None:
            raise self._nothing_there(was_empty=was_empty)
        return seal

    def read(self, choose: Callable[[Seal], Shapes]) -> tuple[Seal, Arrays]:
        """Return the seal of the newest whole save, and the chosen arrays of it, each sharded as its shape says.

        Args:
            choose: called with a seal before an array is read; returns the shapes of the arrays to read, by path, or
                raises to refuse the save.

        Raises:
            CheckpointError: there is no whole save, or it cannot be loaded.
        """
        was_empty, wrong = self.folder.is_empty, set[int]()
        while (seal := self.newest(without=wrong)) is not None:
            arrays = _load(self.folder / seal.step, choose(seal))
            # Files are hashed after they were written, arrays before: this also covers what lies between the two.
            problem = _compare(arrays, seal)
            if not problem:
                return seal, arrays
            self._pass_by(seal.step, problem)
            wrong.add(seal.step)
        raise self._nothing_there(was_empty=was_empty)

    def _examine(self, step: int) -> tuple[Seal | None, str]:
        folder = self.folder / step
        seal, problem = read_seal(folder)
        if seal is not None and seal.format != SEAL_FORMAT:
            raise CheckpointError(
                f"{folder} has format {seal.format}; this trellax reads format {SEAL_FORMAT}.",
                fix="use the trellax it was saved with.",
            )
        if seal is not None:
            share = (process_index(), num_processes())
            problem = self.check(seal) or "; ".join(find_damage(folder, seal, share=share)[:3])
        # Each process has checked its share of the files; what one of them finds is a problem for all.
        return seal, "; ".join(dict.fromkeys(filter(None, gather_texts(problem))))

    def _pass_by(self, step: int, problem: str) -> None:
        what = f"checkpoint {step} is damaged: {problem}."
        if self.damaged == "pass over":
            self.say(f"{what} The one before is used.")
            return
        aside = ""
        if is_first():
            try:
                aside = self.folder.set_aside(step).name
            except OSError as error:
                raise CheckpointError(
                    f"{what} It cannot be set aside: {error.strerror}.", fix=f"make {self.folder.path} writable."
                ) from None
        self.say(f"{what} It is kept as {text_of_first(aside)}, and the one before is used.")

    def _nothing_there(self, *, was_empty: bool) -> CheckpointError:
        if was_empty:
            return CheckpointError(f"{self.folder.path} holds no checkpoint.", fix="train from the start.")
        return CheckpointError(
            f"{self.folder.path} holds no whole checkpoint: what is there is damaged.",
            fix="put a copy back in its place, or start over with --fresh --force, which keeps what is there.",
        )


def _load(folder: Path, shapes: Shapes) -> Arrays:
    try:
        return load_arrays(folder, shapes)
    except Exception as error:
        # All hashes matched, so it is not damaged: memory may be short, or a disk unreachable for a moment.
        raise CheckpointError(
            f"{folder} is whole, but cannot be loaded: {explain_failure(error)}.",
            fix="give it more memory or devices, then the same command again; to do without it, move it elsewhere.",
        ) from error


def _compare(arrays: Arrays, seal: Seal) -> str:
    """Return the problem with loaded arrays, by their checksums; "" if they are those that were saved."""
    sums = checksums(arrays)
    return next((f"{path} is not what was saved" for path in arrays if sums[path] != seal.arrays[path][2]), "")
