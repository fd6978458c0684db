"""Declare the arguments of `trellax eval`."""

import argparse
import importlib.util

from ...hub.folder import check_model_folder
from ...meshes.errors import DataError
from .ema import add_ema_argument
from .types import parse_path, parse_whole


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "folder",
        type=parse_path,
        metavar="FOLDER",
        help="run folder of `trellax train`, or a Hugging Face model, or org/name of one in its cache",
    )
    parser.add_argument(
        "--data",
        type=parse_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files, .jsonl (.gz, .zst), .parquet or .arrow files, or globs",
    )
    _add_task_arguments(parser)
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


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        type=parse_path,
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks of lm-evaluation-harness, by name or as .yaml files of your own",
    )
    parser.add_argument(
        "--num-fewshot", type=parse_whole, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument("--limit", type=parse_whole, metavar="N", help="first questions of each task alone")


def check_eval_arguments(args: argparse.Namespace) -> None:
    """Check that the folder exists and the numbers are in their range, before jax is imported.

    Raises:
        CheckpointError: the folder does not exist or is not a folder.
        DataError: a number is out of its range, or the dtype is unknown.
    """
    check_model_folder(args.folder)
    _check_task_arguments(args)
    for option, value in (("--seq-len", args.seq_len), ("--batch-size", args.batch_size), ("--limit", args.limit)):
        if value is not None and not 1 <= value < 2**31:
            raise DataError(f"{option} {value} is out of range.", fix="give 1 or more.")
    if args.dtype not in (None, "float32", "bfloat16"):
        raise DataError(f"--dtype {args.dtype}: unknown type.", fix="use float32 or bfloat16.")


def _check_task_arguments(args: argparse.Namespace) -> None:
    """Raise unless either files or tasks are given, and the extra for tasks is there."""
    if bool(args.data) == bool(args.tasks):
        what = "both are" if args.data else "neither is"
        raise DataError(
            f"`trellax eval` computes the loss on --data or the scores of --tasks; {what} given.",
            fix="give one of the two.",
        )
    given = [name for name in ("num_fewshot", "limit") if getattr(args, name) is not None]
    if args.data and given:
        raise DataError(f"--{given[0].replace('_', '-')} is for --tasks.", fix="leave it out.")
    if args.num_fewshot is not None and not 0 <= args.num_fewshot < 1000:
        raise DataError(f"--num-fewshot {args.num_fewshot} is out of range.", fix="give a number from 0 to 999.")
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        raise DataError("--tasks needs lm-evaluation-harness.", fix="pip install 'trellax[eval]'.")
