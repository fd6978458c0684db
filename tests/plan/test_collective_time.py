"""Collectives by size, width and links: never faster for more."""

import pytest
from trellax.plan.machines.collective_time import CollectiveKind, collective_time_s, make_group
from trellax.plan.machines.topology import read_topology

SIZES = [1 << power for power in range(10, 35, 2)]


@pytest.mark.parametrize("machine", ["a100x8", "h100x8", "b200x8", "a100-pciex8", "mi300xx8", "tpu-v4x64", "a100x64"])
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "send"])
def test_more_bytes_never_take_less_time(machine: str, kind: CollectiveKind) -> None:
    topology = read_topology(machine)
    group = make_group(topology, size=topology.num_devices, stride=1)
    times = [collective_time_s(kind, num_bytes=size, group=group, topology=topology) for size in SIZES]
    assert times == sorted(times)


@pytest.mark.parametrize("machine", ["h100x64", "v100x64"])
def test_more_nodes_never_take_less_time(machine: str) -> None:
    topology = read_topology(machine)
    groups = [make_group(topology, size=size, stride=1) for size in (8, 16, 32, 64)]
    times = [collective_time_s("all_reduce", num_bytes=1 << 28, group=group, topology=topology) for group in groups]
    assert times == sorted(times)


def test_group_of_one_and_nothing_to_send_cost_nothing() -> None:
    topology = read_topology("h100x8")
    one, two = (make_group(topology, size=size, stride=1) for size in (1, 2))
    assert collective_time_s("all_reduce", num_bytes=1 << 20, group=one, topology=topology) == 0
    assert collective_time_s("all_reduce", num_bytes=0, group=two, topology=topology) == 0


def test_strided_groups_span_nodes() -> None:
    topology = read_topology("h100x64/8")
    assert make_group(topology, size=8, stride=8).num_nodes == 8
    assert make_group(topology, size=8, stride=1).num_nodes == 1
