"""Compute the bytes that decoding must read at least: the weights of a rank's layers, the head, and the used cache.

The fullest rank has most of them. Embedding and what is written are left out: a few rows. Read `report.py` next.
"""

from dataclasses import dataclass

from jax.sharding import Mesh

from ...layers import ModelConfig, bytes_per_device
from ...layers.attention.cache import CacheDtype
from ...layers.options.check_config import windows_of_layers
from ...layers.quantized import Weights
from ...meshes import MeshAxes
from ...meshes.axes import DEFAULT_AXES
from ..params import stage_shapes
from ..stacks import layers_of_stages, stage_stacks
from ..state import Sizes, state_shapes


@dataclass(frozen=True, kw_only=True)
class LeastBytes:
    """Bytes that each pipeline rank reads at least, for one token of each of some sequences, [P].

    weights: of its layers, with the last rank's head, read once; cache: keys and values of the sequences.
    """

    weights: tuple[float, ...]
    cache: tuple[float, ...]

    def total(self, rank: int) -> float:
        """Return the bytes of a rank."""
        return self.weights[rank] + self.cache[rank]


def least_bytes(
    config: ModelConfig,
    sizes: Sizes,
    *,
    mesh: Mesh,
    cache_dtype: CacheDtype,
    rows: int,
    context: float,
    axes: MeshAxes = DEFAULT_AXES,
    weights: Weights = "plain",
) -> LeastBytes:
    """Return what one device of each rank must read for one token of each of `rows` sequences of `context` tokens.

    A layer with a window reads no more than the window.
    """
    num_ranks = mesh.shape[axes.pipe]
    params = stage_shapes(config, mesh=mesh, axes=axes, weights=weights)
    stacks = stage_stacks(config, num_ranks=num_ranks, layers="loop")
    held = [0.0] * num_ranks
    for stack, own in zip(stacks, params["blocks"], strict=True):
        # Every rank has arrays for as many layers as the largest stage; the padding of the others is never read.
        each = bytes_per_device(own) / stack.size
        held = [total + count * each for total, count in zip(held, stack.counts, strict=True)]
    held[-1] += bytes_per_device(params["embed"]["table"] if config.embeddings == "tied" else params["head"]["table"])
    state = state_shapes(config, sizes, mesh=mesh, cache_dtype=cache_dtype, axes=axes)
    num_stored = sum(stack.size for stack in stacks) * sizes.cached_tokens / sizes.num_shards
    token = bytes_per_device((state.cache.keys, state.cache.values)) / num_stored
    windows, first, cached = windows_of_layers(config), 0, []
    for count in layers_of_stages(config, num_ranks=num_ranks):
        seen = sum(min(context, window or context) for window in windows[first : first + count])
        cached.append(rows * token * seen)
        first += count
    return LeastBytes(weights=tuple(held), cache=tuple(cached))
