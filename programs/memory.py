"""Divide the memory that a program takes on each device by purpose; the parts add up to the compiler's total.

The total is exact, and so are parameters and optimizer state, from their shardings. Gradients and in-flight activations
are read from the values that loops carry from one iteration to the next. An outermost loop carries the sums of the
gradients, one float32 array of each parameter's shape. All other arrays that it carries and changes are activations,
such as a pipeline's ring buffers. So are arrays that only a forward loop inside it carries, such as the stacked
residuals of a scan over layers. The rest of the total is temporary. Example, with a parameter of f32[512,128]:

    while (ticks) carries        f32[512,128]        gradients: a parameter has this shape
                                 bf16[4,1,128]       activations: a ring buffer
      while (layers) carries     bf16[4,1,128]       passed in from the outer loop, counted once
                                 bf16[8,1,128]       activations: residuals of 8 layers
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import reduce
from operator import or_
from typing import Any, Literal

import jax

from ..meshes.host_memory import is_in_host_memory
from .hardware import XLA_SLOP, Hardware
from .hlo import Array, HloModule, Instruction
from .static_values import is_invariant

Verdict = Literal["fits", "over XLA's limit", "does not fit"]
"""Over XLA's limit a program runs, but XLA rematerialises and serialises collectives (see `hardware.py`)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest device; `capacity` is that of the device, `limit` that of XLA, None if unknown.

    `temporary` is the rest of the total, which includes the batch and outputs that reuse no input. `host` are the bytes
    of the optimizer and of activations that a device keeps in the memory of its host, which count in no other.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    total: int
    capacity: int | None
    limit: int | None = None
    host: int = 0

    @property
    def classes(self) -> dict[str, int]:
        """Bytes by purpose; they add up to the total."""
        others = ("total", "capacity", "limit", "host")
        return {name: value for name, value in asdict(self).items() if name not in others}

    @property
    def free(self) -> int | None:
        """Bytes left on the device, negative if the program does not fit."""
        return None if self.capacity is None else self.capacity - self.total

    @property
    def verdict(self) -> Verdict | None:
        """Whether the program fits the device and XLA's limit; None if the capacity is unknown."""
        return judge_memory(self.total, capacity=self.capacity, limit=self.limit)


def count_memory(
    compiled: Any,
    program: HloModule,
    *,
    parameters: Any,
    gradients: Any = None,
    optimizer: Any = None,
    hardware: Hardware | None = None,
) -> Memory:
    """Return the memory that a compiled program takes on one device.

    Args:
        parameters, optimizer: trees of the program's arguments, as arrays or shapes with shardings.
        gradients: shapes with shardings of the sums of gradients, where they are not those of the parameters.
    """
    stats, away = compiled.memory_analysis(), [leaf for leaf in jax.tree.leaves(optimizer) if is_in_host_memory(leaf)]
    host = device_bytes(away)
    # For CPU devices jax counts all arguments as theirs.
    total = total_bytes(stats) - (0 if stats.host_argument_size_in_bytes else host)
    sums, activations = count_carried(program, parameters=parameters if gradients is None else gradients)
    held = {
        "parameters": device_bytes(parameters),
        "gradients": sums,
        "optimizer": device_bytes(optimizer) - host,
        "activations": activations,
    }
    capacity = None if hardware is None else hardware.memory_bytes
    base = None if hardware is None else hardware.compiler_base_bytes
    limit = None if base is None else limit_bytes(kept_bytes(stats), base=base)
    temporary = total - sum(held.values())
    host += stats.host_temp_size_in_bytes
    return Memory(**held, temporary=temporary, total=total, capacity=capacity, limit=limit, host=host)


def judge_memory(total: float, *, capacity: float | None, limit: float | None) -> Verdict | None:
    """Return whether `total` bytes fit a device and XLA's limit; None if the capacity is unknown."""
    if capacity is None:
        return None
    if total > capacity:
        return "does not fit"
    return "fits" if limit is None or total <= limit else "over XLA's limit"


def total_bytes(stats: Any) -> int:
    """Return the bytes of arguments, temporaries, outputs that reuse no argument, and code of a program."""
    return kept_bytes(stats) + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def kept_bytes(stats: Any) -> int:
    """Return the bytes of arguments and of outputs that reuse none, which live for the whole program."""
    return stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def limit_bytes(kept: int, *, base: int) -> int:
    """Return the memory for which XLA plans a program: what is kept, and a share of what is left for temporary values.

    Args:
        kept: bytes of arguments and outputs.
        base: bytes that XLA takes as available.
    """
    return kept + int(XLA_SLOP * max(base - kept, 0))


def device_bytes(tree: Any) -> int:
    """Return the bytes of a tree of arrays, or of shapes with shardings, on one device."""
    return sum(math.prod(_shard_shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_carried(program: HloModule, *, parameters: Any) -> tuple[int, int]:
    """Return the bytes of gradients and of activations that the loops of a program carry on one device."""
    inside = program.in_loops()
    loops = [(computation.name in inside, i) for computation, i in program.instructions() if i.opcode == "while"]
    # Loops that follow each other hand their arrays on: each is counted as often as the loop has it that has most.
    counts = [Counter(_carried(program, loop)) for is_inside, loop in loops if not is_inside]
    outer = list(reduce(or_, counts, Counter[Array]()).elements())
    left = Counter(_sorted_sizes(_shard_shape(leaf)) for leaf in jax.tree.leaves(parameters))
    gradients = activations = 0
    for array in outer:
        dims = _sorted_sizes(array.dims)
        if array.dtype == "f32" and dims and left[dims]:
            # Each parameter has one sum of gradients: a further array of this shape is an activation.
            left[dims] -= 1
            gradients += array.num_bytes
        else:
            activations += array.num_bytes
    # A value that an outer loop passes to an inner one has the same type there. jax names a backward loop "transpose".
    forward = [loop for is_inside, loop in loops if is_inside and "transpose(" not in loop.op_name]
    # Loops that run one after another can use the same memory, so only the largest is added.
    added = [sum(array.num_bytes for array in _without(_carried(program, loop), outer)) for loop in forward]
    return gradients, activations + max(added, default=0)


def _carried(program: HloModule, loop: Instruction) -> list[Array]:
    """Return the types of arrays that a loop carries and changes."""
    if isinstance(loop.type, Array):
        return []
    body = program.computations[loop.called()["body"][0]]
    elements = enumerate(loop.type)
    arrays = [(index, array) for index, array in elements if isinstance(array, Array) and not array.is_on_host]
    return [array for index, array in arrays if not is_invariant(body, index)]


def _without(arrays: list[Array], others: list[Array]) -> Iterator[Array]:
    """Yield the arrays that are left when each of the others has cancelled one of the same type."""
    left = Counter(others)
    for array in arrays:
        if left[array]:
            left[array] -= 1
        else:
            yield array


def _shard_shape(leaf: Any) -> tuple[int, ...]:
    """Return the shape of an array's part on one device."""
    sharding = getattr(leaf, "sharding", None)
    return tuple(leaf.shape) if sharding is None else tuple(sharding.shard_shape(leaf.shape))


def _sorted_sizes(dims: Any) -> tuple[int, ...]:
    """Return the sorted dimensions without those of 1: loops may drop these, and layouts may permute dimensions."""
    return tuple(sorted(size for size in dims if size != 1))
