"""The time of collectives across nodes by hand: a group uses the adapters of all its members in a node."""

import numpy as np
import pytest
from jax.sharding import Mesh
from trellax.programs import Hardware
from trellax.programs.collectives import Collective
from trellax.programs.roofline import roofline_times_s

LINK, NETWORK = 8e9, 1e9

HARDWARE = Hardware(
    name="test",
    memory_bytes=1,
    memory_bytes_per_s=1e9,
    matrix_flops_per_s={},
    vector_flops_per_s=1e9,
    link_bytes_per_s=LINK,
    network_bytes_per_s=NETWORK,
)

# Of 64 devices, 8 in each node: pipe=8 over nodes, or pipe=16 with two stages a node.
CASES = [
    ("all-reduce", "pipe+tensor", (8, 1, 8), 1 / (8 * NETWORK)),
    ("all-reduce", "pipe", (8, 1, 8), 1 / NETWORK),
    ("all-reduce", "tensor", (8, 1, 8), 1 / LINK),
    ("all-reduce", "data", (2, 16, 2), 1 / (4 * NETWORK)),
    ("all-gather", "pipe", (16, 1, 4), 1 / (2 * NETWORK)),
    ("collective-permute", "pipe", (16, 1, 4), 1 / NETWORK),
    ("all-to-all", "pipe+tensor", (8, 1, 8), 1 / NETWORK),
    ("all-reduce", "unattributed", (8, 1, 8), 1 / NETWORK),
]


@pytest.mark.parametrize(("kind", "axis", "shape", "seconds_a_byte"), CASES)
def test_each_member_of_a_group_has_a_network_adapter(
    kind: str, axis: str, shape: tuple[int, int, int], seconds_a_byte: float
) -> None:
    one = Collective(
        name="c",
        kind=kind,
        axis=axis,
        op_name="",
        operand_bytes=1,
        count=np.ones(64),
        sent_bytes=np.full(64, 1e6),
    )
    mesh = Mesh(np.arange(64).reshape(shape), ("pipe", "data", "tensor"))
    times = roofline_times_s([], [one], hardware=HARDWARE, mesh=mesh, devices_per_node=8)
    assert times["communication"] == pytest.approx(1e6 * seconds_a_byte)
