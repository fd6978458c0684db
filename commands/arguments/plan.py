"""Declare the arguments of `trellax plan`."""

import argparse

from ...meshes.errors import PlanError, suggest
from ...plan.machines.topology import read_topology
from ..output_file import check_output_files
from .config import add_config_arguments
from .types import parse_whole

OBJECTIVES = ("train", "latency", "throughput", "balanced", "memory", "gpu-hours", "energy")
_OF_SERVING = ("latency", "throughput", "balanced")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_config_arguments(parser)
    parser.add_argument(
        "--topology",
        metavar="T",
        help="h100x8, h100x64/8 for 8 a node, a TOML file, or several with commas to compare (default: this machine)",
    )
    parser.add_argument(
        "--objective",
        metavar="O",
        default="train",
        help=f"one of {', '.join(OBJECTIVES)} (default train), or several of training with commas",
    )
    parser.add_argument("--this", action="store_true", help="price the config's own mesh and schedule only")
    parser.add_argument(
        "--requests", type=parse_whole, default=0, metavar="N", help="requests served at a time (default: all that fit)"
    )
    parser.add_argument(
        "--prompt", type=parse_whole, default=512, metavar="N", help="tokens of a request's prompt (default 512)"
    )
    parser.add_argument(
        "--generate", type=parse_whole, default=128, metavar="N", help="tokens of a request's answer (default 128)"
    )
    parser.add_argument(
        "--weights", metavar="T", help="of a server: weights of linear layers, plain, int8 or fp8 (default: plain)"
    )
    parser.add_argument(
        "--cache-dtype", metavar="T", help="of a server: cached keys and values, bfloat16 (default), float32 or fp8"
    )
    parser.add_argument("--png", metavar="FILE", help="plot step time against memory for all layouts")
    parser.add_argument("--write", metavar="FILE", help="write the config with the best plan's mesh and schedule")


def check_plan_arguments(args: argparse.Namespace) -> None:
    """Check the topology, the objective and the files to write, before all that a plan needs is imported.

    Raises:
        TargetError: the topology is neither a known machine nor a readable file.
        PlanError: the objective is unknown, or options contradict each other.
        ConfigError: a file cannot be written.
    """
    names = topologies_of(args)
    topologies = [read_topology(name) for name in names]
    _check_objectives(args)
    for topology in topologies:
        if "energy" in objectives_of(args) and not topology.accelerator.watts:
            raise PlanError(
                f"the energy of {topology.name}: watts of {topology.accelerator.name} are not stated.",
                fix="write watts = 700, say, in a topology file, or ask for gpu-hours, which energy grows with.",
            )
    if len(names) > 1 and (args.png or args.write):
        raise PlanError(
            f"--topology names {len(names)} machines, and --png and --write take the plans of one.",
            fix="name one machine, or leave them out.",
        )
    if args.write and (args.this or is_serving(args)):
        raise PlanError("--write writes the mesh of a training plan.", fix="leave out --this, and use train or memory.")
    if args.this and is_serving(args):
        raise PlanError(
            f"--this prices the config's training step, and --objective {args.objective} is for serving.",
            fix="leave out one of them.",
        )
    for option, value in (("--weights", args.weights), ("--cache-dtype", args.cache_dtype)):
        if value and not is_serving(args):
            raise PlanError(
                f"{option} {value} is of a server, and --objective {args.objective} is for training.",
                fix=f"add --objective {_OF_SERVING[0]}, or leave {option} out.",
            )
    check_output_files(args.png, args.write)


def _check_objectives(args: argparse.Namespace) -> None:
    objectives = objectives_of(args)
    for objective in objectives:
        if objective not in OBJECTIVES:
            raise PlanError(
                f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}.{suggest(objective, OBJECTIVES)}",
                fix="write for example --objective train.",
            )
    if len(objectives) > 1 and (set(objectives) & set(_OF_SERVING) or len(set(objectives)) < len(objectives)):
        raise PlanError(
            f"--objective {args.objective}: {', '.join(_OF_SERVING)} stand alone, and no objective comes twice.",
            fix="write for example --objective train,memory.",
        )


def objectives_of(args: argparse.Namespace) -> list[str]:
    """Return the objectives that are asked for."""
    return args.objective.split(",")


def topologies_of(args: argparse.Namespace) -> list[str]:
    """Return the machines that are asked for, none for this one."""
    return args.topology.split(",") if args.topology else []


def is_serving(args: argparse.Namespace) -> bool:
    """Whether the objective is one of serving, not of training."""
    return args.objective in _OF_SERVING
