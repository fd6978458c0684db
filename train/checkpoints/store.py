"""Write saves in the background: arrays by path and a record for each step; seal them, and remove old ones.

The store does not depend on the trainer; `checkpoints.py` builds arrays and record. A save is written in this order, so
that the process may be killed at any moment; each arrow is a rename or a wait:

    arrays -> 40.part -> all processes are done -> seal.json -> on the disk -> 40 -> older saves are removed

Read `../../hub/saves/seal.py` for the detection of damage, and `../../hub/saves/names.py` for the names.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...hub.saves.arrays import explain_failure, require_all, save_arrays
from ...hub.saves.checksum import checksums
from ...hub.saves.names import FOLDER, SaveFolder
from ...hub.saves.reader import Arrays
from ...hub.saves.seal import Seal, hash_files, write_seal
from ...meshes import CheckpointError
from ...meshes.arguments import check_count
from ...meshes.files.own_file import identify_file
from ...meshes.processes.messages import announce_failure, gather_texts, is_first

Table = Mapping[str, Any]
"""Plain values that JSON can hold."""


@dataclass(frozen=True, kw_only=True)
class _Saving:
    """A save that a thread is finishing."""

    step: int
    future: Future[None]


class SaveStore:
    """The saves of one folder; use as a context manager, which waits for the save under way.

    Opening changes nothing on the disk. With many processes, all call each method at the same steps.

    Args:
        run_folder: the saves are in its folder `checkpoints`.
        keep: number of newest saves to keep.
        keep_every: keep also each save whose step is a multiple of this; 0 keeps none.

    Raises:
        CheckpointError: `keep` or `keep_every` is not a count.
    """

    def __init__(self, run_folder: str | Path, *, keep: int = 1, keep_every: int = 0) -> None:
        check_count("keep", keep, error=CheckpointError)
        check_count("keep_every", keep_every, error=CheckpointError, least=0)
        self.folder = SaveFolder((Path(run_folder) / FOLDER).absolute())
        self._keep, self._keep_every = keep, keep_every
        self._saving: _Saving | None = None
        self._identity: tuple[int, int] | None = None

    def save(self, step: int, arrays: Arrays, *, config: Mapping[str, Table], data: Table) -> None:
        """Start to save arrays under a step, which must have no save yet; waits for the previous save first.

        Returns as soon as the arrays may be changed. A later failure is raised by the next `save` or `wait`.

        Args:
            config: config of the writer, for the record.
            data: position of the writer in its data, for the record.

        Raises:
            CheckpointError: this save cannot be started, or the previous one failed.
        """
        self.wait()
        sums, self._identity = checksums(arrays), identify_file(self.folder.path.parent)
        try:
            wait = save_arrays(self.folder.part(step), arrays)
        except Exception as error:
            raise self._failure(step, explain_failure(error)) from error
        described = {path: (str(leaf.dtype), tuple(leaf.shape), sums[path]) for path, leaf in arrays.items()}
        is_sealed_here = is_first()

        def finish() -> None:
            try:
                wait()
                if is_sealed_here:
                    self._seal(step, arrays=described, config=config, data=data)
            except Exception as error:
                # At once, or two processes deadlock: one waits for the shards of this save, this one for the next save.
                announce_failure(self._failure(step, explain_failure(error)))
                raise

        self._saving = _Saving(step=step, future=_start(finish, name=f"save of step {step}"))

    def wait(self) -> None:
        """Wait until the save under way is complete on all processes.

        Raises:
            CheckpointError: it failed on one of them; earlier saves are still there.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        if error := saving.future.exception():
            # No collective here: the others may be waiting elsewhere. Their watchdogs read the announced failure.
            raise self._failure(saving.step, explain_failure(error)) from error
        # Process 0 seals the files of all. Another process that exited before it is done would end it as well.
        gather_texts("")

    def kept_text(self) -> str:
        """Return a sentence about the newest save, to append to an error."""
        steps = self.folder.steps
        return f"The save of step {steps[-1]} is still there." if steps else "Nothing was saved yet."

    def _seal(self, step: int, **record: Any) -> None:
        """Seal the files of all processes, give the save its name, and remove those that are no longer kept."""
        part, now = self.folder.part(step), datetime.now(UTC).isoformat(timespec="seconds")
        # A save sealed without its index would count as whole, and could not be loaded.
        require_all(part, record["arrays"])
        write_seal(part, Seal(step=step, saved_at=now, files=hash_files(part), **record))
        self.folder.publish(step)
        self.folder.prune(keep=self._keep, keep_every=self._keep_every)

    def _failure(self, step: int, problem: str) -> CheckpointError:
        if is_first():
            self.folder.drop_unfinished(step)
        run_folder = self.folder.path.parent
        if self._identity and self._identity != identify_file(run_folder):
            return CheckpointError(
                f"{run_folder} was moved or removed while the run wrote to it: step {step} is not saved.",
                fix="put it back where it was, then give the same command again.",
            )
        return CheckpointError(
            f"step {step} could not be saved in {self.folder.path}: {problem}. {self.kept_text()}",
            fix="make room, or let it be written, then give the same command again.",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._saving is not None:
            # Only waits: the first error is the one to report, and the other processes may not join a collective.
            self._saving.future.exception()


def _start(work: Callable[[], None], *, name: str) -> Future[None]:
    """Run a function in a thread of its own, which ends with it."""
    threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    future = threads.submit(work)
    threads.shutdown(wait=False)
    return future
