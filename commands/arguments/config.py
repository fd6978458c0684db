"""Declare the arguments that all commands with a config share."""

import argparse

from .types import parse_path


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, --fake-devices and --json."""
    parser.add_argument(
        "config", type=parse_path, metavar="CONFIG", help="a TOML file, or the name of a config that comes with trellax"
    )
    parser.add_argument("--fake-devices", metavar="N", help="run on N fake CPU devices (sets run.fake_devices)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
