"""Declare the arguments of `trellax plan`."""

import argparse

from ...meshes.errors import PlanError, suggest
from ...plan.machines.topology import read_topology
from ..output_file import check_output_files
from .config import add_config_arguments
from .types import parse_whole

OBJECTIVES = ("train", "latency", "throughput", "balanced", "memory")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_config_arguments(parser)
    parser.add_argument(
        "--topology", metavar="T", help="h100x8, h100x64/8 for 8 a node, or a TOML file (default: this machine)"
    )
    parser.add_argument(
        "--objective", metavar="O", default="train", help=f"one of {', '.join(OBJECTIVES)} (default train)"
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
    parser.add_argument("--png", metavar="FILE", help="plot step time against memory for all layouts")
    parser.add_argument("--write", metavar="FILE", help="write the config with the best plan's mesh and schedule")


def check_plan_arguments(args: argparse.Namespace) -> None:
    """Check the topology, the objective and the files to write, before all that a plan needs is imported.

    Raises:
        TargetError: the topology is neither a known machine nor a readable file.
        PlanError: the objective is unknown, or options contradict each other.
        ConfigError: a file cannot be written.
    """
    if args.topology:
        read_topology(args.topology)
    if args.objective not in OBJECTIVES:
        raise PlanError(
            f"unknown objective {args.objective!r}; there are {', '.join(OBJECTIVES)}."
            f"{suggest(args.objective, OBJECTIVES)}",
            fix="write for example --objective train.",
        )
    if args.write and (args.this or is_serving(args)):
        raise PlanError("--write writes the mesh of a training plan.", fix="leave out --this, and use train or memory.")
    if args.this and is_serving(args):
        raise PlanError(
            f"--this prices the config's training step, and --objective {args.objective} is for serving.",
            fix="leave out one of them.",
        )
    check_output_files(args.png, args.write)


def is_serving(args: argparse.Namespace) -> bool:
    """Whether the objective is one of serving, not of training."""
    return args.objective in ("latency", "throughput", "balanced")
