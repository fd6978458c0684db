"""Peak rates of one device: memory, flops and bandwidths, from XLA's description of a GPU or measured on this machine.

A description is XLA's `GpuTargetConfigProto` as text (xla/stream_executor/device_description.proto). It has the memory,
its bandwidth, cores, clocks, and the multiply-adds per clock of vector and matrix units by element type. It lacks the
speed of links between devices, which comes from the vendors' data sheets below. Read `roofline.py` next.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..meshes.errors import TargetError

LINK_BYTES_PER_S = {6: 20e9, 7: 25e9, 8: 25e9, 9: 25e9, 10: 50e9}
"""Bandwidth of one NVLink in one direction by CUDA major version; data sheets of P100, V100, A100, H100/H200, B200."""

XLA_BASE_SHARE = 0.80
"""Share of the memory of an absent GPU that XLA takes as available (xla/service/gpu/gpu_hlo_schedule.cc).

For a GPU that is present, jax passes what its allocator may take, `bytes_limit` of `memory_stats()` (jaxlib,
py_client.cc). The 80% are for compilers that know no allocator."""

XLA_SLOP = 0.95
"""Share of the available memory, without that of arguments and results, for which XLA plans temporary values.

`--xla_gpu_memory_limit_slop_factor=N` in XLA_FLAGS replaces the 95%. Beyond the limit XLA rematerialises by itself and
serialises collectives: an H100 step of a 70B model loses all overlap.
"""

XLA_MEMORY_SHARE = XLA_BASE_SHARE * XLA_SLOP
"""Share of an absent GPU's memory for which XLA plans a program without arguments: the least that it plans for."""

NETWORK_BYTES_PER_S = {8: 25e9, 9: 50e9, 10: 50e9}
"""Network bandwidth of one GPU in one direction: DGX A100 has 200 Gb/s per GPU, DGX H100 and B200 400 Gb/s."""

# Numbers of XLA's PrimitiveType (xla/xla_data.proto).
_TYPES = {10: "f16", 11: "f32", 12: "f64", 16: "bf16", 2: "s8", 19: "f8e5m2", 20: "f8e4m3fn"}
_RATE = re.compile(r"key: (\d+)\s+value \{\s+clock_rate_ghz: ([\d.]+)\s+units_per_core: (\d+)\s+ops_per_clock: (\d+)")
_PROBE_ELEMENTS = 1 << 23
_PROBE_SIZE = 768
_HOST_MATRIX_DTYPE = "float32"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Peak rates of one device; flops are by element type, named as in HLO. 0 means unknown.

    A device sends at `link_bytes_per_s` within its node and at `network_bytes_per_s` to other nodes.
    `compiler_base_bytes` is the memory that XLA takes as available; None if XLA has no limit.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    matrix_flops_per_s: Mapping[str, float]
    vector_flops_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    compiler_base_bytes: int | None = None

    def matrix_peak(self, dtype: str) -> float:
        """Return the matrix peak of an element type, or that of float32 if the type is not listed."""
        peaks = self.matrix_flops_per_s
        return peaks.get(dtype) or peaks.get("f32") or self.vector_flops_per_s


def hardware_from_description(text: str) -> Hardware:
    """Return the peaks of a GPU from XLA's description, with link speeds from data sheets.

    float32 products run on the matrix units as TF32, jax's default precision on GPUs.

    Raises:
        TargetError: the text has no name of a device, so it describes none.
    """
    name = re.search(r'device_description_str: "([^"]*)"', text)
    if name is None:
        raise TargetError(
            "the text has no `device_description_str`, which XLA's description of a GPU has.",
            fix="take one from list_gpus().",
        )
    cores = int(_field(text, "core_count"))
    # The tables of scalar and matrix units have the same field names; that of the matrix units comes second.
    scalar, _, matrix = text.partition("matrix_unit_description")
    vector = _rates(scalar.partition("scalar_unit_description")[2], cores).get("f32", 0.0)
    clock_hz = 1e9 * _field(text, "clock_rate_ghz")
    memory_bytes = int(_field(text, "device_memory_size"))
    major = int(_field(text.partition("cuda_compute_capability")[2], "major"))
    return Hardware(
        name=name[1],
        memory_bytes=memory_bytes,
        memory_bytes_per_s=_field(text, "memory_bandwidth"),
        matrix_flops_per_s=_rates(matrix, cores),
        # Without a table of scalar units: one multiply-add per unit and clock.
        vector_flops_per_s=vector or 2 * cores * _field(text, "fpus_per_core") * clock_hz,
        link_bytes_per_s=_link_bytes_per_s(text, major),
        network_bytes_per_s=NETWORK_BYTES_PER_S.get(major, 0.0),
        compiler_base_bytes=int(XLA_BASE_SHARE * memory_bytes),
    )


def measure_host(*, num_devices: int, memory_bytes: int) -> Hardware:
    """Measure in about 0.1 s the peaks of one of `num_devices` fake devices on this machine when all of them work.

    Matrix flops come from a float32 product, vector flops from a sum in cache, and bandwidth from a copy; messages
    between fake devices are copies too. Memory and peaks are divided evenly.
    """
    matrix = np.ones((_PROBE_SIZE, _PROBE_SIZE), _HOST_MATRIX_DTYPE)
    # 32 MiB, which no cache holds, and 64 KiB, which every cache holds.
    large, small = np.ones(_PROBE_ELEMENTS, np.float32), np.ones(1 << 14, np.float32)
    target, sums = np.empty_like(large), np.empty_like(small)
    matrix_flops = 2 * _PROBE_SIZE**3 / _time_s(lambda: matrix @ matrix)
    vector_flops = 100 * small.size / _time_s(lambda: [np.add(small, small, out=sums) for _ in range(100)])
    # A copy reads and writes every byte, so memory moves twice its size. A message is one copy: half of this rate.
    copied = 2 * large.nbytes / _time_s(lambda: np.copyto(target, large))
    share = 1 / num_devices
    return Hardware(
        name="cpu",
        memory_bytes=memory_bytes // num_devices,
        memory_bytes_per_s=copied * share,
        matrix_flops_per_s={"f32": matrix_flops * share},
        vector_flops_per_s=vector_flops * share,
        link_bytes_per_s=copied * share / 2,
        network_bytes_per_s=copied * share / 2,
    )


def _link_bytes_per_s(text: str, major: int) -> float:
    """Return the bandwidth of all NVLinks, or of PCI Express without NVLink; 0 if the description has neither."""
    # The A100's description has no links; its data sheet lists 12, for the SXM4 module only.
    num_links = _field(text, "active_links") or (12 if "SXM4" in text else 0)
    return num_links * LINK_BYTES_PER_S.get(major, 0.0) or _field(text, "pcie_bandwidth")


def _rates(text: str, cores: int) -> dict[str, float]:
    """Return flops per second by element type; a multiply-add is two flops."""
    return {
        _TYPES[int(key)]: 2e9 * cores * float(clock) * int(units) * int(ops)
        for key, clock, units, ops in _RATE.findall(text)
        if int(key) in _TYPES
    }


def _field(text: str, name: str) -> float:
    """Return the first number of a field, 0 if there is none."""
    found = re.search(rf"\b{name}: ([\d.]+)", text)
    return float(found[1]) if found else 0.0


def _time_s(run: Callable[[], object]) -> float:
    """Return the least seconds of three runs, after one to warm up."""
    times_s = []
    for _ in range(4):
        start_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s[1:])
