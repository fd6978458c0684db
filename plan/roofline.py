"""How long a step would take if every operation ran at the device's peak, by class: a bound, not a prediction.

An operation takes as long as its flops or its bytes do, whichever is longer (Williams et al. 2009); a collective as
long as what it sends does on its slowest link. Nothing overlaps or waits: bubbles, launches and latencies are left out.
"""

from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from .collectives import Collective
from .hardware import Hardware
from .work import CLASSES, Class, Operation


def roofline_times_s(
    operations: Iterable[Operation],
    collectives: Iterable[Collective],
    *,
    hardware: Hardware,
    mesh: Mesh,
    devices_per_node: int,
) -> dict[Class, float]:
    """Return the seconds of each class in a step, of the device that takes longest.

    Args:
        devices_per_node: collectives among more of the mesh's devices than share a node use the network.
    """
    times = {kind: np.zeros(mesh.devices.size) for kind in CLASSES}
    for operation in operations:
        if operation.kind != "communication":
            times[operation.kind] = times[operation.kind] + operation.count * bound_time_s(operation, hardware)
    for collective in collectives:
        crosses = _crosses_nodes(collective.axis, mesh, devices_per_node)
        speed = hardware.network_bytes_per_s if crosses else hardware.link_bytes_per_s
        if speed:
            times["communication"] = times["communication"] + collective.sent_bytes / speed
    slowest = int(np.argmax(np.sum(list(times.values()), axis=0)))
    return {kind: float(time[slowest]) for kind, time in times.items()}


def bound_time_s(operation: Operation, hardware: Hardware) -> float:
    """Return the least that one run of an operation takes on this device."""
    costs = [
        (operation.matrix_flops, hardware.matrix_peak(operation.dtype)),
        (operation.vector_flops, hardware.vector_flops_per_s),
        (operation.moved_bytes, hardware.memory_bytes_per_s),
    ]
    return max(cost / peak if peak else 0.0 for cost, peak in costs)


def _crosses_nodes(axis: str, mesh: Mesh, devices_per_node: int) -> bool:
    """Whether any group along these axes has devices of two nodes, devices being numbered node by node."""
    if mesh.devices.size <= devices_per_node:
        return False
    if not set(axis.split("+")) <= set(mesh.axis_names):
        return True
    nodes = np.arange(mesh.devices.size).reshape(mesh.devices.shape) // devices_per_node
    places = tuple(mesh.axis_names.index(name) for name in axis.split("+"))
    return bool((nodes.max(axis=places) != nodes.min(axis=places)).any())
