"""Check a batch and choose how each leaf lies on the data shards: split over B, or whole on every shard.

    batch = {"x": [M, B, D], "temperature": [M]}         x is split over B; temperature has no B and is whole
    batch = {"x": [M, B, D], "class_weights": [M, V]}    refused: the second dimension of class_weights is V, not B
    StageFns(batch_specs={"x": P(None, "data"), "class_weights": P()})    says that class_weights is whole
    StageFns(batch_specs=P(None, "data", "context"))     cuts leaves [M, B, T, ...] along tokens too

Read `checks/arguments.py` next.
"""

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from ...meshes import ScheduleError, ShardingError
from ...meshes.divisibility import check_divides
from ..model.stage import StageFns
from ..model.trees import check_arrays, mesh_axes_of, spread_specs


def check_batch(fns: StageFns, batch: Any, *, num_microbatches: int, sizes: Mapping[str, int]) -> None:
    """Raise unless every leaf is [M], or [M, B, ...] with the same B, or has a spec in `fns.batch_specs`.

    Args:
        sizes: size of each mesh axis.

    Raises:
        ScheduleError: a leaf is not an array, or does not have M microbatches.
        ShardingError: leaves disagree on B, B does not split over the data shards, or tokens do not over context.
    """
    leaves = check_arrays("batch", batch)
    if not leaves:
        raise ScheduleError("batch is empty.", fix=f"give leaves [{num_microbatches}, batch, ...].")
    for name, leaf in leaves.items():
        _check_microbatches(name, leaf.shape, num_microbatches)
    specs = dict(zip(leaves, jax.tree.leaves(batch_specs(fns, batch)), strict=True))
    split = {name: leaf.shape for name, leaf in leaves.items() if specs[name] != P()}
    over, num_shards = " x ".join(fns.axes.batch), math.prod(sizes[axis] for axis in fns.axes.batch)
    _check_sizes(split, num_shards, over=over, spec=_split(fns))
    if not split and num_shards > 1:
        raise ShardingError(
            f"no leaf of the batch is split over {over}={num_shards}: every shard would add the same loss once more.",
            fix=f"give leaves [{num_microbatches}, batch, ...], or use a mesh with {over}=1.",
        )
    _check_tokens(fns, {name: (leaf.shape, specs[name]) for name, leaf in leaves.items()}, sizes)


def batch_specs(fns: StageFns, batch: Any) -> Any:
    """Return a spec for every leaf of a batch: P(None, "data") for split over B, P() for whole on every data shard.

    "data" stands for the mesh's batch axes, `fns.axes.batch`.

    Raises:
        ShardingError: `fns.batch_specs` is not a prefix of the batch's tree, or splits another dimension.
    """
    if fns.batch_specs is None:
        return jax.tree.map(lambda leaf: _split(fns) if leaf.ndim > 1 else P(), batch)
    specs = spread_specs("batch_specs", fns.batch_specs, batch, of="batch")
    return jax.tree.map_with_path(partial(_read_spec, fns), specs, batch)


def _split(fns: StageFns) -> P:
    """Return the spec of a leaf that is split over its second dimension."""
    return P(None, fns.axes.batch if len(fns.axes.batch) > 1 else fns.axes.batch[0])


def _check_tokens(fns: StageFns, leaves: Mapping[str, tuple[Any, P]], sizes: Mapping[str, int]) -> None:
    """Raise unless tokens split over the context axes, those of one leaf at least."""
    axes = fns.axes.context
    over, parts = " x ".join(axes), math.prod(sizes[axis] for axis in axes)
    cut = {name: own for name, own in leaves.items() if set(axes) & set(mesh_axes_of(own[1]))}
    if parts > 1 and not cut:
        raise ShardingError(
            f"no leaf of the batch is split over {over}={parts}: its devices would all add the same loss.",
            fix=f"say which dim holds tokens, StageFns(batch_specs={P(*_split(fns), *axes)}), or use a mesh with "
            f"{over}=1.",
        )
    for name, (shape, spec) in cut.items():
        check_divides(f"{name}: tokens", shape[len(spec) - 1], over=over, parts=parts, error=ShardingError)


def _read_spec(fns: StageFns, path: Any, spec: P, leaf: Any) -> P:
    split, axes = _split(fns), fns.axes.context
    context = axes if len(axes) > 1 else axes[0] if axes else None
    entries = [entry[0] if isinstance(entry, tuple) and len(entry) == 1 else entry for entry in spec]
    # Trailing None mean nothing in a spec: P(None, "data", None) is P(None, "data").
    while entries and entries[-1] is None:
        entries.pop()
    # Tokens lie in some dim behind the batch.
    cut = P(*split, *[None] * (len(entries) - 3), context) if context is not None else split
    if P(*entries) not in (split, cut, P()) or len(entries) > leaf.ndim:
        raise ShardingError(
            f"batch_specs{jax.tree_util.keystr(path)} is {spec} for a leaf of shape {leaf.shape}: a leaf is "
            "[microbatches, batch, ...] and split over its second dimension, or whole on every data shard.",
            fix=f"write {split}{f', {P(*split, context)} where its third is tokens,' if context else ''} or P().",
        )
    return P(*entries)


def _check_microbatches(name: str, shape: tuple[int, ...], num_microbatches: int) -> None:
    if not shape:
        raise ScheduleError(
            f"{name} is a single number, but leaves of a batch are [microbatches, batch, ...] or [microbatches].",
            fix=f"give one for each microbatch, jnp.full({num_microbatches}, value), or put it into params.shared.",
        )
    if shape[0] == num_microbatches:
        return
    size, rest = shape[0], "".join(f", {n}" for n in shape[1:])
    fix = f"reshape it to ({num_microbatches}, {size // num_microbatches}{rest})."
    if size % num_microbatches or not size:
        fix = f"use a number of sequences that is a multiple of {num_microbatches}, and reshape it."
    raise ScheduleError(
        f"{name} has shape {shape}, but the schedule runs {num_microbatches} microbatches: leaves are "
        "[microbatches, batch, ...] or [microbatches].",
        fix=fix,
    )


def _check_sizes(shapes: dict[str, tuple[int, ...]], num_shards: int, *, over: str, spec: P) -> None:
    if not shapes:
        return
    # The size that most leaves have is taken for the batch, so that the error names the odd one out.
    size, _ = Counter(shape[1] for shape in shapes.values()).most_common(1)[0]
    like = next(name for name, shape in shapes.items() if shape[1] == size)
    for name, shape in shapes.items():
        if shape[1] != size:
            raise ShardingError(
                f"{name} has shape {shape} and {like} {shapes[like]}: the second dimension is the batch, "
                f"and {shape[1]} is not {size}.",
                fix=f"mark what has no batch dimension, StageFns(batch_specs=...): P() for it, {spec} for the others.",
            )
    fix = f"use a microbatch size that is a multiple of {num_shards}."
    if not size:
        raise ShardingError(f"{like} has no sequences: its shape is {shapes[like]}.", fix=fix)
    check_divides(f"{like}: microbatch size", size, over=over, parts=num_shards, error=ShardingError, fix=fix)
