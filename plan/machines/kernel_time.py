"""Compute the time of one device's kernels: matrix products, memory traffic and fused attention.

The three models are the same for every accelerator; only peaks, cores and the share of the peak differ
(`topologies.toml`).
- A product [m, k] x [k, n] is divided into tiles, which run on the cores in waves. The last wave may be partly idle
  (wave quantization), smaller tiles reuse less data, and short inner dimensions k do not fill the arithmetic pipeline.
  Fitted on 183 products on A100-PCIe (mean error 4.0%); 11.3% on 514 on B200 (simumax_b200_a100.toml, gemm_efficiency).
- Memory traffic reaches `MEMORY_SHARE` of the data sheet's bandwidth, fitted on Korthikanti et al. 2022, Table 4 (five
  rows). gpt-fast's decoding of a 7B model on one A100 agrees (0.69 with its gaps between kernels).
- Fused attention reaches a fixed share of the peak, by kernel and direction, less half of what products lose under
  load: half of its time is outside of the matrix units.
Read `../costs/layer_time.py` next.
"""

import math
from typing import Literal

from .topology import Accelerator

MEMORY_SHARE = 0.74
"""Share of the data sheet's memory bandwidth that kernels reach."""

FlashKernel = Literal["vendor", "flash2", "portable"]
"""Implementation of fused attention: the vendor's library, FlashAttention 2, or its first version and Triton's."""

# Rows and columns of a tile, and its speed relative to the largest: smaller tiles load more data per product.
_TILES = ((128, 256, 1.0), (128, 128, 0.85), (64, 128, 0.65), (64, 64, 0.5))
# Inner dimension whose time a tile spends on filling the arithmetic pipeline, and the least that is worth splitting.
_SHORT_INNER = 150
_LONG_INNER = 512
# Share of the traffic of sums at the end of a product that its arithmetic does not hide: products with float32 sums are
# 6.4% slower than others on B200, 4.1% on A100 (118 and 47 in simumax_b200_a100.toml, gemm_efficiency).
_EXPOSED_SUM = 1 / 3
_ITEM_BYTES = {"float32": 4.0, "float8": 1.0, "float4": 0.5}
_ALIGNED = 8
_MISALIGNED_SHARE = 0.1
# Shares of the peak, forward and backward.
_FLASH_SHARES = {"vendor": (0.6, 0.5), "flash2": (0.7, 0.6), "portable": (0.4, 0.33)}
# All but the vendor's do not use the asynchronous matrix units of Hopper and later: FlashAttention 2 reaches 35% of the
# peak there (Shah et al. 2024, section 1), where it is 70% on A100 (Dao 2023, section 4.1).
_SYNCHRONOUS_SHARE = 0.5
_ASYNCHRONOUS = ("h100", "h20", "gh200", "b200", "b300", "gb200", "gb300")


def matmul_time_s(
    accelerator: Accelerator, *, m: float, n: float, k: float, batch: float = 1, dtype: str, more_bytes: float = 0.0
) -> float:
    """Return the seconds of `batch` products [m, k] x [k, n]: the longer of arithmetic and memory traffic.

    Args:
        dtype: element type of the factors; the result of a product in 8 or 4 bits is in 16.
        more_bytes: memory traffic of what the kernel does besides, such as adding its result to a sum.
    """
    if min(m, n, k, batch) <= 0:
        return 0.0
    # Filling the pipeline takes the same time in every type, in which a faster one does more of the inner dimension.
    fill = _SHORT_INNER * accelerator.peak_flops_per_s(dtype) / accelerator.peak_flops_per_s("bfloat16")
    sizes = {"m": m, "n": n, "k": k, "batch": batch}
    flops = min(_wave_flops(accelerator.cores, **sizes, tile=tile, fill=max(fill, _SHORT_INNER)) for tile in _TILES)
    item = _ITEM_BYTES.get(dtype, 2)
    traffic = batch * (item * (m * k + k * n) + max(item, 2) * m * n)
    peak = accelerator.matmul_flops_per_s(dtype)
    if batch > 1 and (k % _ALIGNED or n % _ALIGNED):
        # Heads whose rows are not aligned to 16 bytes leave matrix units idle (BLOOM chronicles, 02-20 to 02-26).
        flops, peak = 2 * batch * m * n * k, accelerator.peak_flops_per_s(dtype) * _MISALIGNED_SHARE
    # Tiles that end together wait for each other's sums.
    exposed = _EXPOSED_SUM * memory_time_s(accelerator, num_bytes=more_bytes)
    return max(flops / peak, memory_time_s(accelerator, num_bytes=traffic + more_bytes)) + exposed


def memory_time_s(accelerator: Accelerator, *, num_bytes: float) -> float:
    """Return the seconds of a kernel that reads and writes this many bytes in all."""
    return num_bytes / (MEMORY_SHARE * accelerator.memory_bytes_per_s)


def flash_time_s(
    accelerator: Accelerator,
    *,
    flops: float,
    direction: Literal["forward", "backward"],
    kernel: FlashKernel,
    dtype: str,
) -> float:
    """Return the seconds of fused attention.

    Args:
        flops: flops of its matrix products, in the backward with recomputation.
        kernel: all but the vendor's reach half of their share on Hopper and later; the vendor's library and
            FlashAttention 3 reach two thirds of the peak there (Shah et al. 2024, section 4).
    """
    share = _FLASH_SHARES[kernel][direction == "backward"]
    if kernel != "vendor" and accelerator.key.startswith(_ASYNCHRONOUS):
        share *= _SYNCHRONOUS_SHARE
    return flops / (accelerator.peak_flops_per_s(dtype) * share * math.sqrt(accelerator.load))


def _wave_flops(
    cores: int, *, m: float, n: float, k: float, batch: float, tile: tuple[int, int, float], fill: float
) -> float:
    """Return the flops that all cores could do in the time of the waves of one tile size.

    With fewer tiles than cores the inner dimension is split too (split-K), as libraries do for products with few rows.
    For example 4,096 x 4,096 in tiles of 128 x 256 are 512 tiles: 4.7 waves on 108 cores, which take the time of 5.
    """
    rows, columns, reuse = tile
    num_tiles = batch * min(
        math.ceil(m / rows) * math.ceil(n / columns),
        math.ceil(m / columns) * math.ceil(n / rows),
    )
    splits = max(1, min(int(cores // num_tiles), int(k // _LONG_INNER))) if num_tiles < cores else 1
    waves = math.ceil(num_tiles * splits / cores)
    return 2 * waves * cores * rows * columns / reuse * (k / splits + fill)
