"""Compute the step time that a row states: in seconds, or by a rate of tokens, sequences or flops and its convention.

Flops of a model count the scores of attention whole or by half (those that the causal mask leaves). A source's notes
say which; where they do not, both readings are compared. Read `training_case.py` first.
"""

import re
from typing import Literal

from trellax.layers import ModelConfig, flops_per_token
from trellax.plan.machines.topology import Topology

from .rows import PublishedRow

_TOKENS_OF_DAYS = 300e9
_HALF = re.compile(r"\bcausal[- ]?\(?(?:half|halved)|counts? causal|half(?: of)? (?:the )?attention", re.IGNORECASE)
_FULL = re.compile(r"counts? full attention|not causal|attention[^.;]{0,20}not halved", re.IGNORECASE)
_CONVENTIONS: dict[str, Literal["full", "causal"]] = {"full": "full", "half": "causal"}


def batch_size(row: PublishedRow) -> int | None:
    """Return the sequences of a step: as stated, or by the layout; None if neither is."""
    inputs = row.inputs
    if "gbs" in inputs:
        return inputs["gbs"]
    if "mbs" not in inputs or "dp" not in inputs or inputs.get("pp", 1) > 1:
        return None
    # A run that states no accumulation and has no pipeline has one microbatch a step.
    return inputs["dp"] * inputs.get("fsdp", 1) * inputs["mbs"] * inputs.get("num_microbatches", 1)


def stated_step_times(row: PublishedRow, model: ModelConfig, topology: Topology) -> dict[str, float]:
    """Return the seconds of a step by the convention that they rest on, which is "" if there is none."""
    for table in (row.outputs, row.derived):
        if "step_time_s" in table:
            return {"": float(table["step_time_s"])}
    out, gpus, batch = row.outputs, topology.num_devices, batch_size(row)
    if batch is None:
        return {}
    tokens = batch * row.inputs["seq"]
    rates = {
        "samples_per_gpu_per_s": batch / gpus,
        "sequences_per_s": batch,
        "samples_per_s": batch,
        "tokens_per_s": tokens,
        "tokens_per_s_per_gpu": tokens / gpus,
    }
    for name, work in rates.items():
        if name in out:
            return {"": work / out[name]}
    if "days_for_300b_tokens" in out:
        return {"": out["days_for_300b_tokens"] * 86400 * tokens / _TOKENS_OF_DAYS}
    flops_per_s = _flops_per_s(row, topology)
    if flops_per_s is None:
        return {}
    found = {}
    for name in _conventions(row):
        flops = tokens * flops_per_token(model, num_tokens=row.inputs["seq"], attention=_CONVENTIONS[name]).training
        found[name] = flops / (gpus * flops_per_s)
    # A convention that is stated needs no name.
    return {"": next(iter(found.values()))} if len(found) == 1 else found


def _flops_per_s(row: PublishedRow, topology: Topology) -> float | None:
    """Return the flops/s of one device: as stated, or by MFU of the peak of 16 bits."""
    if "tflops_per_gpu" in row.outputs:
        return 1e12 * row.outputs["tflops_per_gpu"]
    if "mfu_pct" in row.outputs:
        return row.outputs["mfu_pct"] / 100 * topology.accelerator.peak_flops_per_s("bfloat16")
    return None


def _conventions(row: PublishedRow) -> tuple[str, ...]:
    """Return how the source counts attention: "half" or "full" if its notes say so, else both."""
    if _FULL.search(row.notes):
        return ("full",)
    return ("half",) if _HALF.search(row.notes) else ("full", "half")
