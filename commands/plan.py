"""`trellax plan`: rank the meshes and schedules of a config on a machine, with their predicted cost and the reasons."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

from ..configs.check import check_run
from ..configs.layout import layout_of, question_of
from ..configs.run_config import RunConfig
from ..configs.write_plan import write_plan
from ..layers import param_counts
from ..meshes import PlanError
from ..meshes.columns import align_within
from ..meshes.terminal import fold, terminal_width
from ..plan.costs.inference_time import COMPILED
from ..plan.diagnoses import Diagnosis, diagnose
from ..plan.machines.detect import detect_topology
from ..plan.machines.topology import Topology, read_topology
from ..plan.pareto_front import draw_front
from ..plan.plan import Plan, name_layout
from ..plan.serving_search import ServeQuestion, price_all_serving, rank_serving
from ..plan.training_search import TrainQuestion, price_layout, price_train, rank_train
from .arguments.plan import is_serving
from .output_file import write_output_file

_GB = 1e9


def run_plan(config: RunConfig, args: argparse.Namespace) -> int:
    """Print the ranked plans, or with --this the price of the config's own layout, and write the files asked for.

    Returns the exit code.

    Raises:
        TrellaxError: the machine or the objective is unknown, or no layout fits.
    """
    topology = _find_topology(args)
    question = question_of(config, topology=topology)
    priced = _price(question, args) if args.png or not args.this else []
    plans = [_price_config(config, question)] if args.this else _rank(question, priced, args)
    diagnoses = diagnose(question, plans[0])
    if args.json:
        print(json.dumps(_list_numbers(plans, diagnoses, topology, args)))
    else:
        print(_describe(config, plans, diagnoses, topology, args))
    if args.png:
        title = f"{config.run.name} on {topology.name}, objective {args.objective}"
        limit = question.memory_limit if not is_serving(args) else _make_serving_question(question, args).memory_limit
        picture = draw_front(priced, objective=args.objective, limit_bytes=limit, title=title)
        write_output_file(args.png, picture)
    if args.write:
        write_output_file(
            args.write,
            write_plan(
                args.config, plans[0].layout, header=_header(plans[0], topology, args), overrides=args.overrides
            ).encode(),
        )
    return 0


def _header(plan: Plan, topology: Topology, args: argparse.Namespace) -> list[str]:
    """Return the comment at the top of a written config, with the predicted time and memory."""
    words = [f"--topology {quote(args.topology)}"] if args.topology else []
    words += [f"--objective {args.objective}"] if args.objective != "train" else []
    machine = f"{topology.num_devices} x {topology.accelerator.name}, {topology.devices_per_node} a node"
    return [
        f"{Path(args.config).stem} as `trellax {' '.join(['plan', *words])}` laid it out: {name_layout(plan.layout)}.",
        f"Command:  trellax train {quote(str(args.write))}",
        f"Hardware: {machine}.  Time: {plan.time_s:.3g} s a step, predicted, not measured.",
        f"Expect:   {plan.memory.total / _GB:.1f} GB a device, predicted.",
    ]


def _find_topology(args: argparse.Namespace) -> Topology:
    if args.topology:
        return read_topology(args.topology)
    found = detect_topology()
    if found is None:
        raise PlanError(
            "this machine has no accelerator that the planner has figures of.",
            fix="name one: --topology h100x8, or a TOML file of your own.",
        )
    return found


def _price_config(config: RunConfig, question: TrainQuestion) -> Plan:
    num_devices = question.topology.num_devices
    check_run(config, num_devices=num_devices)
    layout = layout_of(config, num_devices=num_devices)
    return replace(price_layout(question, layout), why="the config as it stands.")


def _price(question: TrainQuestion, args: argparse.Namespace) -> list[Plan]:
    """Return all valid layouts with their prices, to rank, and to plot with --png."""
    if is_serving(args):
        return price_all_serving(_make_serving_question(question, args), objective=args.objective)
    return price_train(question)


def _rank(question: TrainQuestion, priced: Sequence[Plan], args: argparse.Namespace) -> list[Plan]:
    if is_serving(args):
        return rank_serving(priced, objective=args.objective)
    return rank_train(question, priced, objective=args.objective)


def _make_serving_question(question: TrainQuestion, args: argparse.Namespace) -> ServeQuestion:
    return ServeQuestion(
        model=question.model,
        topology=question.topology,
        requests=1 if args.objective == "latency" else args.requests,
        prompt=args.prompt,
        generated=args.generate,
        server=COMPILED,
    )


def _list_numbers(
    plans: Sequence[Plan], diagnoses: Sequence[Diagnosis], topology: Topology, args: argparse.Namespace
) -> dict[str, Any]:
    return {
        "objective": "this" if args.this else args.objective,
        "topology": topology.name,
        "plans": [plan.numbers for plan in plans],
        "diagnoses": [asdict(diagnosis) for diagnosis in diagnoses],
    }


def _describe(
    config: RunConfig,
    plans: Sequence[Plan],
    diagnoses: Sequence[Diagnosis],
    topology: Topology,
    args: argparse.Namespace,
) -> str:
    device = topology.accelerator
    machine = (
        f"{topology.name}: {topology.num_devices} x {device.name} of {device.memory_bytes / _GB:.0f} GB, "
        f"{topology.devices_per_node} in each of {topology.num_nodes} node{'s' if topology.num_nodes > 1 else ''}"
    )
    width = terminal_width()
    axes = _axes(plans)
    rows = [_head(plans[0], axes), *(_row(number, plan, axes) for number, plan in enumerate(plans, 1))]
    table = align_within(rows, width=width)
    reasons = [f"{number}  {plan.why}{_tell_host(plan)}" for number, plan in enumerate(plans, 1)]
    head = fold(f"{_describe_work(config, args)}\n{machine}", width=width)
    lines = [f"{one.severity}: {one.message} ({one.name}).\n  Fix: {one.fix}" for one in diagnoses]
    told = "\n".join([*reasons, *([""] if lines else []), *lines])
    return "\n".join([head, "", table, "", fold(told, width=width)])


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
        return f"{size} in 16 bit, {args.prompt} tokens read and {args.generate} written for each request"
    num_ranks = config.mesh.context
    context = f", each sequence over context={num_ranks} in all layouts" if num_ranks > 1 else ""
    return f"{size}, {config.train.batch_size} x {config.data.seq_len} tokens a step{context}"


def _axes(plans: Sequence[Plan]) -> list[str]:
    """Return the axes of all plans' meshes, in one order."""
    sizes = [plan.layout.mesh.sizes for plan in plans]
    return list(max(sizes, key=len))


def _head(plan: Plan, axes: Sequence[str]) -> tuple[str, ...]:
    sizes = ("", *axes)
    if plan.step is None:
        return (*sizes, "token", "request", "tokens/s", "MFU", "GB", "weights", "cache")
    words = ("schedule", "microbatches", "remat", "shard", "step", "tokens/s", "MFU", "bubble")
    return (*sizes, *words, "GB", "weights", "gradients", "optimizer", "activations")


def _row(number: int, plan: Plan, axes: Sequence[str]) -> tuple[str, ...]:
    layout, memory = plan.layout, plan.memory
    sizes = (str(number), *(str(layout.mesh.sizes.get(axis, 1)) for axis in axes))
    pace = (f"{plan.tokens_per_s:,.0f}", f"{plan.mfu:.1%}")
    if plan.step is None:
        assert plan.inference is not None
        times = (f"{1e3 * plan.time_s:.1f} ms", f"{plan.inference.latency_s:.2f} s")
        kept = (memory.total, memory.weights, memory.kv_cache)
        return (*sizes, *times, *pace, *(f"{part / _GB:.1f}" for part in kept))
    chunks = f" x {layout.chunks}" if layout.chunks > 1 else ""
    words = (
        f"{layout.schedule}{chunks}" if layout.pipe > 1 else "none",
        f"{layout.microbatches} of {layout.sequences}",
        layout.remat,
        layout.shard,
        f"{plan.time_s:.3g} s",
    )
    kept = (memory.total, memory.weights, memory.gradients, memory.optimizer, memory.activations)
    return (*sizes, *words, *pace, f"{plan.bubble_fraction:.1%}", *(f"{part / _GB:.1f}" for part in kept))
