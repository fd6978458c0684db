"""Declare the arguments of `trellax calibrate`."""

import argparse

from ...meshes.errors import ConfigError
from ..output_file import check_output_files
from .types import parse_path, parse_whole


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", type=parse_path, help="topology to write, machine.toml say")
    parser.add_argument("--fake-devices", type=parse_whole, default=0, metavar="N", help="measure N fake CPU devices")
    parser.add_argument("--config", metavar="CONFIG", help="measure a training step of it, beside its prediction")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")


def check_calibrate_arguments(args: argparse.Namespace) -> None:
    """Check the file to write before jax starts.

    Raises:
        ConfigError: the file is no TOML file, or cannot be written.
    """
    if not args.file.endswith(".toml"):
        raise ConfigError(
            f"{args.file} is no TOML file, which `trellax plan --topology` takes.", fix="name machine.toml."
        )
    check_output_files(args.file)
