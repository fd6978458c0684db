"""Muon's update is priced: a device's share of the products, and what makes matrices whole on one device."""

from dataclasses import replace
from typing import Any

import pytest
from trellax.layers import ModelConfig
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.runtime import TRELLAX
from trellax.plan.costs.step_time import step_time
from trellax.plan.machines.collective_time import CollectiveKind, collective_time_s, make_group
from trellax.plan.machines.topology import read_topology

MODEL = ModelConfig(
    vocab_size=1024, num_layers=4, hidden_size=1024, num_heads=8, num_kv_heads=2, ffn_size=4096, mlp="swiglu"
)
MUON = replace(TRELLAX, kernel_saving_bytes=4)


def by_hand(rows: int, columns: int) -> int:
    # Five times: x x^T, its square, and the sum of both times x.
    return 5 * 2 * (2 * rows * rows * columns + rows * rows * rows)


@pytest.mark.parametrize(
    ("data", "tensor", "pipe", "zero"), [(1, 1, 1, 0), (2, 1, 1, 0), (2, 2, 1, 0), (2, 2, 2, 0), (2, 2, 1, 1)]
)
def test_update_takes_products_and_exchanges_of_a_device_longer(data: int, tensor: int, pipe: int, zero: Any) -> None:
    topology = read_topology(f"h200x{data * tensor * pipe}")
    layout = Layout(data=data, tensor=tensor, pipe=pipe, zero=zero, microbatches=4, schedule="1f1b", remat="dots")
    given = {"layout": layout, "topology": topology, "num_tokens": 1024}
    plain, muon = (step_time(MODEL, **given, runtime=runtime) for runtime in (TRELLAX, MUON))
    # Queries and the output, keys and values, and three of the feed-forward, each of four layers.
    flops = 4 * (2 * by_hand(1024, 1024) + 2 * by_hand(256, 1024) + 3 * by_hand(1024, 4096))
    rate = topology.accelerator.matmul_flops_per_s("float32") * data * tensor * pipe
    kernels = 4 * 4 * (2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 1024 * 4096) / tensor / pipe

    def exchange(kind: CollectiveKind, num_bytes: float, size: int, stride: int) -> float:
        group = make_group(topology, size=size, stride=stride)
        return collective_time_s(kind, num_bytes=num_bytes, group=group, topology=topology)

    # All-to-alls there and back over tensor, and over data where it splits moments; else updates are gathered.
    sent = 2 * exchange("all_to_all", kernels / data, tensor, 1)
    sent += 2 * exchange("all_to_all", kernels / data, data, tensor) if zero else 0
    sent += exchange("all_gather", kernels, data, tensor) if not zero else 0
    assert muon.optimizer_s - plain.optimizer_s == pytest.approx(flops / rate + sent)
