"""Compute the loss of every row of preference data by the reference: the model that the run starts from.

Once before the first step, by forwards alone, on the run's own mesh and schedule. The result is one number a row, kept
in the run folder beside tokenized text, so that a resumed run does not compute it again.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...hub.tokenized_text import TOKENS_FOLDER
from ...meshes import RunError
from ...meshes.files.own_file import replacing_file
from ...meshes.processes.messages import first_does, text_of_first
from ...pipeline import PipelineParams, pipeline_loss
from ..checkpoints.initial_weights import initial_state
from ..data.in_turn import in_turn
from ..data.preferences.pair_batches import lay_out_rows
from ..data.preferences.pairs import LoadedPairs
from ..data.prefetch import place_batch
from ..state import Setup
from ..step import Batch


def reference_losses(
    setup: Setup, loaded: LoadedPairs, *, cache: Path | None, say: Callable[[str], object] = lambda _: None
) -> np.ndarray:
    """Return the loss of every row by the weights of `train.init_from`, float32 [rows].

    Args:
        cache: run folder that keeps it; None keeps nothing.

    Raises:
        RunError: the kept file is broken.
        TrellaxError: there are no such weights.
    """
    file = cache and cache / TOKENS_FOLDER / f"reference-{_hash(setup, loaded)}.npy"
    # Process 0 decides: on a network file system the others may see the file later.
    if file and text_of_first("there" if file.is_file() else ""):
        return _read(file, num_rows=loaded.pairs.num_rows)
    say(f"reference {loaded.pairs.num_rows:,} answers by the weights of {setup.config.train.init_from}")
    losses = _compute(setup, loaded)
    if file:
        first_does(lambda: _write(file, losses))
    return losses


def _compute(setup: Setup, loaded: LoadedPairs) -> np.ndarray:
    section, microbatches = setup.config.train, setup.config.pipeline.microbatches
    size, num_rows = section.batch_size, loaded.pairs.num_rows
    fns = setup.model.scores(size)

    @jax.jit
    def run(params: PipelineParams, batch: Batch) -> jax.Array:
        given: dict[str, Any] = {"batch": batch, "mesh": setup.mesh, "schedule": setup.schedule}
        return -pipeline_loss(fns, params=params, **given, has_aux=True)[1].metrics["logprob"]

    params, shape = initial_state(setup).params, (microbatches, size // microbatches)

    def start(first: int) -> jax.Array:
        # The last batch is filled up with rows that are computed already.
        rows = [row % num_rows for row in range(first, first + size)]
        batch = lay_out_rows(loaded.pairs, rows, seq_len=setup.config.data.seq_len, shape=shape)
        return run(params, place_batch(batch, setup.batch_sharding))

    found = in_turn(start(first) for first in range(0, num_rows, size))
    return np.concatenate(jax.device_get(found))[:num_rows].astype(np.float32)


def _hash(setup: Setup, loaded: LoadedPairs) -> str:
    text = f"{loaded.sha256} {setup.config.train.init_from} {setup.config.data.seq_len} {setup.config.model.dtype}"
    return hashlib.sha256(text.encode()).hexdigest()


def _read(file: Path, *, num_rows: int) -> np.ndarray:
    try:
        losses = np.load(file)
    except (OSError, ValueError, EOFError):
        losses = np.empty(0)
    if losses.dtype != np.float32 or losses.shape != (num_rows,):
        raise RunError(f"{file} is broken.", fix="remove it: it is computed again.")
    return losses


def _write(file: Path, losses: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(file) as stream:
        np.save(stream, losses)
