"""Convert parameters between [all layers, ...], the model's order, and [chunks, ranks, layers, ...] of the stages.

    8 layers, 2 ranks, 2 chunks          rank 0        rank 1
                              chunk 0    layers 0 1    layers 2 3       stage s is chunk s // ranks
                              chunk 1    layers 4 5    layers 6 7       of rank s % ranks: a loop

For equal stages in a loop both conversions are a reshape; in a V the ranks of chunk 1 are the other way round
(`schedules/placement.py`). Where stages differ, every stage has room for as many layers as the
largest; the rest of it is zero and never run.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ...meshes import ScheduleError
from ...meshes.arguments import check_choice, check_count
from ...meshes.divisibility import check_divides, nearest_multiples
from ...schedules.check import check_sizes
from ...schedules.placement import Placement, Shape
from .pattern import stage_pattern
from .stage import check_counts
from .trees import check_arrays

Places = np.ndarray[Any, np.dtype[np.int32]]


def stages_from_layers(
    layers: Any,
    *,
    num_ranks: int,
    num_chunks: int = 1,
    layers_per_stage: Sequence[int] | None = None,
    pattern: Sequence[str] | None = None,
    placement: Placement | Shape = "loop",
) -> Any:
    """Return stage parameters [chunks, ranks, layers, ...] from parameters [all layers, ...] in the model's order.

    Args:
        layers_per_stage: number of layers of each stage, first to last; equal if left out.
        pattern: kinds of the layers, as in `StageFns`. Parameters are {kind: [layers of the kind, ...]} then.
        placement: which rank holds which stage, as `schedule.placement` or by name.

    Raises:
        ScheduleError: the layers do not divide into equal stages, or the given numbers do not add up to them.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=1, num_chunks=num_chunks)
    where = Placement.resolve(placement, num_ranks=num_ranks, num_chunks=num_chunks)
    if pattern is not None:
        sizes = {"num_ranks": num_ranks, "num_chunks": num_chunks, "layers_per_stage": layers_per_stage}
        return _stages_of_kinds(layers, pattern, sizes, where)
    num_layers = _count_layers(layers)
    counts = check_layers(num_layers, num_ranks=num_ranks, num_chunks=num_chunks, layers_per_stage=layers_per_stage)
    return jax.tree.map(partial(cut_kind, counts=counts, placement=where), layers)


def _count_layers(layers: Any, *, of: str = "layers") -> int:
    shapes = {name: leaf.shape for name, leaf in check_arrays(of, layers).items()}
    if not shapes:
        raise ScheduleError(
            f"{of} is empty: layers are counted by the first dimension of their arrays.",
            fix='give arrays [all layers, ...]; where a kind of layers has no parameters, {"unused": '
            "jnp.zeros(num_layers)}.",
        )
    first, shape = next(iter(shapes.items()))
    for name, other in shapes.items():
        if not other or other[:1] != shape[:1]:
            raise ScheduleError(
                f"{name} has shape {other} and {first} {shape}: the first dimension counts the layers of all alike.",
                fix="give arrays [all layers, ...].",
            )
    return shape[0]


def _spread(leaf: jax.Array, places: Places, size: int) -> jax.Array:
    """Return zeros [size, ...] with the layers [L, ...] of a leaf at their places."""
    empty = jnp.zeros((size, *leaf.shape[1:]), leaf.dtype)
    return empty.at[places].set(leaf, unique_indices=True)


def _stages_of_kinds(layers: Any, pattern: Sequence[str], sizes: dict[str, Any], where: Placement) -> dict[str, Any]:
    _check_kinds("layers", layers)
    found = {kind: _count_layers(own, of=f"layers[{kind!r}]") for kind, own in layers.items()}
    counts = check_layers(sum(found.values()), **sizes)
    stages = stage_pattern(pattern, kinds=tuple(layers), counts=counts)

    def cut(kind: str, leaf: jax.Array) -> jax.Array:
        own = stages.counts_of(kind)
        if sum(own) != found[kind]:
            raise ScheduleError(
                f"the pattern {tuple(pattern)} makes {sum(own)} of {sum(counts)} layers {kind!r}, but there are "
                f"parameters of {found[kind]}.",
                fix="give each kind as many layers as the pattern has of it.",
            )
        return cut_kind(leaf, counts=own, placement=where)

    return {kind: jax.tree.map(partial(cut, kind), own) for kind, own in layers.items()}


def cut_kind(leaf: jax.Array, *, counts: Sequence[int], placement: Placement) -> jax.Array:
    """Return a parameter of one kind of layer, [layers of the kind, ...], as [chunks, ranks, room, ...].

    Args:
        counts: number of layers of the kind of each stage, perhaps 0.
    """
    # `room` is the number of layers of the largest stage: all stages are padded to it.
    room, places = max(*counts, 1), _places(counts, placement)
    if len(set(counts)) > 1:
        leaf = _spread(leaf, places, len(counts) * room)
    elif not placement.is_loop:
        # A permutation: each place has its layer.
        leaf = leaf[np.argsort(places)]
    return leaf.reshape(placement.num_chunks, placement.num_ranks, room, *leaf.shape[1:])


def natural_order(
    stages: Any,
    *,
    layers_per_stage: Sequence[int] | None = None,
    pattern: Sequence[str] | None = None,
    placement: Placement | Shape = "loop",
) -> Any:
    """Return parameters [all layers, ...] in the model's order from stage parameters [chunks, ranks, layers, ...].

    With a `pattern` of kinds, which needs `layers_per_stage`, parameters are {kind: [layers of the kind, ...]}.

    Raises:
        ScheduleError: `layers_per_stage` is not what the parameters were cut by.
    """
    if not isinstance(placement, Placement):
        check_choice("placement", placement, get_args(Shape), error=ScheduleError)
    if pattern is not None:
        _check_kinds("stages", stages)
        if layers_per_stage is None:
            raise ScheduleError(
                "natural_order() with a pattern needs layers_per_stage: the parameters of each kind are padded.",
                fix="give the number of layers of every stage, equal ones too: layers_per_stage=(2, 2).",
            )
        check_counts(layers_per_stage)
        cut = stage_pattern(pattern, kinds=tuple(stages), counts=layers_per_stage)
        for kind, own in stages.items():
            _check_room(f"stages[{kind!r}]", own, counts=cut.counts_of(kind))
        return {
            kind: jax.tree.map(partial(merge_kind, counts=cut.counts_of(kind), placement=placement), own)
            for kind, own in stages.items()
        }
    if layers_per_stage is not None:
        check_counts(layers_per_stage)
        _check_room("stages", stages, counts=layers_per_stage)
    return jax.tree.map(partial(merge_kind, counts=layers_per_stage, placement=placement), stages)


def merge_kind(leaf: Any, *, counts: Sequence[int] | None, placement: Placement | Shape) -> Any:
    """Return a leaf [chunks, ranks, room, ...] of stages of these counts, equal if None, as [all layers, ...]."""
    num_chunks, num_ranks, room = leaf.shape[:3]
    where = Placement.resolve(placement, num_ranks=num_ranks, num_chunks=num_chunks)
    whole = leaf.reshape(math.prod(leaf.shape[:3]), *leaf.shape[3:])
    counts = counts or (room,) * (num_chunks * num_ranks)
    if set(counts) == {room} and where.is_loop:
        return whole
    places = _places(counts, where)
    # Gradients of integers have dtype float0 and are numpy arrays.
    return whole[places] if isinstance(whole, np.ndarray) else jnp.take(whole, places, axis=0, unique_indices=True)


def _check_kinds(name: str, tree: Any) -> None:
    if not isinstance(tree, Mapping):
        raise ScheduleError(
            f"{name} is a {type(tree).__name__}, but with a pattern it is a dict of the parameters of each kind.",
            fix='give {"dense": ..., "moe": ...}.',
        )


def _check_room(name: str, stages: Any, *, counts: Sequence[int]) -> None:
    """Raise unless parameters [chunks, ranks, layers, ...] are those of stages of these counts."""
    room = max(*counts, 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(stages):
        # An index past the end would silently read the last layer again.
        if leaf.ndim < 3 or leaf.shape[0] * leaf.shape[1] != len(counts) or leaf.shape[2] != room:
            raise ScheduleError(
                f"{name}{jax.tree_util.keystr(path)} has shape {leaf.shape}, but {len(counts)} stages of "
                f"{list(counts)} layers have [chunks, ranks, {room}, ...], chunks x ranks = {len(counts)}.",
                fix="give the layers_per_stage by which stages_from_layers() cut it.",
            )


def check_layers(
    num_layers: int, *, num_ranks: int, num_chunks: int = 1, layers_per_stage: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the number of layers of each stage, after checking that they add up to all layers.

    Raises:
        ScheduleError: with the equation that does not hold.
    """
    for name, count in {"num_layers": num_layers, "num_ranks": num_ranks, "num_chunks": num_chunks}.items():
        check_count(name, count, error=ScheduleError)
    num_stages = num_ranks * num_chunks
    what = f"{num_ranks} ranks" if num_chunks == 1 else f"{num_ranks} ranks x {num_chunks} chunks"
    if layers_per_stage is not None:
        check_counts(layers_per_stage)
        counts = tuple(layers_per_stage)
        _check_counts(counts, num_layers=num_layers, num_stages=num_stages, what=what)
        return counts
    check_divides(
        "num_layers",
        num_layers,
        over=f"{what} = {num_stages} stages",
        parts=num_stages,
        error=ScheduleError,
        fix=f"set num_layers={nearest_multiples(num_layers, num_stages)[1]}, choose a pipe size that divides "
        f"{num_layers}, or say how many layers each stage has.",
    )
    return (num_layers // num_stages,) * num_stages


def _check_counts(counts: tuple[int, ...], *, num_layers: int, num_stages: int, what: str) -> None:
    asked = f"layers_per_stage={','.join(map(str, counts))}"
    if len(counts) != num_stages:
        raise ScheduleError(
            f"{asked} is for {len(counts)} stages, but {what} make {num_stages}.",
            fix=f"give {num_stages} numbers, from the first stage to the last, or 'auto'.",
        )
    for stage, count in enumerate(counts):
        if count < 1:
            raise ScheduleError(
                f"{asked} has {count} layers for stage {stage}; a stage has at least one.",
                fix=f"give every stage 1 or more, {num_layers} in all, or 'auto'.",
            )
    # Megatron-LM once built 28 of 30 layers and trained on (its issue 1304).
    if sum(counts) != num_layers:
        gap = sum(counts) - num_layers
        raise ScheduleError(
            f"{asked} adds up to {sum(counts)} layers, {abs(gap)} {'more' if gap > 0 else 'fewer'} than "
            f"num_layers={num_layers}.",
            fix=f"make it add up to {num_layers}, set num_layers={sum(counts)}, or use 'auto'.",
        )


def _places(counts: Sequence[int], where: Placement) -> Places:
    """Return the position of each layer of the model among the padded layers of all stages, by chunk, then by rank.

    For stages of 2, 1 and 3 layers every stage has room for 3, and with 3 ranks the positions are 0 1, 3, 6 7 8.
    """
    room = max(*counts, 1)
    order = [where.chunk_of(stage) * where.num_ranks + where.rank_of(stage) for stage in range(len(counts))]
    return np.concatenate(
        [place * room + np.arange(count, dtype=np.int32) for place, count in zip(order, counts, strict=True)]
    )
