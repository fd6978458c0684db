"""`trellax plan`: rank the meshes and schedules of a config on a machine, with their predicted cost and the reasons.

Read `comparison.py` for several machines, `tables.py` for what is printed.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

from ...configs.check import check_run
from ...configs.layout import layout_of, question_of
from ...configs.run_config import RunConfig
from ...configs.write_plan import write_plan
from ...meshes import PlanError, TrellaxError
from ...plan.costs.inference_time import trellax_server
from ...plan.diagnoses import diagnose
from ...plan.evidence import find_evidence
from ...plan.machines.detect import detect_topology
from ...plan.machines.topology import Topology, read_topology
from ...plan.pareto_front import draw_front
from ...plan.plan import Plan, name_layout
from ...plan.serving_search import ServeQuestion, price_all_serving, rank_serving
from ...plan.training_search import TrainQuestion, TrainSearch, price_layout
from ..arguments.plan import is_serving, objectives_of, topologies_of
from ..output_file import write_output_file
from .tables import Answer, describe_comparison, describe_plans

_GB = 1e9


def run_plan(config: RunConfig, args: argparse.Namespace) -> int:
    """Print the ranked plans, or with --this the price of the config's own layout, and write the files asked for.

    Several topologies are compared by the best plan of each. Returns the exit code.

    Raises:
        TrellaxError: a machine or an objective is unknown, or no layout fits on any machine.
    """
    names = topologies_of(args)
    if len(names) > 1:
        return _compare(config, names, args)
    answer = _answer(config, _find_topology(names), args)
    if args.json:
        print(json.dumps(_list_numbers(answer, args)))
    else:
        print(describe_plans(config, answer, args))
    if args.png:
        title = f"{config.run.name} on {answer.topology.name}, objective {args.objective}"
        first = objectives_of(args)[0]
        picture = draw_front(answer.priced, objective=first, limit_bytes=answer.limit_bytes, title=title)
        write_output_file(args.png, picture)
    if args.write:
        header = _header(answer.plans[0], answer.topology, args)
        text = write_plan(args.config, answer.plans[0].layout, header=header, overrides=args.overrides)
        write_output_file(args.write, text.encode())
    return 0


def _compare(config: RunConfig, names: Sequence[str], args: argparse.Namespace) -> int:
    """Print the best plan on each of several machines; one on which nothing fits has its reason instead.

    Raises:
        TrellaxError: nothing fits on any machine.
    """
    answers: list[tuple[Topology, Answer | TrellaxError]] = []
    for name in names:
        topology = read_topology(name)
        try:
            answers.append((topology, _answer(config, topology, args)))
        except TrellaxError as error:
            answers.append((topology, error))
    errors = [answer for _, answer in answers if isinstance(answer, TrellaxError)]
    if len(errors) == len(answers):
        raise errors[0]
    if args.json:
        told = [_one_of_many(topology, answer, args) for topology, answer in answers]
        print(json.dumps({"objective": "this" if args.this else args.objective, "topologies": told}))
    else:
        print(describe_comparison(config, answers, args))
    return 0


def _answer(config: RunConfig, topology: Topology, args: argparse.Namespace) -> Answer:
    """Return the plans on one machine."""
    question = question_of(config, topology=topology)
    limit_bytes, priced = question.memory_limit, []
    if is_serving(args):
        asked = _make_serving_question(question, args)
        limit_bytes, priced = asked.memory_limit, price_all_serving(asked, objective=args.objective)
        plans = rank_serving(priced, objective=args.objective)
    elif args.this:
        plans = [_price_config(config, question)]
        if args.png:
            _, priced = _search(question, args)
    else:
        plans, priced = _search(question, args)
    kind = args.objective if is_serving(args) else "train"
    return Answer(
        topology=topology,
        plans=plans,
        priced=priced,
        limit_bytes=limit_bytes,
        diagnoses=diagnose(question, plans[0]),
        evidence=find_evidence(topology.accelerator, kind=kind, matmuls=question.model.matmuls),
    )


def _search(question: TrainQuestion, args: argparse.Namespace) -> tuple[list[Plan], list[Plan]]:
    """Return the best plans, or the front of several objectives, and all that were priced."""
    objectives = objectives_of(args)
    fewer = {"gpu-hours", "energy"} & set(objectives)
    search = TrainSearch(replace(question, counts="powers" if fewer else "few"))
    plans = search.front(*objectives) if len(objectives) > 1 else search.best(objective=objectives[0])
    if args.png:
        search.front("train", "memory")
    return plans, search.priced


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


def _find_topology(names: Sequence[str]) -> Topology:
    if names:
        return read_topology(names[0])
    found = detect_topology()
    if found is None:
        raise PlanError(
            "this machine has no accelerator that the planner has figures of.",
            fix="name one: --topology h100x8, or a TOML file, which `trellax calibrate FILE` writes for this machine.",
        )
    return found


def _price_config(config: RunConfig, question: TrainQuestion) -> Plan:
    num_devices = question.topology.num_devices
    check_run(config, num_devices=num_devices)
    layout = layout_of(config, num_devices=num_devices)
    return replace(price_layout(question, layout), why="the config as it stands.")


def _make_serving_question(question: TrainQuestion, args: argparse.Namespace) -> ServeQuestion:
    return ServeQuestion(
        model=question.model,
        topology=question.topology,
        requests=1 if args.objective == "latency" else args.requests,
        prompt=args.prompt,
        generated=args.generate,
        server=trellax_server(weights=args.weights or "plain", cache_dtype=args.cache_dtype or "bfloat16"),
    )


def _list_numbers(answer: Answer, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "objective": "this" if args.this else args.objective,
        "topology": answer.topology.name,
        "plans": [plan.numbers for plan in answer.plans],
        "diagnoses": [asdict(diagnosis) for diagnosis in answer.diagnoses],
        "evidence": answer.evidence.numbers if answer.evidence else None,
    }


def _one_of_many(topology: Topology, answer: Answer | TrellaxError, args: argparse.Namespace) -> dict[str, Any]:
    """Return the best plan on a machine in plain numbers, or the reason why there is none."""
    if isinstance(answer, TrellaxError):
        return {"topology": topology.name, "plans": [], "error": str(answer)}
    numbers = _list_numbers(answer, args)
    return {"topology": topology.name, "plans": numbers["plans"][:1], "evidence": numbers["evidence"], "error": ""}
