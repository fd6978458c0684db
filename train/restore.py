"""Restore the newest save of a run folder, or initialize a new state if the folder has no save."""

from collections.abc import Callable

from ..configs.changes import Changes, check_changes
from ..configs.saved_config import read_saved_config
from ..hub.saves.seal import Seal
from ..meshes.processes.messages import text_of_first
from .checkpoints.checkpoints import Checkpoints
from .checkpoints.initial_weights import initial_state
from .state import Setup, TrainState


def restore_or_initialize(
    setup: Setup, checkpoints: Checkpoints, *, corpus_sha256: str, changes: Changes, say: Callable[[str], object]
) -> tuple[TrainState, Seal | None]:
    """Return the first state of a run, and the seal of the save it was restored from, None for a new state.

    Raises:
        RunError: config or corpus differ from those of the save, and `changes` refuses that.
        CheckpointError: all saves are damaged, or the newest is of another model.
    """
    config = setup.config
    # Process 0 decides: on a network file system the others may see the content of the folder later.
    if text_of_first("empty" if checkpoints.folder.is_empty else ""):
        state = initial_state(setup)
        if config.train.init_from:
            say(f"weights   of {config.train.init_from}")
        return state, None
    accepted: list[Seal] = []

    def accept(seal: Seal) -> None:
        # Parameters alone, as `import-hf` saves them, were not trained, so their config may change.
        if not seal.has_params_alone:
            was = seal.data.get("corpus")
            saved = read_saved_config(seal, folder=checkpoints.folder / seal.step, say=say)
            check_changes(saved, config, was=was, corpus=corpus_sha256, changes=changes, step=seal.step)
        accepted.append(seal)

    state = checkpoints.restore(setup, accept=accept)
    step, steps = int(state.step), config.train.steps
    rest = f"{steps - step} to go" if step < steps else f"train.steps={steps}: none to take"
    say(f"resumed   at step {step} of {config.run_folder}, {rest}")
    # Damaged saves were accepted before it; the last one is the save that was restored.
    return state, accepted[-1]
