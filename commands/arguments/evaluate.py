"""Declare the arguments of `trellax eval`."""

import argparse

from ...hub.folder import check_model_folder
from ...meshes.errors import DataError
from .ema import add_ema_argument
from .types import parse_path, parse_whole


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "folder", type=parse_path, metavar="FOLDER", help="run folder of `trellax train`, or a Hugging Face model"
    )
    parser.add_argument(
        "--data",
        type=parse_path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="text files, .jsonl (.gz, .zst), .parquet or .arrow files, or globs",
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="field of a record that holds its text (default text)"
    )
    parser.add_argument("--mesh", default="", metavar="SIZES", help="for example tensor=2,pipe=2 (default: one device)")
    parser.add_argument("--fake-devices", type=parse_whole, default=0, metavar="N", help="run on N fake CPU devices")
    parser.add_argument("--seq-len", type=parse_whole, metavar="N", help="tokens of a sequence (default: at most 1024)")
    parser.add_argument(
        "--batch-size", type=parse_whole, default=8, metavar="N", help="sequences at a time (default 8)"
    )
    parser.add_argument("--dtype", metavar="T", help="dtype to compute in, float32 or bfloat16 (default: the model's)")
    add_ema_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def check_eval_arguments(args: argparse.Namespace) -> None:
    """Check that the folder exists and the numbers are in their range, before jax is imported.

    Raises:
        CheckpointError: the folder does not exist or is not a folder.
        DataError: a number is out of its range, or the dtype is unknown.
    """
    check_model_folder(args.folder)
    for option, value in (("--seq-len", args.seq_len), ("--batch-size", args.batch_size)):
        if value is not None and not 1 <= value < 2**31:
            raise DataError(f"{option} {value} is out of range.", fix="give 1 or more.")
    if args.dtype not in (None, "float32", "bfloat16"):
        raise DataError(f"--dtype {args.dtype}: unknown type.", fix="use float32 or bfloat16.")
