"""What a pipeline runs: three functions and their parameters. Any model that fits the protocol is welcome.

`split.py` cuts our transformer into this shape; a user's own model needs nothing else of trellax.layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax

from ...meshes import ScheduleError
from ...meshes.arguments import check_choice, check_count

Unroll = Literal["off", "on"]
"""Whether the layers of a stage are written out one after another instead of looped over."""


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
        A part that is summed over data already counts once a shard: take its mean, `jax.lax.pmean(loss, "data")`.

    A microbatch is one slice of the batch, on this data shard: leaves [b, ...] of [M, B@data, ...], and [] of [M], a
    temperature or a key, the same on all shards.
    x is one array, of one shape and dtype between all layers.

    Args:
        layers_per_stage: number of layers of each stage in the order of the model, where they are not all alike.
        num_layers: layers of the whole model. Needed where stages differ: their parameters have room for more layers
            than there are, and a shape alone does not tell an empty place from a layer that would never run.
        batch_specs: for batches with leaves that have no batch dimension: a `PartitionSpec` for every leaf (or a prefix
            of the tree), P(None, "data") for [M, B, ...] and P() for what all data shards are given whole.
        shared_specs: a `PartitionSpec` over `pipe` for every leaf of `shared` (or a prefix of its tree). Given, all
            ranks run `first` and `last` together on one microbatch, each with its part of `shared`, inside `shard_map`:
            what differs between ranks must be summed over "pipe" before it is returned.
        prepare: parameters of a layer -> what `layer` is given instead of them, made once a step for all layers: no
            loop then makes it again for every microbatch. A linear function, casts and other arrangements say: each
            layer's gradients come back through its transpose, and are summed in float32.
        unroll: whether the layers of a stage are written out one after another instead of looped over.

    Raises:
        ScheduleError: a function cannot be called, a count is no count, or `unroll` is no choice.
    """

    first: Callable[[Any, Any], jax.Array]
    layer: Callable[[Any, jax.Array, Any], jax.Array]
    last: Callable[[Any, jax.Array, Any], jax.Array]
    layers_per_stage: tuple[int, ...] | None = None
    num_layers: int | None = None
    batch_specs: Any = None
    shared_specs: Any = None
    prepare: Callable[[Any], Any] | None = None
    unroll: Unroll = "off"

    def __post_init__(self) -> None:
        for name in ("first", "layer", "last", "prepare"):
            function = getattr(self, name)
            if not callable(function) and not (name == "prepare" and function is None):
                raise ScheduleError(
                    f"{name} of StageFns is a {type(function).__name__}, not a function.",
                    fix="give what is called: StageFns(first=..., layer=..., last=...).",
                )
        if self.layers_per_stage is not None:
            check_counts(self.layers_per_stage)
        if self.num_layers is not None:
            check_count("num_layers", self.num_layers, error=ScheduleError)
        check_choice("unroll", self.unroll, get_args(Unroll), error=ScheduleError)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PipelineParams:
    """Parameters of a pipeline, also the shape of their gradients.

    stages: leaves [chunks, ranks@pipe, layers, ...]; chunk c of rank r is stage c * ranks + r. `stages_from_layers`
        makes them of [all layers, ...] in natural order; for equal stages it is a plain reshape.
        To an optimizer they are one array of rank 5 for all matrices of a kind: `optax.contrib.muon` silently runs Adam
        on those, unless its `muon_weight_dimension_numbers` say that the last two dimensions are the matrix.
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


def check_counts(layers_per_stage: Any) -> None:
    """Raise unless these are whole numbers, one or more of them.

    Raises:
        ScheduleError: they are no list of whole numbers.
    """
    if not isinstance(layers_per_stage, Sequence) or isinstance(layers_per_stage, str) or not layers_per_stage:
        raise ScheduleError(
            f"layers_per_stage={layers_per_stage!r} is no list of counts.", fix="give a number for every stage: (3, 4)."
        )
    for stage, count in enumerate(layers_per_stage):
        check_count(f"layers_per_stage[{stage}]", count, error=ScheduleError, least=0)
