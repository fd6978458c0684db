"""Bound the time of a step from below, by class, with every operation at the device's peak.

An operation takes as long as its flops or its bytes, whichever is longer (Williams et al. 2009, "Roofline"); a
collective as long as its bytes take on its slowest link. Across nodes, a group sends through the network adapters of
all its members in a node, since NCCL builds rings that start at different members. Nothing overlaps or waits: the bound
leaves out bubbles, launches and latencies.
"""

from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from .collectives import Collective
from .hardware import Hardware
from .work import CLASSES, Operation, WorkClass

_DIRECT = ("collective-permute", "all-to-all", "ragged-all-to-all")
"""Collectives in which a device sends its data straight to others rather than around a ring."""


def roofline_times_s(
    operations: Iterable[Operation],
    collectives: Iterable[Collective],
    *,
    hardware: Hardware,
    mesh: Mesh,
    devices_per_node: int,
) -> dict[WorkClass, float]:
    """Return the seconds of each class in a step, on the slowest device.

    Args:
        devices_per_node: number of devices that share a node; collectives across nodes use the network.
    """
    times = {kind: np.zeros(mesh.devices.size) for kind in CLASSES}
    for operation in operations:
        if operation.kind != "communication":
            times[operation.kind] = times[operation.kind] + operation.count * bound_time_s(operation, hardware)
    adapters = Adapters(mesh, devices_per_node)
    for collective in collectives:
        times["communication"] = times["communication"] + collective_time_s(collective, hardware, adapters)
    slowest = int(np.argmax(np.sum(list(times.values()), axis=0)))
    return {kind: float(time[slowest]) for kind, time in times.items()}


def bound_time_s(operation: Operation, hardware: Hardware) -> float:
    """Return the seconds of one execution of an operation at the device's peaks."""
    costs = [
        (operation.matrix_flops, hardware.matrix_peak(operation.dtype)),
        (operation.vector_flops, hardware.vector_flops_per_s),
        (operation.moved_bytes, hardware.memory_bytes_per_s),
    ]
    return max(cost / peak if peak else 0.0 for cost, peak in costs)


class Adapters:
    """Number of network adapters of a device's group in each node, by mesh axes; inf for groups inside one node."""

    def __init__(self, mesh: Mesh, devices_per_node: int) -> None:
        self._mesh = mesh
        # Devices are numbered node by node.
        self._nodes = np.arange(mesh.devices.size).reshape(mesh.devices.shape) // devices_per_node
        self._known: dict[str, np.ndarray] = {}

    def of(self, axis: str) -> np.ndarray:
        """Return the number for each device, taken from the node where its group has fewest, [devices]."""
        if axis not in self._known:
            self._known[axis] = self._count(axis)
        return self._known[axis]

    def _count(self, axis: str) -> np.ndarray:
        """Count the members of each device's group in the node where it has fewest, [devices]."""
        names, nodes = self._mesh.axis_names, self._nodes
        if nodes.max() == 0:
            return np.full(nodes.size, np.inf)
        if not set(axis.split("+")) <= set(names):
            # The members of these groups are unknown: assume one adapter, the slowest case.
            return np.ones(nodes.size)
        # As rows of `devices`, the groups of devices that differ in these axes only.
        places = [names.index(name) for name in axis.split("+")]
        order = [*(place for place in range(nodes.ndim) if place not in places), *places]
        size = int(np.prod([nodes.shape[place] for place in places]))
        devices = np.arange(nodes.size).reshape(nodes.shape).transpose(order).reshape(-1, size)
        found = np.empty(nodes.size)
        for group in devices:
            _, members = np.unique(nodes.reshape(-1)[group], return_counts=True)
            found[group] = members.min() if len(members) > 1 else np.inf
        return found


def collective_time_s(collective: Collective, hardware: Hardware, adapters: Adapters) -> np.ndarray:
    """Return the seconds of a collective on each device, 0 if the speed of its links is unknown, [devices]."""
    num_adapters = adapters.of(collective.axis)
    if collective.kind in _DIRECT:
        # Each device sends its own data over its own adapter.
        num_adapters = np.where(np.isinf(num_adapters), np.inf, 1.0)
    inside = _times(collective.sent_bytes, hardware.link_bytes_per_s)
    across = _times(collective.sent_bytes / num_adapters, hardware.network_bytes_per_s)
    return np.maximum(inside, across)


def _times(sent_bytes: np.ndarray, bytes_per_s: float) -> np.ndarray:
    """Return seconds by device, 0 if the bandwidth is unknown."""
    return sent_bytes / bytes_per_s if bytes_per_s else np.zeros_like(sent_bytes)
