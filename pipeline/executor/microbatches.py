"""Read microbatches of a batch inside the executor, with the info that functions may ask for."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ...meshes.device_axes import mark_varying
from ..model.protocol import Given, LayerInfo
from ..model.trees import mesh_axes_of
from .batch import batch_specs
from .buffers import read
from .functions import Functions


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All inputs of a step but its parameters.

    batch: leaves [M, B@data, ...].
    state: what layers are given as `info.state`, leaves [C, ranks@pipe, k, ...], or None.
    key: a random key, or None.
    """

    batch: Any
    state: Any = None
    key: Any = None


@dataclass(frozen=True, kw_only=True)
class Microbatches:
    """The batch on one data shard, leaves [M, b, ...], and what infos are made from.

    axes: mesh axes that microbatches are marked as varying over.
    num_sequences: b, the sequences of a microbatch on this data shard.
    shards: mesh axes that split the sequences of a microbatch.
    key: the pipeline's random key, or None.
    """

    batch: Any
    axes: tuple[str, ...]
    num_sequences: int
    shards: tuple[str, ...]
    asks_info: bool
    key: Any = None

    def marked(self, axes: tuple[str, ...]) -> "Microbatches":
        """Return the same batch marked as varying over more axes."""
        return replace(self, batch=jax.tree.map(lambda leaf: mark_varying(leaf, axes), self.batch), axes=axes)

    def read(self, number: jax.Array | int) -> Given:
        """Return one microbatch, [b, ...], by its number."""
        number = mark_varying(jnp.asarray(number, jnp.int32), self.axes)
        return Given(
            microbatch=read(self.batch, number), number=number, info=self._info(number) if self.asks_info else None
        )

    def _info(self, number: jax.Array) -> LayerInfo:
        # Sequences are numbered as in the whole batch, [M x B], whatever M and the number of shards are.
        # B = 8 on 2 shards, b = 4: microbatch 1 has sequences 8-11 on shard 0, and 12-15 on shard 1.
        shard = jax.lax.axis_index(self.shards) if self.shards else 0
        num_shards = jax.lax.axis_size(self.shards) if self.shards else 1
        first = (number * num_shards + shard) * self.num_sequences
        # Made of `number`, so that it is marked as the positions are which layers write in its place.
        nowhere = number * 0 - 1
        return LayerInfo(
            index=nowhere,
            stage=nowhere,
            microbatch=number,
            sequences=mark_varying(first + jnp.arange(self.num_sequences, dtype=jnp.int32), self.axes),
            key=None if self.key is None else mark_varying(self.key, self.axes),
        )


def microbatches_of(functions: Functions, inputs: Inputs) -> Microbatches:
    """Return the batch of a data shard, marked for `first` and `last`."""
    fns, axes = functions.fns, functions.end_axes
    specs = jax.tree.leaves(batch_specs(fns, inputs.batch), is_leaf=lambda node: isinstance(node, PartitionSpec))
    leaves = jax.tree.leaves(inputs.batch)
    split = [leaf for leaf, spec in zip(leaves, specs, strict=True) if mesh_axes_of(spec)]
    # On one data shard all leaves may be whole: then those with two dimensions have sequences.
    sizes = [leaf.shape[1] for leaf in split or leaves if leaf.ndim > 1]
    return Microbatches(
        batch=jax.tree.map(lambda leaf: mark_varying(leaf, axes), inputs.batch),
        axes=axes,
        num_sequences=sizes[0] if sizes else 1,
        shards=tuple(axis for axis in axes if axis in fns.axes.batch),
        asks_info=functions.asks_info,
        key=inputs.key,
    )
