"""Convert parameters between [all layers, ...], the model's order, and [chunks, ranks, layers, ...] of the stages.

    8 layers, 2 ranks, 2 chunks          rank 0        rank 1
                              chunk 0    layers 0 1    layers 2 3       stage s is chunk s // ranks
                              chunk 1    layers 4 5    layers 6 7       of rank s % ranks

For equal stages both conversions are a reshape. Where stages differ, every stage has room for as many layers as the
largest; the rest of it is zero and never run.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...meshes import ScheduleError
from ...meshes.arguments import check_count
from ...meshes.divisibility import check_divides, nearest_multiples
from ..schedules.check import check_sizes
from .pattern import stage_pattern
from .stage import check_counts
from .trees import check_arrays


def stages_from_layers(
    layers: Any,
    *,
    num_ranks: int,
    num_chunks: int = 1,
    layers_per_stage: Sequence[int] | None = None,
    pattern: Sequence[str] | None = None,
) -> Any:
    """Return stage parameters [chunks, ranks, layers, ...] from parameters [all layers, ...] in the model's order.

    Args:
        layers_per_stage: number of layers of each stage, first to last; equal if left out.
        pattern: kinds of the layers, as in `StageFns`. Parameters are {kind: [layers of the kind, ...]} then.

    Raises:
        ScheduleError: the layers do not divide into equal stages, or the given numbers do not add up to them.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=1, num_chunks=num_chunks)
    if pattern is not None:
        sizes = {"num_ranks": num_ranks, "num_chunks": num_chunks, "layers_per_stage": layers_per_stage}
        return _stages_of_kinds(layers, pattern, sizes)
    num_layers = _count_layers(layers)
    counts = check_layers(num_layers, num_ranks=num_ranks, num_chunks=num_chunks, layers_per_stage=layers_per_stage)
    # `room` is the number of layers of the largest stage: all stages are padded to it.
    room, places = max(counts), _places(counts)

    def cut(leaf: jax.Array) -> jax.Array:
        if len(set(counts)) > 1:
            empty = jnp.zeros((len(counts) * room, *leaf.shape[1:]), leaf.dtype)
            leaf = empty.at[places].set(leaf, unique_indices=True, indices_are_sorted=True)
        return leaf.reshape(num_chunks, num_ranks, room, *leaf.shape[1:])

    return jax.tree.map(cut, layers)


def _count_layers(layers: Any) -> int:
    shapes = {name: leaf.shape for name, leaf in check_arrays("layers", layers).items()}
    if not shapes:
        raise ScheduleError("layers is empty: a model has layers.", fix="give arrays [all layers, ...].")
    first, shape = next(iter(shapes.items()))
    for name, other in shapes.items():
        if not other or other[:1] != shape[:1]:
            raise ScheduleError(
                f"{name} has shape {other} and {first} {shape}: the first dimension counts the layers of all alike.",
                fix="give arrays [all layers, ...].",
            )
    return shape[0]


def _stages_of_kinds(layers: Any, pattern: Sequence[str], sizes: dict[str, Any]) -> dict[str, Any]:
    found = {kind: _count_layers(own) for kind, own in layers.items()}
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
        room = max(*own, 1)
        empty = jnp.zeros((len(own) * room, *leaf.shape[1:]), leaf.dtype)
        filled = empty.at[stages.places_of(kind)].set(leaf, unique_indices=True, indices_are_sorted=True)
        return filled.reshape(sizes["num_chunks"], sizes["num_ranks"], room, *leaf.shape[1:])

    return {kind: jax.tree.map(partial(cut, kind), own) for kind, own in layers.items()}


def natural_order(
    stages: Any, *, layers_per_stage: Sequence[int] | None = None, pattern: Sequence[str] | None = None
) -> Any:
    """Return parameters [all layers, ...] in the model's order from stage parameters [chunks, ranks, layers, ...].

    With a `pattern` of kinds, which needs `layers_per_stage`, parameters are {kind: [layers of the kind, ...]}.
    """
    if pattern is not None:
        cut = stage_pattern(pattern, kinds=tuple(stages), counts=layers_per_stage or ())
        return {
            kind: jax.tree.map(lambda leaf, k=kind: leaf.reshape(-1, *leaf.shape[3:])[cut.places_of(k)], own)
            for kind, own in stages.items()
        }

    def merge(leaf: Any) -> Any:
        whole = leaf.reshape(math.prod(leaf.shape[:3]), *leaf.shape[3:])
        if layers_per_stage is None or len(set(layers_per_stage)) == 1:
            return whole
        if isinstance(whole, np.ndarray):
            # Gradients of integers have dtype float0 and are numpy arrays.
            return whole[_places(layers_per_stage)]
        return jnp.take(whole, _places(layers_per_stage), axis=0, unique_indices=True, indices_are_sorted=True)

    return jax.tree.map(merge, stages)


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


def _places(counts: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Return the position of each layer of the model among the padded layers of all stages."""
    room = max(counts)
    return np.concatenate([stage * room + np.arange(count, dtype=np.int32) for stage, count in enumerate(counts)])
