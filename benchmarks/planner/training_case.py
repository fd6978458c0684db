"""Convert a published training row into a question to the planner: model, layout, runtime and machine.

An input that the planner needs and the row does not state is either swept (rematerialization: the least that fits in
memory) or a reason to skip the row. Traits of the runtime follow from what rows state: the kind of attention, dropout
with unfused attention, sharded optimizers by their names. Read `rows.py` first.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal, cast

from trellax.layers import ModelConfig
from trellax.meshes.errors import TargetError, TrellaxError
from trellax.plan.costs.layout import Layout, PlanRemat
from trellax.plan.costs.runtime import Runtime
from trellax.plan.machines.topology import Accelerator, Topology, find_accelerator

from .rows import PublishedRow
from .runtime_case import is_modern, row_runtime
from .skipped import RowSkippedError
from .stated import batch_size

# x, every second of the products' outputs, and attention's: two thirds of what "dots" keeps.
_KEPT_BY_OP: tuple[tuple[PlanRemat, float], ...] = (("dots", 2 / 3), ("full", 1 / 3))
_RACK, _JOB_OF_RACK = 72, 64
_NETWORK = re.compile(r"(?:(\d+)x)?[^\d]*?(\d+(?:\.\d+)?) ?Gb/s(?: x(\d+))?(.*)")


@dataclass(frozen=True, kw_only=True)
class TrainCase:
    """A published training step; `remats` are the possible policies, least first, or the one that is stated.

    `mix` has the shares of a stated policy that treats layers or products differently, and `kept` those for what it
    stores; both add up to 1.
    """

    model: ModelConfig
    layout: Layout
    runtime: Runtime
    topology: Topology
    num_tokens: int
    remats: tuple[PlanRemat, ...]
    mix: tuple[tuple[PlanRemat, float], ...] = ()
    kept: tuple[tuple[PlanRemat, float], ...] = ()


def train_case(row: PublishedRow) -> TrainCase:
    """Return the training step of a row.

    Raises:
        RowSkippedError: an input is missing, or the planner has no model of it.
    """
    inputs = row.inputs
    if inputs.get("moe") or "ep" in inputs:
        raise RowSkippedError("mixture of experts is not modelled")
    model = row_model(row)
    topology = row_topology(row)
    runtime = row_runtime(row, topology.accelerator)
    try:
        layout = _layout(row, topology.accelerator)
    except TrellaxError as error:
        raise RowSkippedError(error.problem) from error
    if layout.num_devices != topology.num_devices:
        raise RowSkippedError(f"dp x fsdp x tp x pp x cp = {layout.num_devices}, but gpus = {topology.num_devices}")
    # A stage may hold the embedding or the head alone.
    if layout.num_stages > model.num_layers + (2 if (model.num_layers + 2) % layout.num_stages == 0 else 0):
        raise RowSkippedError(f"{layout.num_stages} stages for {model.num_layers} layers")
    remats = _remats(row)
    return TrainCase(
        model=model,
        layout=replace(layout, remat=remats[0]),
        runtime=runtime,
        topology=topology,
        num_tokens=_need(row, "seq"),
        remats=remats,
        mix=_mix(row, remats[0]),
        kept=_KEPT_BY_OP if "(op)" in str(row.inputs.get("recompute")) else _mix(row, remats[0]),
    )


def row_model(row: PublishedRow) -> ModelConfig:
    """Return the model of a row.

    Raises:
        RowSkippedError: a size is missing, or the sizes contradict each other.
    """
    inputs = row.inputs
    is_gated = "swiglu" in str(inputs.get("mlp", "gelu"))
    try:
        return ModelConfig(
            vocab_size=_need(row, "vocab"),
            num_layers=_need(row, "layers"),
            hidden_size=_need(row, "hidden"),
            num_heads=_need(row, "heads"),
            num_kv_heads=inputs.get("kv_heads", 0),
            head_size=inputs.get("head_dim", 0),
            ffn_size=inputs.get("ffn", 0),
            max_tokens=inputs.get("seq", 2048),
            mlp="swiglu" if is_gated else "gelu",
            norm="rmsnorm" if is_gated else "layernorm",
            positions="rotary" if is_gated or inputs.get("mlp") == "squared_relu" else "learned",
            bias="off" if is_gated else "on",
            embeddings="tied" if inputs.get("tied", not is_gated) else "untied",
            dtype="bfloat16",
        )
    except TrellaxError as error:
        raise RowSkippedError(error.problem) from error


def row_topology(row: PublishedRow) -> Topology:
    """Return the machine of a row, with the network that it states.

    Raises:
        RowSkippedError: the accelerator is not known.
    """
    inputs = row.inputs
    accelerator = _accelerator(str(inputs.get("gpu", "")))
    gpus = _need(row, "gpus")
    node = inputs.get("gpus_per_node", min(gpus, accelerator.devices_per_node))
    # A host has four GPUs of a rack whose 72 share NVLink; jobs use 64 of them.
    if accelerator.devices_per_node == _RACK:
        node = _JOB_OF_RACK if gpus % _JOB_OF_RACK == 0 else min(gpus, _RACK)
    network = _network_bytes_per_s(str(inputs.get("inter_node", "")), devices_per_node=node)
    accelerator = replace(accelerator, network_bytes_per_s=network) if network else accelerator
    try:
        return Topology(
            name=str(inputs["gpu"]), accelerator=accelerator, num_devices=gpus, devices_per_node=min(node, gpus)
        )
    except TargetError as error:
        raise RowSkippedError(error.problem) from error


def _need(row: PublishedRow, key: str) -> int:
    value = row.inputs.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise RowSkippedError(f"{key} is not stated")
    return value


def _accelerator(text: str) -> Accelerator:
    """Return the accelerator whose name is the longest known beginning of a text."""
    words = re.split(r" \(|,", text, maxsplit=1)[0].strip()
    for end in range(len(words), 0, -1):
        try:
            return find_accelerator(words[:end].rstrip("- "))
        except TargetError:
            continue
    raise RowSkippedError(f"accelerator {text!r} is not known")


def _network_bytes_per_s(text: str, *, devices_per_node: int) -> float | None:
    """Parse the bytes/s of one device from texts such as "8x HDR InfiniBand 200 Gb/s per node"."""
    found = _NETWORK.match(text)
    if not found:
        return None
    before, rate, after, rest = found.groups()
    whole = float(rate) * int(before or after or 1) / 8 * 1e9
    return whole if "per GPU" in rest else whole / devices_per_node


def _layout(row: PublishedRow, accelerator: Accelerator) -> Layout:
    inputs = row.inputs
    if "dp" not in inputs:
        raise RowSkippedError("dp is not stated")
    data, fsdp, chunks = inputs["dp"], inputs.get("fsdp", 1), inputs.get("vpp", 1)
    others = inputs.get("tp", 1) * inputs.get("pp", 1) * inputs.get("cp", 1)
    schedule = _schedule(row, chunks)
    chunks = 2 if schedule == "zb-v" else chunks
    if fsdp > 1 and data * others == inputs.get("gpus") and data % fsdp == 0:
        # dp counts all data shards, those of fsdp among them.
        data //= fsdp
    sequences, microbatches = _need(row, "mbs"), inputs.get("num_microbatches")
    if microbatches is None:
        microbatches = (batch_size(row) or _need(row, "gbs")) // (data * fsdp * sequences)
    # Megatron Core and NeMo shard the optimizer by default; earlier versions only if asked to.
    zero = 3 if inputs.get("fsdp_only") and fsdp * inputs.get("cp", 1) > 1 else inputs.get("zero")
    sharded = "distributed optimizer" in str(inputs.get("optimizer", "")) or is_modern(row, accelerator)
    return Layout(
        data=data,
        tensor=inputs.get("tp", 1),
        pipe=inputs.get("pp", 1),
        context=inputs.get("cp", 1),
        fsdp=fsdp,
        schedule=schedule,
        chunks=chunks,
        microbatches=microbatches,
        sequences=sequences,
        zero=cast("Literal[0, 1, 3]", int(sharded) if zero is None else zero),
    )


def _schedule(row: PublishedRow, chunks: int) -> str:
    text = str(row.inputs.get("schedule", "1f1b"))
    for name in ("vpp", "schedule (interleaved or not)"):
        if name in row.unstated:
            raise RowSkippedError(f"{name} is not stated")
    if "interleaved" in text and "vpp" not in row.inputs and row.inputs.get("pp", 1) > 1:
        raise RowSkippedError("vpp is not stated")
    if chunks > 1:
        return "interleaved-1f1b"
    if "memory limit 2p" in text:
        raise RowSkippedError("its schedule was found by a search whose result the source does not list")
    if "zb-v" in text:
        return "zb-v"
    # With a limit of p microbatches the search of Qi et al. finds ZB-H1 (their Table 5).
    return "zb-h1" if "zero-bubble" in text or "zb-h1" in text else "gpipe" if "gpipe" in text else "1f1b"


def _remats(row: PublishedRow) -> tuple[PlanRemat, ...]:
    text = str(row.inputs.get("recompute", ""))
    if any("recompute" in name or "remat" in name for name in row.unstated) or not text:
        return ("none", "selective", "full")
    if text.startswith("microbatch"):
        raise RowSkippedError("recomputation by microbatch is not modelled")
    return ("full",) if text.startswith("full") else ("selective",) if text.startswith("selective") else ("none",)


def _mix(row: PublishedRow, stated: PlanRemat) -> tuple[tuple[PlanRemat, float], ...]:
    """Return the policies that a stated one consists of.

    torchtitan's "op" keeps every second matrix product's output and attention's, and computes the rest again: half of
    the products, and all between them (torchtitan, `models/.../parallelize.py`, `_apply_ac_to_transformer_block`). Of
    times, which are linear in what is repeated, that is half of "dots" and half of "full" without attention's core.
    """
    text = str(row.inputs.get("recompute", ""))
    if "every 2nd layer" in text:
        return (("none", 0.5), ("full", 0.5))
    if "(op)" in text:
        return (("dots", 0.5), ("full", 0.5), ("selective", -0.5), ("none", 0.5))
    return ((stated, 1.0),)
