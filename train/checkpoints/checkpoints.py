"""Save and restore the whole state of a run in layer order, with its config and its position in the data.

Read `store.py` for the writing of a save, and `layer_order.py` for the conversion to arrays that any mesh can read.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...configs.run_config import RunConfig
from ...hub.model_folder import read_base
from ...hub.run_params import arrays_from_params, params_from_arrays, require_same_arrays
from ...hub.saves.reader import Arrays, Damaged, SaveReader, Shapes
from ...hub.saves.seal import PARAMS, SEAL_FILE, Seal
from ...hub.saves.seal_fields import is_count, is_sha256
from ...meshes import CheckpointError
from ..metrics.log import is_finite_or_none
from ..metrics.plateau import BEST, WITHOUT_GAIN
from ..state import Setup, TrainState
from .average import arrays_in_both, begin_average
from .layer_order import as_model, as_pipeline, layer_order
from .store import SaveStore


def _ignore(_message: object) -> None:
    pass


class Checkpoints:
    """The saves of one run folder; use as a context manager, which waits for the save under way.

    Opening changes nothing on the disk. With many processes, all call each method at the same steps.

    >>> with Checkpoints("runs/mine", keep=2) as checkpoints:
    ...     checkpoints.save(state, setup)
    ...     checkpoints.wait()
    ...     state = checkpoints.restore(setup)

    Args:
        run_folder: the saves are in its folder `checkpoints`.
        keep: number of newest saves to keep.
        keep_every: keep also each save whose step is a multiple of this; 0 keeps none.
        say: called with each message, such as that a save is damaged.

    Raises:
        CheckpointError: `keep` or `keep_every` is not a count.
    """

    def __init__(
        self,
        run_folder: str | Path,
        *,
        keep: int = 1,
        keep_every: int = 0,
        say: Callable[[str], object] = _ignore,
    ) -> None:
        self._store = SaveStore(run_folder, keep=keep, keep_every=keep_every)
        self.folder = self._store.folder
        self.last_step: int | None = None
        """Steps taken at the last save made or restored here."""
        self._say = say

    def save(self, state: TrainState, setup: Setup, *, data: Mapping[str, Any] | None = None) -> None:
        """Start to save the state under its step, which must have no save yet; waits for the previous save first.

        Returns as soon as the state may be changed. A later failure is raised by the next `save` or `wait`.

        Args:
            data: position of the run in its data: numbers of `batches` and `sequences` taken, SHA-256 of the `corpus`.

        Raises:
            CheckpointError: this save cannot be started, or the previous one failed.
        """
        arrays = layer_order(setup).from_state(state)
        self._start(int(state.step), arrays, setup.config, data=data or {})

    def save_params(self, params: dict[str, Any], config: RunConfig) -> None:
        """Start to save parameters as those of a run before its first step; `restore` adds a fresh optimizer.

        Args:
            params: a tree {"embed", "blocks", "head"}, blocks [L, ...].

        Raises:
            CheckpointError: the save cannot be started.
        """
        self._start(0, arrays_from_params(params), config, data={})

    def wait(self) -> None:
        """Wait until the save under way is complete on all processes.

        Raises:
            CheckpointError: it failed on one of them; earlier saves are still there.
        """
        self._store.wait()

    def newest(self, *, damaged: Damaged = "pass over", without: Collection[int] = ()) -> Seal | None:
        """Return the seal of the newest save whose files match their hashes, or None; reads every file of a save once.

        Args:
            without: steps to ignore.

        Raises:
            CheckpointError: another format of trellax wrote it.
        """
        return self._reader(damaged).newest(without=without)

    def restore(self, setup: Setup, *, accept: Callable[[Seal], object] = _ignore) -> TrainState:
        """Return the state of the newest whole save, sharded for the mesh of `setup`; renames damaged saves.

        A save of parameters alone, as `save_params` makes it, gets a new optimizer state. An average of the weights
        that the save lacks begins as its weights, and one that `setup` lacks is left out.

        Args:
            accept: called with the seal of the save before its arrays are read; raises to refuse it.

        Raises:
            CheckpointError: there is no save, it is of another model or optimizer, or it cannot be loaded.
        """
        order = layer_order(setup)

        def choose(seal: Seal) -> Shapes:
            accept(seal)
            shapes = order.saved
            if seal.has_params_alone:
                shapes = {path: leaf for path, leaf in shapes.items() if path.startswith(PARAMS)}
            else:
                seal, shapes = arrays_in_both(seal, shapes)
            require_same_arrays(seal, shapes, folder=self.folder / seal.step)
            return shapes

        seal, arrays = self._reader("set aside").read(choose)
        # This step is on the disk already: `StateSaver.save` does not save it again.
        self.last_step = seal.step
        if seal.has_params_alone:
            params = params_from_arrays(arrays, like=as_model(order.params))
            state = setup.state_of(order.to_params(as_pipeline(params)))
        else:
            state = order.to_state({**begin_average(arrays, order.saved), **_read_base(setup)})
        if (step := int(state.step)) != seal.step:
            # A folder renamed to a later step would outlive all saves of this run, and every start would resume there.
            raise CheckpointError(f"{self.folder / seal.step} holds a state of step {step}.", fix="move it away.")
        return state

    def kept_text(self) -> str:
        """Return a sentence about the newest save, to append to an error."""
        return self._store.kept_text()

    def _start(self, step: int, arrays: Arrays, config: RunConfig, *, data: Mapping[str, Any]) -> None:
        self._store.save(step, arrays, config=config.model_dump(mode="json"), data=dict(data))
        self.last_step = step

    def _reader(self, damaged: Damaged) -> SaveReader:
        return SaveReader(folder=self.folder, damaged=damaged, say=self._say, check=_check_place)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._store.__exit__(kind, error, traceback)


def _read_base(setup: Setup) -> Arrays:
    """Return the frozen weights by the paths under which a save would hold them; {} where all are trained."""
    if not setup.config.model.lora_rank:
        return {}
    shapes = as_model(layer_order(setup).params)
    return arrays_from_params(read_base(setup.config.train.init_from, shapes))


def _check_place(seal: Seal) -> str:
    """Return the problem with the position in the data of a seal, or ""."""
    corpus, best = seal.data.get("corpus"), seal.data.get(BEST)
    counts = [seal.data.get(name) for name in ("batches", "sequences", WITHOUT_GAIN)]
    is_right = (corpus is None or is_sha256(corpus)) and all(count is None or is_count(count) for count in counts)
    is_right = is_right and is_finite_or_none(best)
    return "" if is_right else f"{SEAL_FILE} is no seal: its data cannot be"
