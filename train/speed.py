"""How fast the machine could go: the peak that model flops utilization is measured against."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 matmul peaks in flop/s, from the vendors' data sheets (A100 312, H100 and H200 SXM 989.4 TFLOP/s).
_BFLOAT16_PEAKS = {"A100": 312e12, "H100": 989.4e12, "H200": 989.4e12}

_PROBE_SIZE = 1024


def peak_flops_per_s(mesh: jax.sharding.Mesh) -> float:
    """Return the matmul peak of all devices of a mesh together, in flop/s.

    Known GPUs have their data sheet's dense bfloat16 peak. Fake devices share one CPU, so their peak together is what
    the CPU is measured to do: the best of a few float32 matmuls.
    """
    devices = mesh.devices.ravel()
    kind = devices[0].device_kind
    for name, peak in _BFLOAT16_PEAKS.items():
        if name in kind:
            return peak * len(devices)
    measured = _measure_matmul(devices[0])
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
