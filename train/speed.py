"""How fast the machine could go: the peak that model flops utilization is measured against."""

import jax

from ..plan.machines.detect import match_accelerator


def peak_flops_per_s(mesh: jax.sharding.Mesh) -> float | None:
    """Return the dense bfloat16 peak of all devices of a mesh together, in flop/s, from their data sheet.

    None for devices that the planner does not know, fake ones among them: what a busy CPU is measured to do at one
    moment is no peak.
    """
    devices = mesh.devices.ravel()
    known = match_accelerator(devices[0].device_kind)
    return known.peak_flops_per_s("bfloat16") * len(devices) if known else None


def utilization(tokens_per_s: float, *, flops_per_token: float, peak: float | None) -> float | None:
    """Return model flops utilization; None where no peak is known, or more than all of it would be used."""
    mfu = None if peak is None else tokens_per_s * flops_per_token / peak
    return None if mfu is None or mfu > 1 else mfu
