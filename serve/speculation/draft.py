"""Guess the next tokens of sequences with a smaller model on the same mesh, which has a cache of its own.

Its cache has the pages of the model that it guesses for, by the same numbers: it reads the same chunks of prompts, so a
beginning that sequences share is in both. Guesses are drawn as the model draws, with the same noise: the two choose the
same token wherever one is likely by both (Daliri et al. 2025, "Coupling without communication", section 3). Read
`verify.py` for what becomes of the guesses.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ...layers import ModelConfig, bytes_per_device
from ...meshes import MeshAxes, ServeError
from ..check import check_model
from ..chunks import Chunks
from ..compiled_programs import compile_programs
from ..params import stage_params, stage_shapes, weights_of
from ..slots import SlotInputs
from ..stacks import LayerLoop
from ..state import Sizes, empty_state, state_shapes


class DraftModel:
    """A small model with its state on the devices.

    Args:
        params: as those of an `Engine`.
        sizes: those of the engine that it guesses for.
        num_tokens: most guesses of a sequence at a time.

    Raises:
        TrellaxError: it does not fit the mesh, or is cut into stages.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        sizes: Sizes,
        num_tokens: int,
        mesh: Mesh,
        axes: MeshAxes,
        layers: LayerLoop,
    ) -> None:
        check_draft(config, mesh.shape, max_tokens=sizes.max_tokens, axes=axes)
        # One round more than guesses: the last guess is read too, for when all of them are right.
        self._sizes = replace(sizes, rounds=num_tokens + 1)
        own: dict[str, Any] = {"mesh": mesh, "layers": layers, "axes": axes}
        self._shapes = state_shapes(config, self._sizes, cache_dtype=config.dtype, **own)
        own["weights"] = weights_of(params)
        self._weights = stage_shapes(config, **own)
        self._programs = compile_programs(config, self._sizes, state=self._shapes, **own)
        self._params = stage_params(params, config=config, **own)
        self._state = empty_state(self._shapes)

    @property
    def bytes_per_device(self) -> int:
        """Bytes of its parameters and of its state on each device."""
        return bytes_per_device((self._weights, self._shapes))

    def read(self, slots: SlotInputs, chunks: Chunks, num_chunks: np.int32) -> None:
        """Read chunks of prompts, as the model has read them."""
        self._state, _ = self._programs.prefill(self._params, self._state, slots, chunks, num_chunks)

    def guess(self, slots: SlotInputs, *, tokens: np.ndarray, starts: np.ndarray, is_open: np.ndarray) -> np.ndarray:
        """Return guesses [rounds, slots] for the open slots, what is below 0 or behind that is none.

        Args:
            tokens, starts: the last token of each slot, which is in no cache yet, and its place.
        """
        placed = self._state.next_token.sharding
        tokens, starts, opened = (jax.device_put(array[None], placed) for array in (tokens, starts, is_open))
        cache = replace(self._state.cache, lengths=starts)
        self._state = replace(self._state, cache=cache, next_token=tokens, is_open=opened)
        run = self._params, self._state, slots, np.int32(self._sizes.rounds)
        self._state, chosen = self._programs.decode(*run)
        return np.asarray(chosen.token)[-1]


def check_draft(config: ModelConfig, sizes: Mapping[str, int], *, max_tokens: int, axes: MeshAxes) -> None:
    """Raise unless a model can guess on a mesh of these sizes.

    Raises:
        ServeError: the mesh has stages.
        TrellaxError: the model does not split, or reads fewer tokens than sequences have.
    """
    if sizes[axes.pipe] > 1:
        raise ServeError(
            f"a draft model on {axes.pipe}={sizes[axes.pipe]}: its layers are not cut into stages, and all but one "
            "would wait for it.",
            fix=f"set {axes.pipe}=1, or guess by look-up.",
        )
    check_model(config, sizes, max_tokens=max_tokens, axes=axes)
