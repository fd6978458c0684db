"""How fast the machine could go: the peak that model flops utilization is measured against."""

import time

import jax
import jax.numpy as jnp

from ..plan.detect import match_accelerator

_PROBE_SIZE = 1024


def peak_flops_per_s(mesh: jax.sharding.Mesh) -> float:
    """Return the matmul peak of all devices of a mesh together, in flop/s.

    Accelerators that the planner knows have their data sheet's dense bfloat16 peak. Fake devices share one CPU, so
    their peak together is what the CPU is measured to do: the best of a few float32 matmuls.
    """
    devices = mesh.devices.ravel()
    if known := match_accelerator(devices[0].device_kind):
        return known.peak_flops_per_s("bfloat16") * len(devices)
    measured = _measure_matmul(mesh.local_devices[0])
    return measured if devices[0].platform == "cpu" else measured * len(devices)


def _measure_matmul(device: jax.Device) -> float:
    matrix = jax.device_put(jnp.ones((_PROBE_SIZE, _PROBE_SIZE), jnp.float32), device)
    multiply = jax.jit(lambda a: a @ a)
    multiply(matrix).block_until_ready()
    times_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        multiply(matrix).block_until_ready()
        times_s.append(time.perf_counter() - start_s)
    return 2 * _PROBE_SIZE**3 / min(times_s)
