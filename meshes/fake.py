"""Fake devices: many CPU devices on one machine, to run any mesh without accelerators."""

import os

import jax

from .build import visible_devices
from .divisibility import check_divides, nearest_multiples
from .errors import MeshError, shown
from .processes.join import num_processes
from .spec import MOST_FAKE_DEVICES


def use_fake_devices(num_devices: int) -> None:
    """Make jax see `num_devices` CPU devices; call it first in a script, before any array is made.

    With several joined processes, each starts an equal part of them.

    >>> use_fake_devices(8)
    >>> len(jax.devices())
    8

    Raises:
        MeshError: the number is not positive, is too large or is not a multiple of the processes, or jax has already
            started with other devices.
    """
    count = num_processes()
    _check_number(num_devices, count=count)
    local = num_devices // count
    # XLA sizes its CPU thread pool by NPROC. A device that waits in a collective holds a thread of the pool, so the
    # last device that still computes needs a thread for every core beside the waiting ones. Collectives between
    # processes wait in threads too: with fewer threads than this, two processes were seen to hang.
    waiting = local - 1 if count == 1 else 2 * local
    os.environ.setdefault("NPROC", str(waiting + (os.cpu_count() or 1)))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", local)
    except RuntimeError:
        # Once a backend runs the count is fixed; asking again for the same count is fine, and checked below.
        pass
    visible = visible_devices()
    if len(visible) != num_devices or visible[0].platform != "cpu":
        raise MeshError(
            f"fake devices: asked for {num_devices}, but jax has already started with {len(visible)} "
            f"{visible[0].platform} devices.",
            fix="call use_fake_devices() before anything makes an array.",
        )


def _check_number(num_devices: int, *, count: int) -> None:
    if isinstance(num_devices, bool) or not isinstance(num_devices, int) or num_devices < 1:
        raise MeshError(
            f"fake devices: {num_devices!r} is not a number of devices.", fix="ask for 1 or more, for example 8."
        )
    if num_devices > MOST_FAKE_DEVICES:
        raise MeshError(
            f"fake devices: {shown(num_devices)} are too many, and each takes threads and memory of this machine; "
            f"{MOST_FAKE_DEVICES} are the most.",
            fix="ask for fewer, for example 8; `trellax plan` and `trellax inspect` need no devices.",
        )
    check_divides(
        "fake devices: num_devices",
        num_devices,
        over="processes",
        parts=count,
        error=MeshError,
        fix=f"ask for {nearest_multiples(num_devices, count)[1]}, or start another number of processes.",
    )
