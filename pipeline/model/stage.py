"""The protocol between a model and the pipeline: three functions and their parameters.

    microbatch -> first -> layer -> ... -> layer -> last -> loss

They run inside `shard_map` with every mesh axis manual: arrays are one device's blocks, and nothing is sent that they
do not send. `protocol.py` has what they may ask for and return besides. `split.py` cuts our transformer into this form;
a user's own model needs nothing of `trellax.layers`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ...meshes import ScheduleError
from ...meshes.arguments import check_choice, check_count
from ...meshes.axes import DEFAULT_AXES, MeshAxes
from ...schedules.placement import Placement, Shape
from .pattern import stage_pattern
from .trees import mesh_axes_of

WHOLE = P()
"""The partition spec of an array that every device holds whole."""

Unroll = Literal["off", "on"]
"""Whether the layers of a stage are written out one after another instead of looped over."""

Gather = Literal["step", "chunk", "layer"]
"""How often parameters split over batch axes are gathered: once a step, once for each run of actions of a chunk, or by
every layer in every action."""


@dataclass(frozen=True, kw_only=True)
class StageFns:
    """A model cut for a pipeline. A stage is a run of layers; the first and last stage also run `first` and `last`.

    first(shared, microbatch) -> x
        Make the input of the first layer: an embedding, or just a leaf of the microbatch. Its backward runs it again
        from the microbatch and keeps nothing, so it should be cheap.
    layer(params, x, microbatch) -> x
        Run one layer; `protocol.py` has the full form. `params` are its own, without the leading [chunks, ranks,
        layers]. The residuals of `jax.vjp` are kept for its backward; wrap it in `jax.checkpoint` to keep less. A stage
        that is not a run of layers is one layer.
    last(shared, x, microbatch) -> loss
        Compute this microbatch's part of the loss, float32 []. Parts are *added* over microbatches and data shards:
        for a mean, divide by the count of the whole batch, not of the microbatch. A part that is summed over data
        inside `last` would count once for each shard: take its mean, `jax.lax.pmean(loss, "data")`.

    A microbatch is one slice of the batch on this data shard: leaves [b, ...] of [M, B@data, ...], and leaves [] of
    [M] (a temperature, a key), which are the same on all shards. x is an array or a tree of arrays, of the same
    structure, shapes and dtypes between all layers.

    Args:
        pattern: kinds of the layers, in the model's order and repeated, where `layer` is a mapping from kinds to
            functions: ("dense", "moe"). Parameters, `stage_specs`, `prepare` and `state` are mappings from kinds then;
            `stages_from_layers(pattern=...)` makes the parameters. Needs `num_layers`.
        layers_per_stage: number of layers of each stage in the model's order, if stages differ.
        num_layers: number of layers of the whole model. Needed if stages differ: their parameters are padded, and a
            shape alone does not tell padding from a layer.
        batch_specs: a `PartitionSpec` for every leaf of the batch (or a prefix of its tree), if leaves without a batch
            dimension have two dimensions or more: P(None, "data") for [M, B, ...], P() for whole on every data shard.
            P(None, "data", "context") cuts [M, B, T, ...] along tokens too, for the devices of a context axis.
        stage_specs: a `PartitionSpec` for every parameter of one layer (or a prefix of their tree), without the leading
            [chunks, ranks, layers]: P(None, "tensor") for a kernel split by columns. `layer` is given its device's
            block, and sums over the axis what it makes of it (`layers.collectives`). P("data", "tensor") keeps that
            block split over data as well; `layer` is given it whole over data.
        shared_specs: a `PartitionSpec` for every leaf of `shared` (or a prefix of its tree). If one names the pipe
            axis, all ranks run `first` and `last` together on one microbatch, each with its part of `shared`: a result
            that differs between ranks must be summed over that axis before it is returned.
        gather: what is kept split over batch axes, since its spec names them, is gathered once a "step", once for each
            run of actions of a "chunk", or by every "layer" (see `executor/split_weights/sharded.py`); gradients are
            summed into parts split alike.
        gather_dtype: dtype in which it is sent, its own if left out.
        placement: the placement of stages on ranks by which the parameters were cut; that of the schedule must be the
            same.
        token_axes: mesh axes that split the tokens of x. Parameters that are whole along them have their gradients
            summed over them once a step, and not by every layer.
        axes: the roles of the mesh's axes, if their names are not pipe, data and tensor.
        prepare: a linear function from the parameters of one layer to those that `layer` is given, run once a step for
            all layers, for instance a cast. Gradients come back through its transpose and are summed in float32.
        unroll: "on" to write the layers of a stage out one after another, "off" to loop over them.
        frozen: whether a parameter is frozen, by its name, `stages.up.kernel` or `shared.table`: its gradient is None,
            and nothing is computed or kept for it.

    Raises:
        ScheduleError: a function is not callable, a count is not a count, or `unroll` is not one of the choices.
    """

    first: Callable[..., Any]
    layer: Callable[..., Any] | Mapping[str, Callable[..., Any]]
    last: Callable[..., Any]
    pattern: tuple[str, ...] | None = None
    layers_per_stage: tuple[int, ...] | None = None
    num_layers: int | None = None
    batch_specs: Any = None
    stage_specs: Any = WHOLE
    shared_specs: Any = WHOLE
    placement: Placement | Shape = "loop"
    token_axes: tuple[str, ...] = ()
    gather: Gather = "step"
    gather_dtype: Any = None
    axes: MeshAxes = DEFAULT_AXES
    prepare: Callable[[Any], Any] | Mapping[str, Callable[[Any], Any] | None] | None = None
    unroll: Unroll = "off"
    frozen: Callable[[str], bool] | None = None

    def by_kind(self, value: Any) -> dict[str, Any]:
        """Return what is given for each kind of layer, by kind; a single kind has the name ""."""
        if self.pattern is None:
            return {"": value}
        # A mapping has an entry for each kind; anything else, one function or one spec, holds for all.
        kinds: Any = self.layer
        return {kind: value.get(kind) if isinstance(value, Mapping) else value for kind in kinds}

    def one_or_by_kind(self, values: Mapping[str, Any]) -> Any:
        """Undo `by_kind`."""
        return values[""] if self.pattern is None else dict(values)

    def counts(self, *, num_stages: int, room: int) -> tuple[int, ...]:
        """Return the number of layers of each stage, whose parameters have room for `room`, if of a single kind."""
        if self.layers_per_stage is not None:
            return self.layers_per_stage
        return ((self.num_layers or 0) // num_stages if self.pattern else room,) * num_stages

    @property
    def ends_together(self) -> bool:
        """Whether all ranks run `first` and `last` together, since a leaf of `shared` is split over pipe."""
        # Specs may be a prefix of the tree, or wrong: the checks of arguments say so.
        specs = jax.tree.leaves(self.shared_specs, is_leaf=lambda node: isinstance(node, P))
        return any(self.axes.pipe in mesh_axes_of(spec) for spec in specs if isinstance(spec, P))

    def __post_init__(self) -> None:
        self._check_pattern()
        for name in ("first", "layer", "last", "prepare"):
            for function in self.by_kind(getattr(self, name)).values():
                if not callable(function) and not (name == "prepare" and function is None):
                    raise ScheduleError(
                        f"{name} of StageFns is a {type(function).__name__}, not a function.",
                        fix="give what is called: StageFns(first=..., layer=..., last=...).",
                    )
        if self.frozen is not None and not callable(self.frozen):
            raise ScheduleError(
                f"frozen of StageFns is a {type(self.frozen).__name__}, not a function.",
                fix='give a function of the name of a parameter: frozen=lambda name: "lora" not in name.',
            )
        if self.layers_per_stage is not None:
            check_counts(self.layers_per_stage)
        if self.num_layers is not None:
            check_count("num_layers", self.num_layers, error=ScheduleError)
        if not isinstance(self.placement, Placement):
            check_choice("placement", self.placement, get_args(Shape), error=ScheduleError)
        check_choice("unroll", self.unroll, get_args(Unroll), error=ScheduleError)
        check_choice("gather", self.gather, get_args(Gather), error=ScheduleError)
        self._check_token_axes()
        self._check_gather_dtype()

    def _check_token_axes(self) -> None:
        allowed = [axis for axis in self.axes.names if axis not in (self.axes.pipe, *self.axes.summed)]
        given = self.token_axes
        if not isinstance(given, tuple) or len(set(given)) < len(given) or not set(given) <= set(allowed):
            raise ScheduleError(
                f"token_axes={given!r}: a tuple of the axes that split the tokens of x, each once, of "
                f"{', '.join(allowed) or 'which this mesh has none'}.",
                fix='write ("tensor",), or () where tokens are whole.',
            )

    def _check_gather_dtype(self) -> None:
        if self.gather_dtype is None:
            return
        try:
            is_float = jnp.issubdtype(jnp.dtype(self.gather_dtype), jnp.floating)
        except TypeError:
            is_float = False
        if not is_float:
            raise ScheduleError(
                f"gather_dtype={self.gather_dtype!r} is not a floating-point dtype.", fix='write "bfloat16", say.'
            )

    def _check_pattern(self) -> None:
        is_mapping = isinstance(self.layer, Mapping)
        if is_mapping != (self.pattern is not None):
            raise ScheduleError(
                f"layer is {'a mapping of kinds' if is_mapping else 'one function'}, and pattern is {self.pattern!r}.",
                fix='give both or neither: StageFns(layer={"dense": ..., "moe": ...}, pattern=("dense", "moe")).',
            )
        kinds, prepared = list(self.by_kind(None)) if is_mapping else [], self.prepare
        if self.pattern is not None:
            stage_pattern(self.pattern, kinds=kinds, counts=(1,))
        if isinstance(prepared, Mapping) and not set(prepared) <= set(kinds):
            raise ScheduleError(
                f"prepare has the kinds {sorted(prepared)}, and layer {sorted(kinds)}.",
                fix="give prepare for kinds that layer has; one that is left out is not prepared.",
            )
        if is_mapping and self.num_layers is None:
            raise ScheduleError(
                "a model with a pattern of kinds needs num_layers: the parameters of each kind are padded.",
                fix="say how many layers the model has: StageFns(num_layers=...).",
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PipelineParams:
    """Parameters of a pipeline; gradients have the same form.

    stages: leaves [chunks, ranks@pipe, layers, ...]; chunk c of rank r is stage c * ranks + r of a loop, and
        `placement.stage_at(r, c)` of any other placement. `stages_from_layers` makes
        them from [all layers, ...]; for equal stages of a loop it is a reshape.
        An optimizer sees one array of five dimensions for all matrices of a kind. `optax.contrib.muon` silently runs
        Adam on such arrays, unless `muon_weight_dimension_numbers` name the last two dimensions as the matrix.
    shared: any tree, given to `first` and `last` (an embedding, a head, tied or not); replicated over pipe, unless
        `StageFns.shared_specs` says otherwise.
    """

    stages: Any
    shared: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossAndGrads:
    """The loss of the whole batch, a replicated float32 scalar, and its gradients, sharded as the parameters.

    metrics: named sums over layers, microbatches and data, replicated float32.
    stats: sums of what each layer returned as `Output.stats`, leaves [chunks, ranks@pipe, layers, ...].
    shard_squares: sum over data shards of the squared norm of the part of the gradient that a shard's own sequences
        give, float32 [], if asked for.
    """

    loss: jax.Array
    grads: PipelineParams
    metrics: dict[str, jax.Array] = field(default_factory=dict)
    stats: Any = None
    shard_squares: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Aux:
    """What a step returns beside its loss: `metrics` and `stats` as in `LossAndGrads`."""

    metrics: dict[str, jax.Array]
    stats: Any


def check_counts(layers_per_stage: Any) -> None:
    """Raise unless these are integers, at least one.

    Raises:
        ScheduleError: they are not a sequence of integers.
    """
    if not isinstance(layers_per_stage, Sequence) or isinstance(layers_per_stage, str) or not layers_per_stage:
        raise ScheduleError(
            f"layers_per_stage={layers_per_stage!r} is not a list of counts.",
            fix="give a number for every stage: (3, 4).",
        )
    for stage, count in enumerate(layers_per_stage):
        check_count(f"layers_per_stage[{stage}]", count, error=ScheduleError, least=0)
