"""Fake devices: many CPU devices on one machine, on which every mesh can be tried and proved."""

import os

import jax

from .errors import MeshError


def use_fake_devices(num_devices: int) -> None:
    """Make this process see `num_devices` CPU devices; the first line of a script, before any array is made.

    >>> use_fake_devices(8)
    >>> len(jax.devices())
    8

    Raises:
        MeshError: the number is not positive, or jax has already started with other devices.
    """
    if num_devices < 1:
        raise MeshError(f"fake devices: {num_devices} is not a number of devices.", fix="ask for 1 or more, 8 say.")
    # XLA sizes its one CPU thread pool by this. A device that waits for its neighbours holds a thread of the pool: with
    # one thread a core, those that still compute would be left without help.
    os.environ.setdefault("NPROC", str(num_devices + (os.cpu_count() or 1)))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:
        # Once a backend runs the count is fixed: asking again for the same is no mistake.
        pass
    visible = jax.devices()
    if len(visible) != num_devices or visible[0].platform != "cpu":
        raise MeshError(
            f"fake devices: asked for {num_devices}, but jax has already started with {len(visible)} "
            f"{visible[0].platform} devices.",
            fix="call use_fake_devices() before anything makes an array.",
        )
