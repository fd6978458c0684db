"""Declare the arguments of `trellax runs` and `trellax sweep`."""

import argparse

from ...meshes.errors import RunError
from .config import add_config_arguments
from .types import parse_path


def add_runs_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trellax runs`."""
    parser.add_argument(
        "names",
        type=parse_path,
        nargs="*",
        metavar="FOLDER",
        help="folder that holds runs (default runs); or `compare A B ...`: run folders to compare",
    )
    parser.add_argument("--png", metavar="FILE", help="draw the losses of the runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def check_runs_arguments(args: argparse.Namespace) -> None:
    """Check the number of folders.

    Raises:
        RunError: there are more folders, or fewer, than the command takes.
    """
    if args.names[:1] == ["compare"]:
        if len(args.names) < 3:
            raise RunError(
                f"`trellax runs compare` has {len(args.names) - 1} of the two or more run folders that it compares.",
                fix="write `trellax runs compare runs/a runs/b`.",
            )
    elif len(args.names) > 1:
        raise RunError(
            f"`trellax runs` lists the runs in one folder, not in {len(args.names)}.",
            fix="name one folder, or write `trellax runs compare A B`.",
        )


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trellax sweep`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="KEY=V,V",
        help="values of a key, for example optimizer.learning_rate=1e-4,3e-4; several make a grid of all combinations",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="folder of the runs in run.folder (default: the config's, -sweep)"
    )
