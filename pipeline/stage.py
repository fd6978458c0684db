"""What a pipeline runs: three functions and their parameters. Any model that fits the protocol is welcome.

`split.py` cuts our transformer into this shape; a user's own model needs nothing else of trellax.layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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

    Args:
        layers_per_stage: number of layers of each stage in the order of the model, where they are not all alike.
        shared_specs: a `PartitionSpec` over `pipe` for every leaf of `shared` (or a prefix of its tree). Given, all
            ranks run `first` and `last` together on one microbatch, each with its part of `shared`, inside `shard_map`:
            what differs between ranks must be summed over "pipe" before it is returned.
        prepare: parameters of a layer -> what `layer` is given instead of them, made once a step for all layers: no
            loop then makes it again for every microbatch. A linear function, casts and other arrangements say: each
            layer's gradients come back through its transpose, and are summed in float32.
        unroll: whether the layers of a stage are written out one after another instead of looped over.
    """

    first: Callable[[Any, Any], jax.Array]
    layer: Callable[[Any, jax.Array, Any], jax.Array]
    last: Callable[[Any, jax.Array, Any], jax.Array]
    layers_per_stage: tuple[int, ...] | None = None
    shared_specs: Any = None
    prepare: Callable[[Any], Any] | None = None
    unroll: Literal["off", "on"] = "off"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PipelineParams:
    """Parameters of a pipeline, also the shape of their gradients.

    stages: leaves [chunks, ranks@pipe, layers, ...]; chunk c of rank r is stage c * ranks + r. `stages_from_layers`
        makes them of [all layers, ...] in natural order; for equal stages it is a plain reshape.
    shared: any tree, seen by `first` and `last` (an embedding, a head, tied or not); replicated over pipe, unless
        `StageFns.shared_specs` says otherwise.
    """

    stages: Any
    shared: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossAndGrads:
    """The loss of the whole batch, a replicated float32 scalar, and its gradients, sharded as the parameters."""

    loss: jax.Array
    grads: PipelineParams


def prepare_layers(fns: StageFns, stages: Any) -> Any:
    """Return what the layers of one rank are given instead of their parameters, leaves [C, k, ...] both."""
    return stages if fns.prepare is None else jax.vmap(jax.vmap(fns.prepare))(stages)
