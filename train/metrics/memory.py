"""Measure the peak memory of a run's devices."""

import resource
import sys

import jax


def peak_memory_bytes() -> int:
    """Return the largest peak of this process's devices, or the process's own peak where devices report none (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(peaks):
        return max(peaks)
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
