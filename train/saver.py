"""Save the training state of a run: at its intervals, at its end, and before an error stops it."""

from dataclasses import dataclass

import jax

from ..meshes import DataError
from .checkpoints.checkpoints import Checkpoints
from .data.training_data import TrainingData
from .metrics.plateau import Plateau
from .run_folder import HeldFolder
from .state import Setup, TrainState


@dataclass(frozen=True, kw_only=True)
class StateSaver:
    """Save a state into the checkpoints of a run folder, with its position in the data and its last validations."""

    setup: Setup
    checkpoints: Checkpoints
    folder: HeldFolder
    data: TrainingData
    plateau: Plateau

    def save(self, state: TrainState) -> None:
        """Start to save a state in the background, unless its step is saved already.

        Raises:
            RunError: the run folder was moved or removed.
            CheckpointError: the save cannot be started, or the one before it failed.
        """
        self.folder.check()
        step = int(state.step)
        if step != self.checkpoints.last_step:
            position = {"batches": step, "sequences": self.data.train.num_sequences(step)}
            position |= {"corpus": self.data.corpus.sha256, **self.plateau.record}
            self.checkpoints.save(state, self.setup, data=position)

    def save_and_wait(self, state: TrainState) -> int | None:
        """Save a state, wait until it is complete, and return its step.

        Raises:
            TrellaxError: as `save` does.
        """
        self.save(state)
        self.checkpoints.wait()
        return self.checkpoints.last_step

    def save_before(self, error: DataError, state: TrainState) -> DataError:
        """Save what was trained before the corpus changed, and return the error to stop the run with.

        Raises:
            TrellaxError: as `save` does.
        """
        if jax.process_count() > 1:
            # The other processes are at this step or the next one, and would never join the save.
            return error
        step = self.save_and_wait(state)
        return DataError(f"{error.problem} Step {step} is saved.", fix=error.fix)
