"""The model of a GPU's speed: the seconds of an operation and of a collective, from shares of the peaks.

It is a model, the same for every program and every GPU. Where the planner has a share too (`plan/machines`), this is
its number, which is fitted on published measurements; none is fitted on the programs that are compared by it.

Left out: products that are slower because their tiles do not fill the cores, collectives that slow down the kernels
beside them, and clocks that sink under load. Read `simulate.py` next.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import Mesh

from ..collectives import Collective
from ..groups import read_groups
from ..hardware import Hardware
from ..hlo import HloModule, Instruction
from ..roofline import Adapters, bound_time_s, collective_time_s
from ..work import Operation

MATRIX_SHARE = 0.705
"""Share of the peak that large bfloat16 products keep in training on an H100 (planner, `topologies.toml`)."""

_FLASH_LOAD = math.sqrt(MATRIX_SHARE / 0.775)
FLASH_SHARES = {"__cudnn$fmhaSoftmax": 0.6 * _FLASH_LOAD, "__cudnn$fmhaSoftmaxBackward": 0.5 * _FLASH_LOAD}
"""Share of the peak that fused attention keeps under load, forward and backward (planner, `kernel_time.py`)."""

MEMORY_SHARE = 0.74
"""Share of the memory bandwidth that kernels reach (planner, `kernel_time.py`)."""

LINK_SHARE, NETWORK_SHARE = 0.79, 0.92
"""Shares of the bandwidth of NVLink and of the network that collectives reach (planner, `collective_time.py`)."""

LINK_START_S, NETWORK_START_S, PERMUTE_START_S = 40e-6, 50e-6, 15e-6
"""Seconds that a collective takes besides, inside a node and across nodes, and a permute (planner)."""

ALL_REDUCE_SHARE, ALL_REDUCE_START_S = 1.04, 70e-6
"""The same for an all-reduce inside a node, where Hopper's switches add on the way (planner, eight H200)."""

KERNEL_S = 2e-6
"""Seconds from the end of a kernel to the start of the next one: an assumption."""

BRANCH_S = 20e-6
"""Seconds of a conditional, for which the host reads the condition from the device: an assumption, an upper bound."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfer:
    """One run of a collective: seconds on each device, [devices], its groups, and whether it crosses nodes.

    `groups` has a row of devices for each group, or is pairs of sender and receiver if `is_permute`; None: all devices.
    """

    axis: str
    seconds: np.ndarray
    groups: np.ndarray | None
    is_permute: bool
    crosses_nodes: bool


def modelled_hardware(hardware: Hardware) -> Hardware:
    """Return the hardware with the rates that the model takes programs to reach."""
    return replace(
        hardware,
        matrix_flops_per_s={dtype: MATRIX_SHARE * peak for dtype, peak in hardware.matrix_flops_per_s.items()},
        memory_bytes_per_s=MEMORY_SHARE * hardware.memory_bytes_per_s,
        link_bytes_per_s=LINK_SHARE * hardware.link_bytes_per_s,
        network_bytes_per_s=NETWORK_SHARE * hardware.network_bytes_per_s,
    )


def kernel_times_s(
    program: HloModule, operations: Iterable[Operation], hardware: Hardware
) -> dict[str, dict[str, float]]:
    """Return the seconds of one run of every operation but collectives, by name and what they are spent on."""
    reached = modelled_hardware(hardware)
    instructions = {instruction.name: instruction for _, instruction in program.instructions()}
    times = {}
    for one in operations:
        instruction = instructions[one.name]
        # Of control instructions, those that move nothing run on the host, or not at all.
        if one.kind == "communication" or instruction.opcode.startswith("async") or not _is_kernel(one):
            continue
        share = FLASH_SHARES.get(instruction.text("custom_call_target"), MATRIX_SHARE)
        slowed = replace(one, matrix_flops=int(one.matrix_flops * MATRIX_SHARE / share))
        times[one.name] = {one.kind: bound_time_s(slowed, reached), "launches": KERNEL_S}
    return times


def _is_kernel(operation: Operation) -> bool:
    return operation.kind != "control" or operation.moved_bytes > 0


def transfers(
    program: HloModule, collectives: Iterable[Collective], *, hardware: Hardware, mesh: Mesh, devices_per_node: int
) -> dict[str, Transfer]:
    """Return one run of every collective, by name of its instruction."""
    instructions = {instruction.name: instruction for _, instruction in program.instructions()}
    adapters = Adapters(mesh, devices_per_node)
    reached = modelled_hardware(hardware)
    return {one.name: _transfer(one, instructions[one.name], reached, adapters) for one in collectives}


def _transfer(collective: Collective, instruction: Instruction, hardware: Hardware, adapters: Adapters) -> Transfer:
    runs = np.maximum(collective.count, 1)
    one_run = replace(collective, sent_bytes=collective.sent_bytes / runs)
    seconds = collective_time_s(one_run, hardware, adapters)
    is_permute = collective.kind == "collective-permute"
    crosses = bool(np.isfinite(adapters.of(collective.axis)).any())
    groups = read_groups(instruction, num_devices=seconds.size)
    rows = None if groups is None else np.array(groups)
    start_s = PERMUTE_START_S if is_permute else NETWORK_START_S if crosses else LINK_START_S
    if collective.kind == "all-reduce" and not crosses:
        seconds, start_s = seconds * LINK_SHARE / ALL_REDUCE_SHARE, ALL_REDUCE_START_S
    # A device takes part for as long as the slowest of those that it exchanges data with.
    together = latest(seconds, rows, is_permute=is_permute)
    return Transfer(
        axis=collective.axis,
        seconds=np.where(together > 0, together + start_s, 0.0),
        groups=rows,
        is_permute=is_permute,
        crosses_nodes=crosses,
    )


def latest(times: np.ndarray, groups: np.ndarray | None, *, is_permute: bool) -> np.ndarray:
    """Return for each device the largest of the times of itself and all that it exchanges data with, [devices]."""
    found = times.copy()
    if groups is None:
        found[:] = times.max()
    elif is_permute:
        # A sender waits until its receiver is ready, too.
        senders, receivers = groups.reshape(-1, 2).T
        np.maximum.at(found, receivers, times[senders])
        np.maximum.at(found, senders, times[receivers])
    else:
        found[groups] = times[groups].max(axis=-1, keepdims=True)
    return found
