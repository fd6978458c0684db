"""Compute the time that Muon adds to an update: products of whole kernels, and the exchanges that make kernels whole.

Read `../../train/update/muon.py` for what is priced, `update_time.py` for the use.
"""

from ...layers.lora.linears import Linear, linears_of
from ..machines.collective_time import collective_time_s, make_group
from ..machines.topology import Topology
from .device_params import block_matrices
from .held_layers import KindCounts
from .layout import Layout
from .runtime import Runtime

# Of Newton and Schulz (Jordan 2024).
_ITERATIONS = 5
_FLOAT32 = 4


def muon_s(layers: KindCounts, layout: Layout, runtime: Runtime, topology: Topology) -> float:
    """Return the seconds of Muon's update of a rank's layers beside AdamW's; 0 for another optimizer."""
    if not runtime.kernel_saving_bytes:
        return 0.0
    flops = sum(count * sum(map(_flops, linears_of(kind))) for kind, count in layers)
    # All devices of a pipeline rank divide the matrices.
    products = flops * layout.pipe / layout.num_devices / topology.accelerator.matmul_flops_per_s("float32")
    return products + _exchanges_s(layers, layout, topology)


def _flops(linear: Linear) -> float:
    """Return the flops for a kernel [D, F] with D <= F: each time x x^T, its square, and the sum of both times x."""
    rows, columns = sorted((linear.num_in, linear.num_out))
    return _ITERATIONS * linear.copies * 2.0 * (2 * rows * rows * columns + rows**3)


def _exchanges_s(layers: KindCounts, layout: Layout, topology: Topology) -> float:
    """Return the seconds of two all-to-alls over each axis that splits kernels, and one all-gather over data if none.

    Context counts as data.
    """
    split = {"tensor": layout.tensor, "expert": layout.expert}
    part = _FLOAT32 * sum(count * block_matrices(kind, **split) for kind, count in layers)
    group = make_group(topology, size=layout.replicas * layout.context, stride=layout.tensor)
    if layout.update_shards == 1:
        over_data = collective_time_s("all_gather", num_bytes=part, group=group, topology=topology)
        own = part / group.size
    else:
        own = part / layout.update_shards
        over_data = 2 * collective_time_s("all_to_all", num_bytes=own, group=group, topology=topology)
    tensor = make_group(topology, size=layout.tensor, stride=1)
    return over_data + 2 * collective_time_s("all_to_all", num_bytes=own, group=tensor, topology=topology)
