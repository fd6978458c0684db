"""The options of `plan`, `inspect` and of many processes, apart from what they do: help needs no jax."""

import argparse

from .argument_types import whole

START_S = 300
"""Seconds that processes wait for each other to start."""

OBJECTIVES = ("train", "latency", "throughput", "balanced", "memory")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command, beside CONFIG and --json."""
    parser.add_argument("--topology", metavar="T", help="h100x8, h100x64/8 for 8 a node, or a TOML file (this machine)")
    parser.add_argument("--objective", metavar="O", default="train", help=f"one of {', '.join(OBJECTIVES)} (train)")
    parser.add_argument("--this", action="store_true", help="price the config as it stands")
    parser.add_argument("--requests", type=whole, default=0, metavar="N", help="served at a time (as many as fit)")
    parser.add_argument("--prompt", type=whole, default=512, metavar="N", help="tokens read for each request (512)")
    parser.add_argument("--generate", type=whole, default=128, metavar="N", help="tokens written for each (128)")
    parser.add_argument("--png", metavar="FILE", help="draw time against memory of all layouts")
    parser.add_argument("--write", metavar="FILE", help="write the config with the first plan's mesh")


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command, beside CONFIG and --json."""
    parser.add_argument(
        "--target",
        metavar="NAME[:N[/M]]",
        default="cpu",
        help="cpu, or GPUs that need not be there: h200:8, a100-80:16, h100:64/8 for 8 a node (cpu)",
    )
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program as text")
    parser.add_argument("--png", metavar="FILE", help="draw memory against the device and traffic against the minimum")


def add_process_arguments(command: argparse.ArgumentParser) -> None:
    """Add the words of many processes; SLURM and Open MPI make the first three needless."""
    command.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, for many processes")
    command.add_argument("--num-processes", metavar="N", help="how many there are")
    command.add_argument("--process-id", metavar="I", help="which one this is, from 0")
    command.add_argument(
        "--start-timeout", metavar="S", help=f"seconds that processes wait for each other to start ({START_S})"
    )
