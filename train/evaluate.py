"""Compute the validation loss of a run folder, or of a state, on any mesh."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..configs.saved_config import config_from_seal
from ..hub.run_params import Weights, read_chosen_params, run_saves, say_on_stderr
from ..hub.saves.seal import Seal
from ..meshes import DataError, MeshAxes, mesh_sizes
from .checkpoints.initial_weights import weight_shapes
from .checkpoints.layer_order import as_pipeline, params_in_stages
from .compiled_steps import compile_eval_step
from .data.corpus import Corpus, check_vocabulary, load_corpus
from .data.in_turn import in_turn
from .data.training_data import TrainingData, make_training_data
from .preferences.reference import reference_losses
from .prepare import prepare
from .state import Setup, TrainState


def evaluate(
    folder: str | Path, *, mesh: Mesh | None = None, axes: MeshAxes | None = None, weights: Weights = "last"
) -> float:
    """Return the validation loss of the newest save in a run folder, in nats per token; nothing is saved.

    It is the `val_loss` that the run logged at that step: to the digit on the run's mesh, on another up to rounding.
    >>> evaluate("runs/quickstart")
    1.9...
    >>> evaluate("runs/quickstart", mesh=build_mesh(MeshSpec(data=2), devices=jax.devices()[:2]))
    1.9...

    Args:
        mesh: the mesh to compute on; that of the run's config if left out.
        axes: roles of its axes, `spec.roles`, if their names are neither the default ones nor those of the run.
        weights: which weights of the run, those of its last step or their average.

    Raises:
        CheckpointError: the folder has no save, or no average.
        DataError: the files of the run's corpus are missing or changed.
        TrellaxError: the model does not fit the mesh.
    """
    found: list[tuple[Setup, Corpus]] = []

    def choose_shapes(seal: Seal) -> dict[str, Any]:
        # Everything that needs the save is done here: reading it once more would hash its files again.
        config = config_from_seal(seal, folder=run_saves(folder) / seal.step, say=say_on_stderr)
        if mesh is not None:
            # Tokens may not divide on another mesh than the run's own.
            sequence = "off" if config.sequence == "off" else "auto"
            sizes = mesh_sizes(mesh, axes=config.mesh.roles if axes is None else axes, sequence=sequence)
            config = config.model_copy(update={"mesh": sizes})
        setup = prepare(config) if mesh is None else Setup(config, mesh)
        corpus = _load_corpus(setup, cache=Path(folder))
        _check_same_corpus(Path(folder), seal, corpus)
        found.append((setup, corpus))
        return weight_shapes(setup)

    params = as_pipeline(read_chosen_params(folder, choose_shapes, weights=weights))
    setup, corpus = found[-1]
    return _evaluate_on(corpus, setup, setup.state_of(params_in_stages(setup, params)), cache=Path(folder))


def evaluate_state(setup: Setup, state: TrainState) -> float:
    """Return the validation loss of a state, in nats per token, on the corpus of its config.

    The state is not changed, and it may come from anywhere: `initial_state`, `Checkpoints.restore`, a step of yours.

    >>> setup = prepare(load_config("quickstart"))
    >>> evaluate_state(setup, initial_state(setup))   # near ln(256) = 5.55
    5.6...

    Raises:
        DataError: a file of the corpus is missing, or its held-out part has no full sequence.
    """
    return _evaluate_on(_load_corpus(setup, cache=None), setup, state, cache=None)


def validate(state: TrainState, eval_step: Callable[..., Any], data: TrainingData) -> float:
    """Return the mean loss of the held-out sequences of a run, the same ones at every call.

    Every batch carries weights that sum to 1 over all batches, so the mean is the sum of the batches' losses.

    Args:
        eval_step: maps (state, batch) to the loss of one batch, compiled.

    Raises:
        DataError: a file of the corpus is lost or changed.
    """
    return _sum_losses(state, eval_step, data.validation_batches())


def validate_sets(state: TrainState, eval_step: Callable[..., Any], data: TrainingData) -> dict[str, float]:
    """Return the mean loss of each further validation set by its name; arguments and errors are those of `validate`."""
    return {name: _sum_losses(state, eval_step, data.validation_batches(name=name)) for name in data.sets}


def _sum_losses(state: TrainState, eval_step: Callable[..., Any], batches: Iterator[Any]) -> float:
    losses = in_turn(eval_step(state, batch) for batch in batches)
    return float(np.sum(jax.device_get(losses)))


def _evaluate_on(corpus: Corpus, setup: Setup, state: TrainState, *, cache: Path | None) -> float:
    pairs = corpus.preferences
    reference = reference_losses(setup, pairs, cache=cache) if pairs else None
    placed: dict[str, Any] = {"sharding": setup.batch_sharding, "num_context": setup.sizes.context}
    data = make_training_data(setup.config, corpus, **placed, reference=reference)
    return validate(state, compile_eval_step(setup, say=lambda _: None), data)


def _load_corpus(setup: Setup, *, cache: Path | None) -> Corpus:
    vocab_size = setup.config.model.vocab_size
    corpus = load_corpus(setup.config.data, vocab_size=vocab_size, cache=cache)
    check_vocabulary(corpus, vocab_size=vocab_size)
    return corpus


def _check_same_corpus(folder: Path, seal: Seal, corpus: Corpus) -> None:
    """Raise unless the corpus is the one that a save was trained on; an imported model was trained on none."""
    trained_on = seal.data.get("corpus")
    if trained_on and trained_on != corpus.sha256:
        raise DataError(
            f"{folder} was trained on the corpus with sha256 {trained_on[:12]}, and its files now give "
            f"{corpus.sha256[:12]}: the loss could not be compared with the run's.",
            fix="bring the old files back, or call evaluate_state() with a config that names the new ones.",
        )
