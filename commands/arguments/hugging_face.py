"""Declare the arguments of `trellax import-hf` and `trellax export-hf`."""

import argparse

from ...hub.architectures import ARCHITECTURES
from .ema import add_ema_argument
from .types import parse_path, parse_whole


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trellax import-hf`."""
    parser.add_argument("source", type=parse_path, metavar="DIR", help="folder with config.json and safetensors files")
    parser.add_argument("out", type=parse_path, metavar="OUT", help="run folder to create; must not exist")
    _add_shared_arguments(parser)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trellax export-hf`."""
    parser.add_argument(
        "source", type=parse_path, metavar="CHECKPOINT", help="run folder of `trellax train` or `trellax import-hf`"
    )
    parser.add_argument("out", type=parse_path, metavar="OUT", help="folder to create; must not exist")
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help=f"one of {', '.join(ARCHITECTURES)} (default: the one that fits the model)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the written tensors (default: model.dtype)"
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="write the adapters alone, as the package peft reads them; without it they are merged",
    )
    add_ema_argument(parser)
    _add_shared_arguments(parser)


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh",
        default="data=1",
        metavar="SIZES",
        help="split the weights while they are in memory, for example tensor=2,pipe=2 (default: one device)",
    )
    parser.add_argument("--fake-devices", type=parse_whole, metavar="N", help="run on N fake CPU devices")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
