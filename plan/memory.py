"""What a program keeps on each device, by purpose, adding up to what the compiler says it takes.

The total is exact. Parameters and optimizer state are counted from their shardings. Gradients and in-flight activations
are what the loops carry in temporary memory: gradients are the sums that an outermost loop carries, float32 and one for
each parameter's shape; activations are the rest, but not what loops carry that jax calls `transpose`, the backward of
a loop. Everything else is temporary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from .buffers import CarriedBuffer, Place, Places, list_carried, measure
from .hlo import Program


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest device; `capacity` is None where it is not known.

    `temporary` holds everything that is none of the others: also the batch, and outputs that reuse no input.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    total: int
    capacity: int | None

    @property
    def classes(self) -> dict[str, int]:
        """The parts that add up to the total."""
        return {name: value for name, value in asdict(self).items() if name not in ("total", "capacity")}

    @property
    def free(self) -> int | None:
        """Bytes left on the device, negative if the program does not fit."""
        return None if self.capacity is None else self.capacity - self.total


def count_memory(
    compiled: Any,
    program: Program,
    *,
    places: Places,
    parameters: Any,
    optimizer: Any = None,
    capacity: int | None = None,
) -> Memory:
    """Return the memory of a compiled program, one device's.

    Args:
        places: where values live, by `read_places`; empty where XLA does not tell, then gradients and activations are
            counted as temporary.
        parameters, optimizer: trees of the program's arguments, as arrays or shapes with shardings.
    """
    stats = compiled.memory_analysis()
    total = total_bytes(stats)
    shapes = Counter(_plain(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(parameters))
    gradients, forward = _part_carried(list(list_carried(program, places)), shapes)
    held = {
        "parameters": device_bytes(parameters),
        "gradients": measure(gradients),
        "optimizer": device_bytes(optimizer),
        "activations": measure([*forward, *gradients]) - measure(gradients),
    }
    return Memory(**held, temporary=total - sum(held.values()), total=total, capacity=capacity)


def _part_carried(
    carried: Sequence[CarriedBuffer], shapes: Counter[tuple[int, ...]]
) -> tuple[list[Place], list[Place]]:
    """Part what loops carry into the places of gradients and of activations."""
    gradients: list[Place] = []
    seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for buffer in carried:
        dims = _plain(buffer.array.dims)
        is_like = buffer.depth == "outer" and buffer.array.dtype == "f32" and dims != ()
        if is_like and seen[buffer.loop, dims] < shapes[dims]:
            seen[buffer.loop, dims] += 1
            gradients.append(buffer.place)
    forward = [buffer.place for buffer in carried if "transpose(" not in buffer.op_name]
    return gradients, [place for place in forward if place not in gradients]


def total_bytes(stats: Any) -> int:
    """Return what a program takes while it runs: arguments, temporaries, outputs that reuse no argument, its code."""
    return (
        stats.argument_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.generated_code_size_in_bytes
    )


def device_bytes(tree: Any) -> int:
    """Return the bytes of a tree of arrays, or of shapes with shardings, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if getattr(leaf, "sharding", None) is not None
        else math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _plain(dims: Any) -> tuple[int, ...]:
    """A shape without dimensions of size 1, which the loops may leave out."""
    return tuple(size for size in dims if size != 1)
