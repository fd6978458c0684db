"""Turn what was measured into the figures of a topology, and write them as a TOML file that `trellax plan` takes.

The planner multiplies a data sheet's bandwidths by the shares that kernels reach; a measured rate is divided by that
share, so that what was measured is what is predicted. Figures that cannot be measured here, such as the network of
other nodes, are those of the known accelerator, or the links' own where there is none; the file says which.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from ..machines.collective_time import LINK_SHARE, LINK_START_S
from ..machines.detect import match_accelerator
from ..machines.kernel_time import MEMORY_SHARE
from .measure import Measured, rate_of

_TERA, _GIGA = 1e12, 1e9


def figures_of(devices: Sequence[jax.Device], found: Sequence[Measured]) -> dict[str, Any]:
    """Return the keys of a topology file: measured rates, and what is known of the accelerator."""
    known = match_accelerator(devices[0].device_kind) if devices[0].platform != "cpu" else None
    names = dict.fromkeys(one.name.split()[1] for one in found if one.name.startswith("product"))
    peaks = {name: rate_of(found, f"product {name}") for name in names}
    link = _link_bytes_per_s(found, len(devices))
    memory = rate_of(found, "copy in memory") / MEMORY_SHARE
    accelerator = {
        "name": devices[0].device_kind if known else f"{devices[0].device_kind}, {_place(devices)}",
        # Peaks are what products reached, so all of them is kept.
        "tflops": {name: _round(rate / _TERA) for name, rate in peaks.items()},
        "matmul_share": 1.0,
        "memory_bytes": _memory_bytes(devices),
        "memory_gb_per_s": _round(memory / _GIGA),
        "cores": known.cores if known else 1,
        "link": known.link if known else "pcie",
        "link_gb_per_s": _round((link or memory / 2) / _GIGA),
        "devices_per_node": len(devices),
        "network_gb_per_s": _round((known.network_bytes_per_s if known else link or memory / 2) / _GIGA),
        "host_gb_per_s": _round(rate_of(found, "copy from the host") / _GIGA),
        "watts": known.watts if known else 0,
        "source": f"measured by trellax calibrate on {len(devices)} x {devices[0].device_kind}",
    }
    return {"accelerator": accelerator, "devices": len(devices)}


def format_topology(figures: dict[str, Any], found: Sequence[Measured], *, date: str) -> str:
    """Return the file: what was measured as comments, then the figures."""
    lines = [f"# Written by trellax calibrate, {date}. Medians; in brackets the range of the calls over the median."]
    lines += [
        f"# {one.name}: {one.rate:.4g} {one.unit} ({one.timed.calls} calls, {one.timed.spread:.0%})" for one in found
    ]
    accelerator = figures["accelerator"]
    lines += [
        "# network_gb_per_s and watts are not measured.",
        "",
        f"devices = {figures['devices']}",
        "",
        "[accelerator]",
    ]
    return "\n".join([*lines, *(f"{key} = {_toml(value)}" for key, value in accelerator.items())]) + "\n"


def _link_bytes_per_s(found: Sequence[Measured], num_devices: int) -> float:
    """Return the bandwidth with which the planner predicts the largest all-reduce as it was; 0 for one device."""
    sums = [one for one in found if one.name.startswith("all-reduce")]
    if not sums:
        return 0.0
    largest = max(sums, key=lambda one: one.num_bytes)
    wire = 2 * (num_devices - 1) / num_devices * largest.num_bytes
    start_s = 2 * LINK_START_S * math.log2(num_devices)
    return wire / max(largest.timed.time_s - start_s, largest.timed.time_s / 2) / LINK_SHARE


def _memory_bytes(devices: Sequence[jax.Device]) -> int:
    """Return the memory of a device; fake devices share that of the host."""
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    stats = devices[0].memory_stats() or {}
    known = match_accelerator(devices[0].device_kind)
    return known.memory_bytes if known else int(stats.get("bytes_limit", 0))


def _place(devices: Sequence[jax.Device]) -> str:
    return f"one of {len(devices)} fake devices that share a host" if len(devices) > 1 else "the host"


def _round(number: float) -> float:
    return float(f"{number:.4g}")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    return f'"{value}"' if isinstance(value, str) else f"{value}"
