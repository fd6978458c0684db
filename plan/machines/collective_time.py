"""Compute the time of collectives by size, number of devices and the links between them.

Inside a node it is interpolated from measured bus bandwidths (`all_reduces.toml`) over size and number of ranks. Across
nodes it is a ring over the network adapters of the group's devices, with a latency that grows with the logarithm of the
nodes (Thakur et al. 2005). Read `../costs/layer_time.py` next.
"""

import math
import tomllib
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

from .topology import Topology

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]

_DATA = Path(__file__).with_name("all_reduces.toml")
_MIB = 2.0**20
# Below the smallest measured size the time falls to this share of it: 43.8 us at 32 KiB, 101.9 us at 1 MiB on A100.
_START_SHARE = 0.43
# Shares of the data sheets' bandwidths that messages reach, and seconds until the first byte arrives.
LINK_SHARE = 0.78
_NETWORK_SHARE = 0.92
LINK_START_S = 10e-6
_NETWORK_START_S = 15e-6
# Switches that reduce in the network (NVLS) serve all-reduce only: 361 against 473 GB/s at 8 GiB on eight H200.
_RING_SHARE = {"h200": 0.765, "b200": 0.765}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Devices that take part in a collective: `size` in all, `per_node` in each of their nodes."""

    size: int
    per_node: int

    @property
    def num_nodes(self) -> int:
        """Number of nodes that the group spans."""
        return -(-self.size // self.per_node)


def make_group(topology: Topology, *, size: int, stride: int) -> Group:
    """Return the group of `size` devices that are `stride` apart; devices are numbered node by node."""
    per_node = max(1, min(size, topology.devices_per_node // stride))
    return Group(size=size, per_node=per_node)


def collective_time_s(kind: CollectiveKind, *, num_bytes: float, group: Group, topology: Topology) -> float:
    """Return the seconds of one collective.

    Args:
        num_bytes: bytes of the whole array: the reduced array, the gathered array, or the message of a "send".
    """
    if group.size <= 1 or num_bytes <= 0:
        return 0.0
    if kind == "send":
        return _send_s(num_bytes, group, topology)
    if kind == "all_to_all":
        return _all_to_all_s(num_bytes, group, topology)
    # An all-gather or reduce-scatter is half of a ring all-reduce: (n - 1) / n of the array instead of 2 (n - 1) / n.
    is_ring = kind != "all_reduce"
    if group.num_nodes == 1:
        whole = _node_all_reduce_s(num_bytes, group.size, topology, is_ring=is_ring)
    else:
        whole = _network_all_reduce_s(num_bytes, group, topology)
    return whole / 2 if is_ring else whole


def _send_s(num_bytes: float, group: Group, topology: Topology) -> float:
    accelerator = topology.accelerator
    if group.num_nodes == 1:
        return LINK_START_S + num_bytes / (LINK_SHARE * accelerator.link_bytes_per_s)
    return _NETWORK_START_S + num_bytes / (_NETWORK_SHARE * accelerator.network_bytes_per_s)


def _all_to_all_s(num_bytes: float, group: Group, topology: Topology) -> float:
    """Return the seconds in which each device sends an equal part of its bytes to each other one, straight to it."""
    accelerator, part = topology.accelerator, num_bytes / group.size
    inside = LINK_START_S + part * (group.per_node - 1) / (LINK_SHARE * accelerator.link_bytes_per_s)
    if group.num_nodes == 1:
        return inside
    # A device sends to other nodes over its own adapter.
    sent = part * (group.size - group.per_node)
    return max(inside, _NETWORK_START_S + sent / (_NETWORK_SHARE * accelerator.network_bytes_per_s))


def _node_all_reduce_s(num_bytes: float, size: int, topology: Topology, *, is_ring: bool) -> float:
    accelerator = topology.accelerator
    wire = 2 * (size - 1) / size * num_bytes
    curves = _curves().get(accelerator.curve)
    if not curves:
        return 2 * LINK_START_S * math.log2(size) + wire / (LINK_SHARE * accelerator.link_bytes_per_s)
    share = _RING_SHARE.get(accelerator.curve, 1.0) if is_ring else 1.0
    widths = sorted(curves)
    # Interpolate between the measured numbers of ranks on both sides; outside of them the nearest one counts.
    place = min(bisect_left(widths, size), len(widths) - 1)
    high = widths[place]
    low = widths[max(0, place - 1)] if high > size else high
    weight = 0.0 if high == low or size <= low else (size - low) / (high - low)
    slow, fast = (_bus_bytes_per_s(curves[width], num_bytes) for width in (low, high))
    return wire / (slow * (1 - weight) + fast * weight) / share


def _network_all_reduce_s(num_bytes: float, group: Group, topology: Topology) -> float:
    accelerator = topology.accelerator
    wire = 2 * (group.size - 1) / group.size * num_bytes
    # Every device of the group has an adapter of its own, and all of them send at once; the links inside may be slower.
    network = group.per_node * _NETWORK_SHARE * accelerator.network_bytes_per_s
    speed = min(network, LINK_SHARE * accelerator.link_bytes_per_s)
    return 2 * _NETWORK_START_S * math.log2(group.num_nodes) + 2 * LINK_START_S + wire / speed


def _bus_bytes_per_s(points: tuple[tuple[float, float], ...], num_bytes: float) -> float:
    """Return the bus bandwidth at a size; time is linear between the measured sizes."""
    sizes = [size for size, _ in points]
    if num_bytes <= sizes[0]:
        size, speed = points[0]
        slower = _START_SHARE * size / num_bytes + (1 - _START_SHARE)
        return speed / slower
    place = bisect_left(sizes, num_bytes)
    if place == len(sizes):
        return points[-1][1]
    (size0, speed0), (size1, speed1) = points[place - 1], points[place]
    weight = (num_bytes - size0) / (size1 - size0)
    return num_bytes / (size0 / speed0 * (1 - weight) + size1 / speed1 * weight)


@lru_cache
def _curves() -> dict[str, dict[int, tuple[tuple[float, float], ...]]]:
    """Read the measured (bytes, bytes/s) by curve and number of ranks."""
    found: dict[str, dict[int, tuple[tuple[float, float], ...]]] = {}
    for row in tomllib.loads(_DATA.read_text())["all_reduce"]:
        sizes = [_MIB * mib for mib in row["mib"]]
        times = [size / (1e9 * speed) for size, speed in zip(sizes, row["bus_gb_per_s"], strict=True)]
        # Noise makes some small messages slower than larger ones; times are made to grow with size.
        points = tuple((size, size / time) for size, time in zip(sizes, accumulate(times, max), strict=True))
        found.setdefault(row["curve"], {})[row["ranks"]] = points
    return found
