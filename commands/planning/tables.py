"""Print plans: the table of a ranking with its reasons, and the table that compares machines. Read `plan.py` next."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from ...configs.run_config import RunConfig
from ...layers import param_counts
from ...layers.own.counts import tell_counts
from ...meshes import TrellaxError
from ...meshes.columns import align_within
from ...meshes.terminal import fold, terminal_width
from ...plan.diagnoses import Diagnosis
from ...plan.evidence import Evidence
from ...plan.explanations import ON_FRONT
from ...plan.machines.topology import Topology
from ...plan.plan import Plan
from ..arguments.plan import is_serving, objectives_of

_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The best plans on one machine, all that were priced, the memory to stay within, mistakes and what is known."""

    topology: Topology
    plans: list[Plan]
    priced: list[Plan]
    limit_bytes: float
    diagnoses: list[Diagnosis]
    evidence: Evidence | None


def describe_plans(config: RunConfig, answer: Answer, args: argparse.Namespace) -> str:
    """Return the table of plans on one machine, a reason for each, how sure they are, and mistakes of the first."""
    topology, plans, evidence = answer.topology, answer.plans, answer.evidence
    device = topology.accelerator
    machine = (
        f"{topology.name}: {topology.num_devices} x {device.name} of {device.memory_bytes / _GB:.0f} GB, "
        f"{topology.devices_per_node} in each of {topology.num_nodes} node{'s' if topology.num_nodes > 1 else ''}"
    )
    width, axes = terminal_width(), _axes(plans)
    is_front = not is_serving(args) and len(objectives_of(args)) > 1
    rows = [_head(plans[0], axes, is_front), *(_row(str(n), plan, axes, is_front) for n, plan in enumerate(plans, 1))]
    reasons = [
        f"{number}  {plan.why}{_tell_host(plan)}" for number, plan in enumerate(plans, 1) if plan.why != ON_FRONT
    ]
    reasons += [f"All others: {ON_FRONT}"] if len(reasons) < len(plans) else []
    lines = [f"{one.severity}: {one.message} ({one.name}).\n  Fix: {one.fix}" for one in answer.diagnoses]
    told = [*reasons, "", evidence.text if evidence else "No published rows are near this: take times as estimates."]
    told += [counts] if (counts := tell_counts(config.model)) else []
    told += ["", *lines] if lines else []
    head = fold(f"{_describe_work(config, args)}\n{machine}", width=width)
    return "\n".join([head, "", align_within(rows, width=width), "", fold("\n".join(told), width=width)])


def describe_comparison(
    config: RunConfig, answers: Sequence[tuple[Topology, Answer | TrellaxError]], args: argparse.Namespace
) -> str:
    """Return one table with the best plan on each machine, and the reasons of those that have none."""
    plans = [answer.plans[0] for _, answer in answers if isinstance(answer, Answer)]
    axes, width = _axes(plans), terminal_width()
    first, *head = _head(plans[0], axes, True)
    table: list[tuple[str, ...]] = [(first or "topology", *head)]
    reasons = []
    for topology, answer in answers:
        if isinstance(answer, Answer):
            table.append(_row(topology.name, answer.plans[0], axes, True))
        else:
            table.append((topology.name, *["-"] * len(head)))
            reasons.append(str(answer))
    lines = [fold(_describe_work(config, args), width=width), "", align_within(table, width=width)]
    return "\n".join([*lines, *([""] if reasons else []), *(fold(reason, width=width) for reason in reasons)])


def _tell_host(plan: Plan) -> str:
    """Return what a plan keeps in the memory of the host, or ""."""
    what = "residuals" if plan.layout.offload == "residuals" else "moments"
    host = f"{plan.memory.host / _GB:.1f} GB of {what} a device in the memory of the host"
    return f" Keeps {host} (train.offload)." if plan.memory.host else ""


def _describe_work(config: RunConfig, args: argparse.Namespace) -> str:
    count = param_counts(config.model).total
    size = f"{config.run.name}: " + (f"{count / _GB:.3g} billion" if count >= _GB else f"{count / 1e6:.3g} million")
    size += " parameters"
    if is_serving(args):
        formats = "16 bit" if args.weights in (None, "plain") else args.weights
        formats += f" with a cache in {args.cache_dtype}" if args.cache_dtype else ""
        return f"{size} in {formats}, {args.prompt} tokens read and {args.generate} written for each request"
    return f"{size}, {config.train.batch_size} x {config.data.seq_len} tokens a step"


def _axes(plans: Sequence[Plan]) -> list[str]:
    """Return the axes of all plans' meshes, in one order."""
    named = {axis: None for plan in plans for axis in plan.layout.mesh.sizes}
    return [axis for axis in ("data", "expert", "context", "context_expert", "tensor", "pipe") if axis in named]


def _head(plan: Plan, axes: Sequence[str], is_front: bool) -> tuple[str, ...]:
    sizes = ("", *axes)
    cost = ("device hours", *(("kWh",) if plan.energy_kwh else ())) if is_front else ()
    if plan.step is None:
        return (*sizes, "token", "request", "tokens/s", "MFU", *cost, "GB", "weights", "cache")
    words = ("schedule", "microbatches", "remat", "shard", "step", "tokens/s", "MFU", "bubble")
    return (*sizes, *words, *cost, "GB", "weights", "gradients", "optimizer", "activations")


def _row(name: str, plan: Plan, axes: Sequence[str], is_front: bool) -> tuple[str, ...]:
    layout, memory = plan.layout, plan.memory
    sizes = (name, *(str(layout.mesh.sizes.get(axis, 1)) for axis in axes))
    pace = (f"{plan.tokens_per_s:,.0f}", f"{plan.mfu:.1%}")
    energy = (f"{plan.energy_kwh:,.0f}",) if plan.energy_kwh else ()
    cost = (f"{plan.gpu_hours:,.0f}", *energy) if is_front else ()
    if plan.step is None:
        assert plan.inference is not None
        times = (f"{1e3 * plan.time_s:.1f} ms", f"{plan.inference.latency_s:.2f} s")
        kept = (memory.total, memory.weights, memory.kv_cache)
        return (*sizes, *times, *pace, *cost, *(f"{part / _GB:.1f}" for part in kept))
    chunks = f" x {layout.chunks}" if layout.chunks > 1 else ""
    words = (
        f"{layout.schedule}{chunks}" if layout.pipe > 1 else "none",
        f"{layout.microbatches} of {layout.sequences}",
        layout.remat,
        layout.shard,
        f"{plan.time_s:.3g} s",
    )
    kept = (memory.total, memory.weights, memory.gradients, memory.optimizer, memory.activations)
    idle = f"{plan.bubble_fraction:.1%}"
    return (*sizes, *words, *pace, idle, *cost, *(f"{part / _GB:.1f}" for part in kept))
