"""Calibration: what was measured is what the planner predicts from the file, and the file is a topology."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from trellax.plan.calibration import measure
from trellax.plan.calibration.measure import Measured, Sizes, measure_devices
from trellax.plan.calibration.timing import Timed, time_call
from trellax.plan.calibration.topology_file import figures_of, format_topology
from trellax.plan.machines.collective_time import collective_time_s, make_group
from trellax.plan.machines.kernel_time import memory_time_s
from trellax.plan.machines.topology import read_topology

MIB = 1 << 20


def measured(name: str, rate: float, num_bytes: float = 0.0) -> Measured:
    timed = Timed(time_s=(num_bytes or 1e9) / rate, calls=9, spread=0.1)
    return Measured(name=name, rate=rate, unit="bytes/s", num_bytes=num_bytes, timed=timed)


FOUND = [
    measured("product bfloat16 512", 2e11),
    measured("product bfloat16 1024", 3e11),
    measured("product float32 1024", 1e11),
    measured("copy in memory", 8e9, 64 * MIB),
    measured("copy from the host", 5e9, 64 * MIB),
    measured("all-reduce 1048576", 1e9, MIB),
    measured("all-reduce 67108864", 2e9, 64 * MIB),
]


def test_planner_predicts_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(format_topology(figures_of(jax.devices(), FOUND), FOUND, date="2026-11-26"))
    topology = read_topology(str(file))
    device = topology.accelerator
    assert (topology.num_devices, topology.devices_per_node) == (8, 8)
    assert device.peak_flops_per_s("bfloat16") * device.matmul_share == 3e11
    assert device.peak_flops_per_s("float32") * device.matmul_share == 1e11
    assert memory_time_s(device, num_bytes=8e9) == pytest.approx(1.0, rel=1e-3)
    assert device.host_bytes_per_s == 5e9
    group = make_group(topology, size=8, stride=1)
    largest_s = collective_time_s("all_reduce", num_bytes=64 * MIB, group=group, topology=topology)
    assert largest_s == pytest.approx(64 * MIB / 2e9, rel=1e-3)
    assert "8 fake devices that share a host" in device.name
    assert "# all-reduce 67108864: 2e+09 bytes/s (9 calls, 10%)" in file.read_text()


def test_products_in_8_bits_are_measured_where_there_are_units_for_them(tmp_path: Path) -> None:
    h200, a100 = (SimpleNamespace(platform="gpu", device_kind=f"NVIDIA {name}") for name in ("H200", "A100-SXM4-80GB"))
    assert [measure._product_dtypes([one])[2:] for one in (h200, a100, jax.devices()[0])] == [("float8",), (), ()]
    mesh = Mesh(np.array(jax.devices()[:1]), ("device",))
    assert measure._product(mesh, 32, "float8", 2).rate > 0
    found = [*FOUND, measured("product float8 1024", 6e11)]
    file = tmp_path / "machine.toml"
    file.write_text(format_topology(figures_of(jax.devices(), found), found, date="2026-11-26"))
    assert read_topology(str(file)).accelerator.matmul_flops_per_s("float8") == 6e11


def test_one_device_sums_nothing_and_is_a_topology_too(tmp_path: Path) -> None:
    alone = [one for one in FOUND if not one.name.startswith("all-reduce")]
    file = tmp_path / "machine.toml"
    file.write_text(format_topology(figures_of(jax.devices()[:1], alone), alone, date="2026-11-26"))
    assert read_topology(str(file)).num_devices == 1


def test_devices_are_measured_at_once_and_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        measure, "_OF_CPU", Sizes(products=(32, 64), taller=2, copied=MIB, summed=(MIB // 16, MIB // 8))
    )
    monkeypatch.setattr(measure, "_BUDGET_S", 0.01)
    told: list[str] = []
    found = measure_devices(jax.devices(), say=told.append)
    assert len(found) == len(told) == 8
    assert {one.name.split()[0] for one in found} == {"product", "copy", "all-reduce"}
    assert all(one.rate > 0 and 3 <= one.timed.calls <= 9 for one in found)
    assert told[0].startswith("1/8 product bfloat16 32")


def test_median_and_range_are_of_the_calls() -> None:
    x = jax.numpy.ones(4)
    timed = time_call(lambda: x + 1, budget_s=0.0)
    assert timed.calls == 3
    assert timed.spread >= 0
