"""`trellax plan`: which mesh for a config on a machine, what it costs, and why. See `../plan/training_search.py`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

from ..configs.check import check_run
from ..configs.layout import layout_of
from ..configs.run_config import RunConfig
from ..configs.write_plan import write_plan
from ..layers import param_counts
from ..meshes import PlanError, suggest
from ..meshes.columns import align_within
from ..meshes.terminal import fold, terminal_width
from ..plan.costs.inference_time import COMPILED
from ..plan.costs.runtime import trellax_runtime
from ..plan.diagnoses import Diagnosis, diagnose
from ..plan.machines.detect import detect_topology
from ..plan.machines.topology import Topology, read_topology
from ..plan.pareto_front import draw_front
from ..plan.plan import Plan, name_layout
from ..plan.serving_search import ServeQuestion, price_all_serving, rank_serving
from ..plan.training_search import TrainQuestion, price_layout, price_train, rank_train
from .asked_file import check_files, write_file
from .command_arguments import OBJECTIVES

_GB = 1e9


def run_plan(config: RunConfig, args: argparse.Namespace, *, overrides: Sequence[str] = ()) -> int:
    """Print the plans or the price of the config as it stands, and write the files that were asked for.

    Args:
        overrides: words by which the config differs from its file; `--write` keeps them.

    Raises:
        TrellaxError: the machine or the objective is not known, or nothing fits.
    """
    _check_words(args)
    topology = _topology(args)
    question = _question(config, topology)
    priced = _price(question, args) if args.png or not args.this else []
    plans = [_price_config(config, question)] if args.this else _rank(question, priced, args)
    diagnoses = diagnose(question, plans[0])
    if args.json:
        print(json.dumps(_numbers(plans, diagnoses, topology, args)))
    else:
        print(_describe(config, plans, diagnoses, topology, args))
    if args.png:
        title = f"{config.run.name} on {topology.name}, objective {args.objective}"
        limit = question.memory_limit if not _is_serving(args) else _serving(question, args).memory_limit
        picture = draw_front(priced, objective=args.objective, limit_bytes=limit, title=title)
        write_file(args.png, picture)
    if args.write:
        write_file(
            args.write,
            write_plan(
                args.config, plans[0].layout, header=_header(plans[0], topology, args), overrides=overrides
            ).encode(),
        )
    return 0


def _header(plan: Plan, topology: Topology, args: argparse.Namespace) -> list[str]:
    """What a written config says of itself: nothing that was measured."""
    words = [f"--topology {quote(args.topology)}"] if args.topology else []
    words += [f"--objective {args.objective}"] if args.objective != "train" else []
    machine = f"{topology.num_devices} x {topology.accelerator.name}, {topology.devices_per_node} a node"
    return [
        f"{Path(args.config).stem} as `trellax {' '.join(['plan', *words])}` laid it out: {name_layout(plan.layout)}.",
        f"Command:  trellax train {quote(str(args.write))}",
        f"Hardware: {machine}.  Time: {plan.time_s:.3g} s a step, predicted, not measured.",
        f"Expect:   {plan.memory.total / _GB:.1f} GB a device, predicted.",
    ]


def _check_words(args: argparse.Namespace) -> None:
    if args.objective not in OBJECTIVES:
        raise PlanError(
            f"unknown objective {args.objective!r}; there are {', '.join(OBJECTIVES)}."
            f"{suggest(args.objective, OBJECTIVES)}",
            fix="write --objective train, say.",
        )
    if args.write and (args.this or _is_serving(args)):
        raise PlanError("--write writes the mesh of a training plan.", fix="leave out --this, and use train or memory.")
    if args.this and _is_serving(args):
        raise PlanError(
            f"--this prices the config's training step, and --objective {args.objective} is for serving.",
            fix="leave out one of them.",
        )
    check_files(args.png, args.write)


def _is_serving(args: argparse.Namespace) -> bool:
    return args.objective in ("latency", "throughput", "balanced")


def _topology(args: argparse.Namespace) -> Topology:
    if args.topology:
        return read_topology(args.topology)
    found = detect_topology()
    if found is None:
        raise PlanError(
            "this machine has no accelerator that the planner has figures of.",
            fix="name one: --topology h100x8, or a TOML file of your own.",
        )
    return found


def _question(config: RunConfig, topology: Topology) -> TrainQuestion:
    return TrainQuestion(
        model=config.model,
        topology=topology,
        batch_size=config.train.batch_size,
        num_tokens=config.data.seq_len,
        runtime=trellax_runtime(config.model, topology.accelerator, vocab=config.pipeline.vocab),
    )


def _price_config(config: RunConfig, question: TrainQuestion) -> Plan:
    num_devices = question.topology.num_devices
    check_run(config, num_devices=num_devices)
    layout = layout_of(config, num_devices=num_devices)
    return replace(price_layout(question, layout), why="the config as it stands.")


def _price(question: TrainQuestion, args: argparse.Namespace) -> list[Plan]:
    """Every layout with its price: what is ranked is also what is drawn."""
    if _is_serving(args):
        return price_all_serving(_serving(question, args), objective=args.objective)
    return price_train(question)


def _rank(question: TrainQuestion, priced: Sequence[Plan], args: argparse.Namespace) -> list[Plan]:
    if _is_serving(args):
        return rank_serving(priced, objective=args.objective)
    return rank_train(question, priced, objective=args.objective)


def _serving(question: TrainQuestion, args: argparse.Namespace) -> ServeQuestion:
    return ServeQuestion(
        model=replace(question.model, dtype="bfloat16"),
        topology=question.topology,
        requests=1 if args.objective == "latency" else args.requests,
        prompt=args.prompt,
        generated=args.generate,
        server=COMPILED,
    )


def _numbers(
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
    rows = [_head(plans[0]), *(_row(number, plan) for number, plan in enumerate(plans, 1))]
    table = align_within(rows, width=width)
    reasons = [f"{number}  {plan.why}" for number, plan in enumerate(plans, 1)]
    head = fold(f"{_describe_work(config, args)}\n{machine}", width=width)
    lines = [f"{one.severity}: {one.message} ({one.name}).\n  Fix: {one.fix}" for one in diagnoses]
    told = "\n".join([*reasons, *([""] if lines else []), *lines])
    return "\n".join([head, "", table, "", fold(told, width=width)])


def _describe_work(config: RunConfig, args: argparse.Namespace) -> str:
    count = param_counts(config.model).total
    size = f"{config.run.name}: " + (f"{count / _GB:.3g} billion" if count >= _GB else f"{count / 1e6:.3g} million")
    size += " parameters"
    if _is_serving(args):
        return f"{size} in 16 bit, {args.prompt} tokens read and {args.generate} written for each request"
    return f"{size}, {config.train.batch_size} x {config.data.seq_len} tokens a step"


def _head(plan: Plan) -> tuple[str, ...]:
    sizes = ("", "data", "tensor", "pipe")
    if plan.step is None:
        return (*sizes, "token", "request", "tokens/s", "MFU", "GB", "weights", "cache")
    words = ("schedule", "microbatches", "remat", "ZeRO", "step", "tokens/s", "MFU", "bubble")
    return (*sizes, *words, "GB", "weights", "gradients", "optimizer", "activations")


def _row(number: int, plan: Plan) -> tuple[str, ...]:
    layout, memory = plan.layout, plan.memory
    sizes = (str(number), str(layout.data), str(layout.tensor), str(layout.pipe))
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
        "on" if layout.zero else "off",
        f"{plan.time_s:.3g} s",
    )
    kept = (memory.total, memory.weights, memory.gradients, memory.optimizer, memory.activations)
    return (*sizes, *words, *pace, f"{plan.bubble_fraction:.1%}", *(f"{part / _GB:.1f}" for part in kept))
