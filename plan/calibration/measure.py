"""Measure the devices at hand: large products, copies in memory, copies from the host, and all-reduces.

Every figure is the median of up to nine calls. Devices of one host run at once where they do so in training: fake CPU
devices share the host's cores and memory, so each measures its share. Read `topology_file.py` for what comes of it.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ..machines.detect import match_accelerator
from .timing import Timed, time_call

_MIB = 1 << 20
_BUDGET_S = 4.0

_TURNS = 8
"""Copies in one call: of one GiB, a third of the call is waiting for the host on an H100."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows of the right side of products and how many times as many the left one has; bytes that a device copies, sums.

    A call with little work is half waiting for the host on a GPU, as that of a product of 2,048 x 2,048 on an H100.
    """

    products: tuple[int, ...]
    taller: int
    copied: int
    summed: tuple[int, int]


_OF_CPU = Sizes(products=(256, 512, 1024), taller=1, copied=64 * _MIB, summed=(_MIB // 4, 8 * _MIB))
_OF_GPU = Sizes(products=(2048, 4096, 8192), taller=8, copied=1024 * _MIB, summed=(_MIB, 256 * _MIB))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured: work in flops or bytes over the median time, per device, with the spread of its calls.

    `name` is such as "product bfloat16 4096", `unit` flops/s or bytes/s. An all-reduce counts the bytes of its array.
    """

    name: str
    rate: float
    unit: str
    num_bytes: float
    timed: Timed


def measure_devices(devices: Sequence[jax.Device], *, say: Callable[[str], None]) -> list[Measured]:
    """Return the rates of products, copies and sums, all devices at work at once; takes half a minute.

    Args:
        say: is told what is being measured.
    """
    sizes = _OF_CPU if devices[0].platform == "cpu" else _OF_GPU
    mesh = Mesh(np.array(devices), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    found: list[Measured] = []
    jobs: list[Callable[[], Measured]] = [
        functools.partial(_product, mesh, size, dtype, sizes.taller)
        for dtype in _product_dtypes(devices)
        for size in sizes.products
    ]
    jobs += [functools.partial(_copy, mesh, sizes.copied), functools.partial(_from_host, mesh, sizes.copied)]
    if len(devices) > 1:
        jobs += [functools.partial(_all_reduce, mesh, size) for size in sizes.summed]
    for number, job in enumerate(jobs, 1):
        began = time.perf_counter()
        one = job()
        found.append(one)
        say(f"{number}/{len(jobs)} {one.name}: {one.rate:.3g} {one.unit}, {time.perf_counter() - began:.1f} s")
    return found


def rate_of(found: Sequence[Measured], name: str) -> float:
    """Return the best rate of what has a name that begins so."""
    return max(one.rate for one in found if one.name.startswith(name))


def _product_dtypes(devices: Sequence[jax.Device]) -> tuple[str, ...]:
    """Return the number formats of products: 8 bits too where the accelerator is known to have units for them."""
    known = None if devices[0].platform == "cpu" else match_accelerator(devices[0].device_kind)
    return ("bfloat16", "float32", *(("float8",) if known and known.flops_per_s.get("float8") else ()))


def _product(mesh: Mesh, size: int, dtype: str, taller: int) -> Measured:
    """Multiply two matrices on every device at once; those in 8 bits with sums in float32, kept in bfloat16."""
    num, of = mesh.size, "float8_e4m3fn" if dtype == "float8" else dtype
    x, y = _draw(mesh, (num, taller * size, size), of, seed=0), _draw(mesh, (num, size, size), of, seed=1)
    sums, kept = ("float32", "bfloat16") if dtype == "float8" else (dtype, dtype)

    # As in a training step, by cuBLASLt: XLA tries its own kernels for products in 8 bits for half a minute each.
    options = {} if mesh.devices.flat[0].platform == "cpu" else {"xla_gpu_enable_triton_gemm": False}

    @functools.partial(jax.jit, out_shardings=_split(mesh), compiler_options=options)
    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum("dij,djk->dik", a, b, preferred_element_type=sums).astype(kept)

    timed = time_call(lambda: multiply(x, y), budget_s=_BUDGET_S)
    flops = 2.0 * taller * size**3
    return Measured(name=f"product {dtype} {size}", rate=flops / timed.time_s, unit="flops/s", num_bytes=0, timed=timed)


def _draw(mesh: Mesh, shape: tuple[int, ...], dtype: str, *, seed: int) -> jax.Array:
    """Return random numbers [devices, ...]: of equal ones fewer transistors switch, and a GPU is an eighth faster."""
    make = jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape).astype(dtype), out_shardings=_split(mesh))
    return make()


def _copy(mesh: Mesh, num_bytes: int) -> Measured:
    """Read and write an array in the memory of every device at once, some times in one call."""
    x = jax.jit(lambda: jnp.ones((mesh.size, num_bytes // 4), jnp.float32), out_shardings=_split(mesh))()
    # A sum with the number of the turn, so that the turns cannot be merged.
    turn = lambda number, a: a + number.astype(a.dtype)  # noqa: E731
    add = jax.jit(lambda a: jax.lax.fori_loop(0, _TURNS, turn, a), out_shardings=_split(mesh), donate_argnums=0)
    held = [x]

    def run() -> jax.Array:
        held[0] = add(held[0])
        return held[0]

    timed = time_call(run, budget_s=_BUDGET_S)
    rate = 2 * _TURNS * num_bytes / timed.time_s
    return Measured(name="copy in memory", rate=rate, unit="bytes/s", num_bytes=num_bytes, timed=timed)


def _from_host(mesh: Mesh, num_bytes: int) -> Measured:
    """Copy an array to one device from the host's memory, pinned where it is a GPU's, as an offloaded state is."""
    device = mesh.devices.flat[0]
    x: Any = np.ones(num_bytes // 4, np.float32)
    if device.platform != "cpu":
        x = jax.device_put(x, SingleDeviceSharding(device, memory_kind="pinned_host"))
    timed = time_call(lambda: jax.device_put(x, SingleDeviceSharding(device), may_alias=False), budget_s=_BUDGET_S)
    return Measured(
        name="copy from the host", rate=num_bytes / timed.time_s, unit="bytes/s", num_bytes=num_bytes, timed=timed
    )


def _all_reduce(mesh: Mesh, num_bytes: int) -> Measured:
    """Sum an array of every device over all devices."""
    x = jax.jit(lambda: jnp.ones((mesh.size, num_bytes // 4), jnp.float32), out_shardings=_split(mesh))()
    specs: dict[str, Any] = {"in_specs": PartitionSpec("device"), "out_specs": PartitionSpec()}
    total = jax.jit(jax.shard_map(lambda a: jax.lax.psum(a, "device"), mesh=mesh, **specs))
    timed = time_call(lambda: total(x), budget_s=_BUDGET_S)
    return Measured(
        name=f"all-reduce {num_bytes}", rate=num_bytes / timed.time_s, unit="bytes/s", num_bytes=num_bytes, timed=timed
    )


def _split(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("device"))
