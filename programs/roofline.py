"""How long a step would take if every operation ran at the device's peak, by class: a bound, not a prediction.

An operation takes as long as its flops or its bytes do, whichever is longer (Williams et al. 2009); a collective as
long as what it sends does on its slowest link. Across nodes a group sends through the network adapters of all its
members in a node: rings of as many beginnings share what crosses (NCCL's channels). Nothing overlaps or waits: bubbles,
launches and latencies are left out.
"""

from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from .collectives import Collective
from .hardware import Hardware
from .work import CLASSES, Class, Operation

_DIRECT = ("collective-permute", "all-to-all", "ragged-all-to-all")


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
    adapters = _Adapters(mesh, devices_per_node)
    for collective in collectives:
        times["communication"] = times["communication"] + _collective_time_s(collective, hardware, adapters)
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


class _Adapters:
    """How many adapters a device's group has in each node, by the mesh axes of the group; inf inside one node."""

    def __init__(self, mesh: Mesh, devices_per_node: int) -> None:
        self._mesh = mesh
        # Devices are numbered node by node.
        self._nodes = np.arange(mesh.devices.size).reshape(mesh.devices.shape) // devices_per_node
        self._known: dict[str, np.ndarray] = {}

    def of(self, axis: str) -> np.ndarray:
        """Return the number for every device, those of the node where the group has fewest."""
        if axis not in self._known:
            self._known[axis] = self._count(axis)
        return self._known[axis]

    def _count(self, axis: str) -> np.ndarray:
        names, nodes = self._mesh.axis_names, self._nodes
        if nodes.max() == 0:
            return np.full(nodes.size, np.inf)
        if not set(axis.split("+")) <= set(names):
            # Nobody knows who is in these groups: one adapter is the slowest that it can be.
            return np.ones(nodes.size)
        places = [names.index(name) for name in axis.split("+")]
        order = [*(place for place in range(nodes.ndim) if place not in places), *places]
        size = int(np.prod([nodes.shape[place] for place in places]))
        devices = np.arange(nodes.size).reshape(nodes.shape).transpose(order).reshape(-1, size)
        found = np.empty(nodes.size)
        for group in devices:
            _, members = np.unique(nodes.reshape(-1)[group], return_counts=True)
            found[group] = members.min() if len(members) > 1 else np.inf
        return found


def _collective_time_s(collective: Collective, hardware: Hardware, adapters: _Adapters) -> np.ndarray:
    """Seconds of every device, 0 over links of which nothing is known."""
    of_group = adapters.of(collective.axis)
    if collective.kind in _DIRECT:
        # Each device sends its own, over its own adapter.
        of_group = np.where(np.isinf(of_group), np.inf, 1.0)
    inside = _times(collective.sent_bytes, hardware.link_bytes_per_s)
    across = _times(collective.sent_bytes / of_group, hardware.network_bytes_per_s)
    return np.maximum(inside, across)


def _times(sent_bytes: np.ndarray, bytes_per_s: float) -> np.ndarray:
    """Seconds by device; 0 over links of which nothing is known."""
    return sent_bytes / bytes_per_s if bytes_per_s else np.zeros_like(sent_bytes)
