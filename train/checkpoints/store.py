"""The saves of a run folder: written in the background, sealed, kept by policy, restored on any mesh.

A save is `<run folder>/checkpoints/<step>`: every array in the natural order of the layers, and the seal. `natural.py`
says how a state is cut, `../../hub/saves/seal.py` how damage is found, `../../hub/saves/names.py` what the names mean.
"""

import threading
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import jax

from ...configs.run_config import RunConfig
from ...configs.saved_config import read_saved_config
from ...hub.saves.arrays import explain_failure, load_arrays, require_all, save_arrays
from ...hub.saves.checksum import checksums
from ...hub.saves.names import FOLDER, SaveFolder
from ...hub.saves.seal import SEAL_FORMAT, Seal, find_damage, hash_files, read_seal, write_seal
from ...meshes import CheckpointError
from ...meshes.arguments import check_count
from ...meshes.files.own_file import identify_file
from ...meshes.processes.messages import announce_failure, gather_texts, is_first, text_of_first
from ...pipeline import PipelineParams
from ..state import Setup, TrainState
from .natural import Arrays, Shapes, by_path, natural_state

Damaged = Literal["set aside", "pass over"]


def _ignore(_told: object) -> None:
    pass


class Checkpoints:
    """The saves of one run folder; use as a context manager, which waits for a save under way.

    Opening changes nothing on the disk. Of many processes all call each method, at the same steps.

    Args:
        keep: how many of the newest saves to keep.
        keep_every: keep also each save whose step is a multiple of this; 0 keeps none.
        say: told what a person should know, such as a damaged save.
    """

    def __init__(
        self,
        run_folder: str | Path,
        *,
        keep: int = 1,
        keep_every: int = 0,
        say: Callable[[str], object] = _ignore,
    ) -> None:
        check_count("keep", keep, error=CheckpointError)
        check_count("keep_every", keep_every, error=CheckpointError, least=0)
        self.folder = SaveFolder((Path(run_folder) / FOLDER).absolute())
        self.last_step: int | None = None
        """Steps taken at the last save made or restored here."""
        self._keep, self._keep_every, self._say = keep, keep_every, say
        self._saving: _Saving | None = None
        self._place: tuple[int, int] | None = None

    def save(self, state: TrainState, setup: Setup, *, data: Mapping[str, Any] | None = None) -> None:
        """Start to save the state under its step, which has no save yet; waits for the save before.

        Returns as soon as the state may be changed. What fails later is raised by the next `save` or `wait`.

        Args:
            data: what the seal says of the stream of batches.

        Raises:
            CheckpointError: this save cannot be started, or the one before failed.
        """
        arrays = natural_state(setup).from_state(state)
        self._start(int(state.step), arrays, config=setup.config, data=data or {})

    def save_params(self, params: PipelineParams, config: RunConfig) -> None:
        """Start to save parameters in natural order, blocks [L, ...], as those of a run before its first step.

        `restore` gives such a run a fresh optimizer.

        Raises:
            CheckpointError: it cannot be started.
        """
        self._start(0, by_path({"params": params}), config=config, data={})

    def wait(self) -> None:
        """Return when the save under way is whole, on every process.

        Raises:
            CheckpointError: it failed on one of them; what was saved before is still there.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        if error := saving.join():
            # The others may wait for this process elsewhere: they are told by its watch, not asked here.
            raise self._failure(saving.step, explain_failure(error)) from error
        # The first process has the files of all to seal: another that left before it is done would end it, too.
        gather_texts("")

    def newest(self, *, damaged: Damaged = "pass over", without: Collection[int] = ()) -> Seal | None:
        """Return the seal of the newest save whose files are what was written, or None; reads every file once.

        Args:
            without: steps that are not looked at.

        Raises:
            CheckpointError: another format of trellax wrote it.
        """
        tried = set(without)
        while step := text_of_first(str(max(set(self.folder.steps) - tried, default=""))):
            tried.add(int(step))
            seal, problem = self._examine(int(step))
            if not problem:
                return seal
            self._pass_by(int(step), problem, damaged=damaged)
        return None

    def restore(self, setup: Setup, *, accept: Callable[[Seal], object] = _ignore) -> TrainState:
        """Return the newest whole save, placed as this run's mesh wants it; damaged ones are set aside.

        Parameters that were saved alone get a fresh optimizer.

        Args:
            accept: told of the save before its arrays are read; raises to refuse it.

        Raises:
            CheckpointError: there is none, it is of another model or optimizer, or it cannot be loaded.
        """
        natural = natural_state(setup)
        seal, arrays = self._read(natural.shapes, accept=accept, damaged="set aside")
        if seal.has_params_alone:
            state = setup.state_of(natural.to_params(_params_like(natural.params, arrays)))
        else:
            state = natural.to_state(arrays)
        if (step := int(state.step)) != seal.step:
            # Under a later name it would outlive all saves of this run, which would then begin here for ever.
            raise CheckpointError(f"{self.folder / seal.step} holds a state of step {step}.", fix="move it away.")
        return state

    def restore_params(self, shapes: PipelineParams) -> PipelineParams:
        """Return the parameters alone of the newest whole save, in natural order; changes nothing on the disk.

        Args:
            shapes: types and shardings, of `natural_params(setup)` for a run.

        Raises:
            CheckpointError: there is none, it is of another model, or it cannot be loaded.
        """
        _, arrays = self._read(by_path({"params": shapes}), damaged="pass over")
        return _params_like(shapes, arrays)

    def saved_config(self, *, say: Callable[[str], object] = _ignore) -> dict[str, dict[str, Any]]:
        """Return the config that the newest whole save was made with, as `read_saved_config` does.

        Raises:
            CheckpointError: there is no save, or its config cannot be read.
        """
        if (seal := self.newest()) is None:
            raise self._nothing_there(was_empty=self.folder.is_empty)
        return read_saved_config(seal, folder=self.folder / seal.step, say=say)

    def _start(self, step: int, arrays: Arrays, *, config: RunConfig, data: Mapping[str, Any]) -> None:
        self.wait()
        sums, self._place = checksums(arrays), identify_file(self.folder.path.parent)
        try:
            wait = save_arrays(self.folder.part(step), arrays)
        except Exception as error:
            raise self._failure(step, explain_failure(error)) from error
        described = {path: (str(leaf.dtype), tuple(leaf.shape), sums[path]) for path, leaf in arrays.items()}
        values, is_sealed_here = config.model_dump(mode="json"), is_first()

        def finish() -> None:
            try:
                wait()
                if is_sealed_here:
                    self._seal(step, arrays=described, config=values, data=dict(data))
            except Exception as error:
                # At once: another process would wait for this one's part, and this one for the other's next save.
                announce_failure(self._failure(step, explain_failure(error)))
                raise

        self._saving = _Saving(step, finish)
        self.last_step = step

    def _seal(self, step: int, **record: Any) -> None:
        """Seal what all processes have written, give it its name, and remove what is no longer kept."""
        part, now = self.folder.part(step), datetime.now(UTC).isoformat(timespec="seconds")
        # Hashes would prove for ever that what was written is still there, though nobody could load it.
        require_all(part, record["arrays"])
        write_seal(part, Seal(step=step, saved_at=now, files=hash_files(part), **record))
        self.folder.publish(step)
        self.folder.prune(keep=self._keep, keep_every=self._keep_every)

    def _read(
        self, wanted: Shapes, *, accept: Callable[[Seal], object] = _ignore, damaged: Damaged
    ) -> tuple[Seal, Arrays]:
        was_empty, wrong = self.folder.is_empty, set[int]()
        while (seal := self.newest(damaged=damaged, without=wrong)) is not None:
            accept(seal)
            shapes = wanted
            if seal.has_params_alone:
                shapes = {path: leaf for path, leaf in wanted.items() if path.startswith("params.")}
            _check_shapes(self.folder / seal.step, seal, shapes)
            arrays = _load(self.folder / seal.step, shapes)
            problem = _compare(arrays, seal)
            if not problem:
                self.last_step = seal.step
                return seal, arrays
            self._pass_by(seal.step, problem, damaged=damaged)
            wrong.add(seal.step)
        raise self._nothing_there(was_empty=was_empty)

    def _nothing_there(self, *, was_empty: bool) -> CheckpointError:
        if was_empty:
            return CheckpointError(f"{self.folder.path} holds no checkpoint.", fix="train from the start.")
        return CheckpointError(
            f"{self.folder.path} holds no whole checkpoint: what is there is damaged.",
            fix="put a copy back in its place, or start over with --fresh --force, which keeps what is there.",
        )

    def _examine(self, step: int) -> tuple[Seal | None, str]:
        """Look at the files of a save, each process at its share; all come to the same answer."""
        folder = self.folder / step
        seal, problem = read_seal(folder)
        if seal is not None and seal.format != SEAL_FORMAT:
            raise CheckpointError(
                f"{folder} has format {seal.format}; this trellax reads format {SEAL_FORMAT}.",
                fix="use the trellax it was saved with.",
            )
        if seal is not None:
            problem = "; ".join(find_damage(folder, seal, share=(jax.process_index(), jax.process_count()))[:3])
        return seal, "; ".join(dict.fromkeys(filter(None, gather_texts(problem))))

    def _pass_by(self, step: int, problem: str, *, damaged: Damaged) -> None:
        what = f"checkpoint {step} is damaged: {problem}."
        if damaged == "pass over":
            self._say(f"{what} The one before is used.")
            return
        aside = ""
        if is_first():
            try:
                aside = self.folder.set_aside(step).name
            except OSError as error:
                raise CheckpointError(
                    f"{what} It cannot be set aside: {error.strerror}.", fix=f"make {self.folder.path} writable."
                ) from None
        self._say(f"{what} It is kept as {text_of_first(aside)}, and the one before is used.")

    def kept_text(self) -> str:
        """Return a sentence on what is saved, for the end of an error."""
        steps = self.folder.steps
        return f"The save of step {steps[-1]} is still there." if steps else "Nothing was saved yet."

    def _failure(self, step: int, problem: str) -> CheckpointError:
        if is_first():
            self.folder.drop_unfinished(step)
        run_folder = self.folder.path.parent
        if self._place and self._place != identify_file(run_folder):
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
            # The other processes may be elsewhere, and of two errors the first is the one to tell of.
            self._saving.join()


class _Saving:
    """A save under way, finished by a thread of its own."""

    def __init__(self, step: int, finish: Callable[[], None]) -> None:
        self.step, self._finish = step, finish
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"save of step {step}", daemon=True)
        self._thread.start()

    def join(self) -> BaseException | None:
        """Wait, and return what went wrong."""
        self._thread.join()
        return self._error

    def _run(self) -> None:
        try:
            self._finish()
        except BaseException as error:
            self._error = error


def _load(folder: Path, shapes: Shapes) -> Arrays:
    try:
        return load_arrays(folder, shapes)
    except Exception as error:
        # Its files are what was written, so it is no damage: memory may be short, or a disk away for a moment.
        raise CheckpointError(
            f"{folder} is whole, but cannot be loaded: {explain_failure(error)}.",
            fix="give it more memory or devices, then the same command again; to do without it, move it elsewhere.",
        ) from error


def _compare(arrays: Arrays, seal: Seal) -> str:
    """Return what is wrong with loaded arrays: their checksums say whether they are those that were saved."""
    sums = checksums(arrays)
    return next((f"{path} is not what was saved" for path in arrays if sums[path] != seal.arrays[path][2]), "")


def _params_like(shapes: PipelineParams, arrays: Arrays) -> PipelineParams:
    return jax.tree.unflatten(jax.tree.structure(shapes), [arrays[path] for path in by_path({"params": shapes})])


def _check_shapes(folder: Path, seal: Seal, wanted: Shapes) -> None:
    """The saved arrays must be those wanted; where parameters alone are wanted, the others are not looked at."""
    is_part = all(path.startswith("params.") for path in wanted)
    here = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in wanted.items()}
    saved = {path: f"{dtype}{list(shape)}" for path, (dtype, shape, _) in seal.arrays.items()}
    there = {path: text for path, text in saved.items() if not is_part or path.startswith("params.")}
    differ = [path for path in sorted(here.keys() | there.keys()) if here.get(path) != there.get(path)]
    if not differ:
        return
    # The optimizer's arrays follow the parameters': they are only news where the parameters agree.
    news = [path for path in differ if path.startswith("params")] or differ
    shown = "".join(
        f"\n  {path}: saved {there.get(path, 'nothing')}, wanted {here.get(path, 'nothing')}" for path in news[:5]
    )
    more = f"\n  and {len(news) - 5} more" if len(news) > 5 else ""
    raise CheckpointError(
        f"{folder} is of another model or optimizer: {len(differ)} arrays differ.{shown}{more}",
        fix="use the config it was saved with, another run.name, or start over with --fresh --force.",
    )
