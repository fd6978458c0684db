"""How long one device takes for a matrix product, for traffic to its memory, and for fused attention.

Three curves, the same for every accelerator; only peaks, cores and the share of the peak differ (`topologies.toml`).
- A product is cut into tiles, which are dealt to the cores in waves: the last wave may be partly idle (wave
  quantisation), smaller tiles reuse less, and short inner dimensions spend their time on filling the pipeline.
  Fitted on 183 products on A100-PCIe (mean error 4.0%); 11.3% on 514 on B200 (simumax_b200_a100.toml, gemm_efficiency).
- Traffic keeps `MEMORY_SHARE` of the data sheet's bandwidth, fitted on Korthikanti et al. 2022, Table 4 (five rows);
  gpt-fast's decoding of a 7B model on one A100 (0.69 with its gaps between kernels) agrees.
Read `../costs/layer_time.py` next.
"""

import math
from typing import Literal

from .topology import Accelerator

MEMORY_SHARE = 0.74
"""Share of the data sheet's memory bandwidth that kernels reach."""

FlashKernel = Literal["vendor", "portable"]
"""Whose fused attention runs."""

_TILES = ((128, 256, 1.0), (128, 128, 0.85), (64, 128, 0.65), (64, 64, 0.5))
_SHORT_INNER = 150
_LONG_INNER = 512
_ALIGNED = 8
_MISALIGNED_SHARE = 0.1
_FLASH_SHARES = {"vendor": (0.6, 0.5), "portable": (0.4, 0.33)}
# A portable kernel leaves the asynchronous matrix units of Hopper and later alone.
_SYNCHRONOUS_SHARE = 0.65
_ASYNCHRONOUS = ("h100", "h100-pcie", "h200", "b200", "gb200")


def matmul_time_s(accelerator: Accelerator, *, m: float, n: float, k: float, batch: float = 1, dtype: str) -> float:
    """Return the seconds of `batch` products [m, k] x [k, n]; as long as their traffic takes where that is longer."""
    if min(m, n, k, batch) <= 0:
        return 0.0
    flops = min(_wave_flops(accelerator.cores, m=m, n=n, k=k, batch=batch, tile=tile) for tile in _TILES)
    item = 4 if dtype == "float32" else 2
    traffic = item * batch * (m * k + k * n + m * n)
    peak = accelerator.peak_flops_per_s(dtype) * accelerator.matmul_share
    if batch > 1 and (k % _ALIGNED or n % _ALIGNED):
        # Rows of heads that do not start at 16 bytes keep the matrix units idle (BLOOM chronicles, 02-20 to 02-26).
        flops, peak = 2 * batch * m * n * k, accelerator.peak_flops_per_s(dtype) * _MISALIGNED_SHARE
    return max(flops / peak, memory_time_s(accelerator, num_bytes=traffic))


def memory_time_s(accelerator: Accelerator, *, num_bytes: float) -> float:
    """Return the seconds that a kernel takes for this traffic, reads and writes counted alike."""
    return num_bytes / (MEMORY_SHARE * accelerator.memory_bytes_per_s)


def flash_time_s(
    accelerator: Accelerator,
    *,
    flops: float,
    direction: Literal["forward", "backward"],
    kernel: FlashKernel,
    dtype: str,
) -> float:
    """Return the seconds of fused attention: `flops` of its matrix products, those of the backward with recomputation.

    Args:
        kernel: the vendor's library, or a portable one (Triton, FlashAttention 2), which reaches a third of the peak
            on Hopper where the vendor's and FlashAttention 3 reach two thirds (Shah et al. 2024, section 4).
    """
    share = _FLASH_SHARES[kernel][direction == "backward"]
    if kernel == "portable" and accelerator.key in _ASYNCHRONOUS:
        share *= _SYNCHRONOUS_SHARE
    return flops / (accelerator.peak_flops_per_s(dtype) * share)


def _wave_flops(cores: int, *, m: float, n: float, k: float, batch: float, tile: tuple[int, int, float]) -> float:
    """Flops that the cores could have done while the waves of one tile size ran.

    Where tiles are fewer than cores the inner dimension is split too, as libraries do for products with few rows.
    """
    rows, columns, reuse = tile
    num_tiles = batch * min(
        math.ceil(m / rows) * math.ceil(n / columns),
        math.ceil(m / columns) * math.ceil(n / rows),
    )
    splits = max(1, min(int(cores // num_tiles), int(k // _LONG_INNER))) if num_tiles < cores else 1
    waves = math.ceil(num_tiles * splits / cores)
    return 2 * waves * cores * rows * columns / reuse * (k / splits + _SHORT_INNER)
