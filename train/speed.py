"""How fast the machine could go: the peak that model flops utilization is measured against."""

import jax

from ..plan.detect import match_accelerator


def peak_flops_per_s(mesh: jax.sharding.Mesh) -> float | None:
    """Return the dense bfloat16 peak of all devices of a mesh together, in flop/s, from their data sheet.

    None for devices that the planner does not know, fake ones among them: what a busy CPU is measured to do at one
    moment is no peak.
    """
    devices = mesh.devices.ravel()
    known = match_accelerator(devices[0].device_kind)
    return known.peak_flops_per_s("bfloat16") * len(devices) if known else None
