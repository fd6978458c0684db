"""List the collectives of a compiled program: mesh axis, number of runs on each device, and bytes sent.

The bytes are those that one device sends with a bandwidth-optimal algorithm (Thakur et al. 2005, "Optimization of
Collective Communication Operations in MPICH"; NCCL's rings) in a group of n devices:

    all-reduce          2 (n - 1) / n x operand
    all-gather          (n - 1) x operand, which is a shard
    reduce-scatter      (n - 1) / n x operand
    all-to-all          (n - 1) / n x operand
    collective-permute  the operand, if the device is the source of a pair and not its own target
    broadcast           the operand

A real implementation may send more, but not less. Read `traffic.py` next.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from .execution_counts import ExecutionCounts
from .groups import Groups, axis_of_groups, axis_of_pairs, read_groups
from .hlo import HloModule, Instruction

KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
"""Opcodes of collectives. Of an asynchronous pair, `-start` is counted and `-done` is not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Collective:
    """One collective instruction of a program.

    `count` and `sent_bytes` are arrays [devices] for a whole run of the program; `operand_bytes` is for one execution.
    `op_name` is its place in the user's program. `axis` names mesh axes, such as `data`, `pipe+data` or `part of
    tensor`, or is `unattributed`.
    """

    name: str
    kind: str
    axis: str
    op_name: str
    operand_bytes: int
    count: np.ndarray
    sent_bytes: np.ndarray


def list_collectives(program: HloModule, executions: ExecutionCounts, *, mesh: Mesh) -> tuple[Collective, ...]:
    """Return all collectives that at least one device runs.

    Partition i of the program must be the i-th device of the mesh in row-major order, as `jax.jit` makes it.
    """
    return tuple(_list_executed(program, executions, mesh))


def _list_executed(program: HloModule, executions: ExecutionCounts, mesh: Mesh) -> Iterator[Collective]:
    """Yield the collectives with the axes along which they run."""
    num_devices = mesh.devices.size
    for computation, instruction in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        count = np.broadcast_to(executions.of(computation), (num_devices,))
        if kind not in KINDS or not count.any():
            continue
        groups = read_groups(instruction, num_devices=num_devices)
        operand_bytes = computation.operand_bytes(instruction)
        find_axis = axis_of_pairs if kind == "collective-permute" else axis_of_groups
        factor = _sent_operands(kind, groups, num_devices)
        yield Collective(
            name=instruction.name,
            kind=kind,
            axis=find_axis(groups, axes=mesh.axis_names, shape=mesh.devices.shape),
            op_name=_op_name(instruction),
            operand_bytes=operand_bytes,
            count=count,
            sent_bytes=count * factor * operand_bytes,
        )


def _sent_operands(kind: str, groups: Groups | None, num_devices: int) -> np.ndarray:
    """Return the bytes that each device sends in one execution, in units of its operand, [devices]."""
    if kind == "collective-permute":
        # A device that is its own target sends nothing.
        sources = [pair[0] for pair in groups or () if pair[0] != pair[1]]
        return np.isin(np.arange(num_devices), sources).astype(float)
    # Groups that could not be read may be as large as the whole mesh.
    sizes = np.full(num_devices, float(num_devices) if groups is None else 1.0)
    for group in groups or ():
        sizes[[device for device in group if device < num_devices]] = len(group)
    # By group size n, in units of the operand: a shard for an all-gather, the whole array for a reduce-scatter.
    return {
        "all-reduce": 2 * (sizes - 1) / sizes,
        "all-gather": sizes - 1,
        "collective-broadcast": (sizes > 1).astype(float),
    }.get(kind, (sizes - 1) / sizes)


def _op_name(instruction: Instruction) -> str:
    """Return the place in the user's program, or the opcode of an instruction that the compiler made."""
    return instruction.op_name or f"({instruction.opcode})"
