"""Fake devices: many CPU devices on one machine, on which every mesh can be tried and proved."""

import os

import jax

from .build import visible_devices
from .errors import MeshError, shown
from .processes.join import num_processes
from .spec import MOST_FAKE_DEVICES


def use_fake_devices(num_devices: int) -> None:
    """Make this program see `num_devices` CPU devices; the first line of a script, before any array is made.

    Of many processes that have joined each makes its equal part.

    >>> use_fake_devices(8)
    >>> len(jax.devices())
    8

    Raises:
        MeshError: the number is not positive, too large or does not divide by the processes, or jax has already
            started with other devices.
    """
    count = num_processes()
    _check_number(num_devices, count=count)
    local = num_devices // count
    # XLA sizes its one CPU thread pool by this. A device that waits for its neighbours holds a thread of the pool: the
    # last one that still computes has a thread for every core. More threads would only take turns on the cores. Sums
    # between processes wait in threads too: with fewer than this, two processes were seen to hang.
    waiting = local - 1 if count == 1 else 2 * local
    os.environ.setdefault("NPROC", str(waiting + (os.cpu_count() or 1)))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", local)
    except RuntimeError:
        # Once a backend runs the count is fixed: asking again for the same is no mistake.
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
        raise MeshError(f"fake devices: {num_devices!r} is not a number of devices.", fix="ask for 1 or more, 8 say.")
    if num_devices > MOST_FAKE_DEVICES:
        raise MeshError(
            f"fake devices: {shown(num_devices)} are too many, each of which is threads and memory of this machine; "
            f"{MOST_FAKE_DEVICES} are the most.",
            fix="ask for 8 say; `trellax plan` and `trellax inspect` need no devices.",
        )
    if num_devices % count:
        raise MeshError(
            f"fake devices: {num_devices} do not divide by {count} processes.",
            fix=f"ask for {-(-num_devices // count) * count}, or start another number of processes.",
        )
