"""What a pipeline runs: three functions and their parameters. Any model that fits the protocol is welcome.

`split.py` cuts our transformer into this shape; a user's own model needs nothing else of trellax.layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, kw_only=True)
class StageFns:
    """A model cut for a pipeline: a stage is a run of layers; the first and last stage also run `first` and `last`.

    first(shared, microbatch) -> x
        What enters the first layer: an embedding, or just the input. Cheap: its gradient is taken from the
        microbatch again, so nothing of it is kept.
    layer(params, x, microbatch) -> x
        One layer; `params` are its own, without the leading [chunks, ranks, layers]. What its backward needs is kept
        as `jax.vjp` says: rematerialisation inside it is the author's choice. A stage that is no run of equal layers
        is one layer.
    last(shared, x, microbatch) -> loss
        This microbatch's part of the loss, a float32 scalar. Parts are *added* over microbatches and data shards:
        for a mean, divide by the count of the whole batch, not of the microbatch.

    A microbatch is one slice of the batch, on this data shard: leaves [b, ...] of [M, B@data, ...].
    x is one array, of one shape and dtype between all layers.
    """

    first: Callable[[Any, Any], jax.Array]
    layer: Callable[[Any, jax.Array, Any], jax.Array]
    last: Callable[[Any, jax.Array, Any], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PipelineParams:
    """Parameters of a pipeline, also the shape of their gradients.

    stages: leaves [chunks, ranks@pipe, layers, ...]; chunk c of rank r is stage c * ranks + r, so a plain reshape of
        [all layers, ...] in natural order makes them.
    shared: any tree, seen by `first` and `last` (an embedding, a head, tied or not); replicated over pipe.
    """

    stages: Any
    shared: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossAndGrads:
    """The loss of the whole batch, a replicated float32 scalar, and its gradients, sharded as the parameters."""

    loss: jax.Array
    grads: PipelineParams
