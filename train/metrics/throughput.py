"""Compute tokens per second and model FLOPs utilization (MFU) from the time of a step.

MFU is the share of the devices' peak that the model's own products use, recomputation not counted (Chowdhery et al.
2022, PaLM, appendix B).
"""

from dataclasses import dataclass

from jax.sharding import Mesh

from ...configs.run_config import RunConfig
from ...layers import flops_per_token
from ...plan.machines.detect import match_accelerator


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """The work of one training step, against which its time is measured.

    `flops_per_token` are those of forward and backward; `peak_flops_per_s` is None where the devices' peak is unknown.
    """

    tokens_per_step: int
    flops_per_token: float
    peak_flops_per_s: float | None

    def tokens_per_s(self, step_time_s: float) -> float:
        """Return the tokens trained on per second, 0 for an infinite time."""
        return self.tokens_per_step / step_time_s

    def mfu(self, step_time_s: float) -> float | None:
        """Return the model FLOPs utilization, or None where no peak is known or the result would exceed 1."""
        if self.peak_flops_per_s is None:
            return None
        mfu = self.tokens_per_s(step_time_s) * self.flops_per_token / self.peak_flops_per_s
        return None if mfu > 1 else mfu


def step_throughput(config: RunConfig, mesh: Mesh) -> Throughput:
    """Return the work of one step of a run on a mesh."""
    num_tokens = config.data.seq_len
    return Throughput(
        tokens_per_step=config.train.batch_size * num_tokens,
        flops_per_token=flops_per_token(config.model, num_tokens=num_tokens, attention="causal").training,
        peak_flops_per_s=peak_flops_per_s(mesh),
    )


def peak_flops_per_s(mesh: Mesh) -> float | None:
    """Return the dense bfloat16 peak of all devices of a mesh together, from their data sheet.

    None for devices without an entry in the planner's table, CPUs among them: the speed measured on a busy CPU at one
    moment is not a peak.
    """
    devices = mesh.devices.ravel()
    known = match_accelerator(devices[0].device_kind)
    return known.peak_flops_per_s("bfloat16") * len(devices) if known else None
