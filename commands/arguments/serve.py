"""Declare the arguments of `trellax serve`."""

import argparse
import importlib.util

from ...hub.folder import check_model_folder
from ...meshes.errors import ServeError
from .ema import add_ema_argument
from .engine import add_engine_arguments, add_speculate_arguments
from .processes import add_process_arguments
from .types import parse_path, parse_real, parse_whole


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "folder",
        type=parse_path,
        metavar="FOLDER",
        help="run folder of `trellax train`, or a Hugging Face model, or org/name of one in its cache",
    )
    parser.add_argument("--mesh", default="", metavar="SIZES", help="for example tensor=2,pipe=2 (default: one device)")
    _add_http_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument(
        "--silence",
        type=parse_whole,
        default=20,
        metavar="S",
        help="seconds without a sign of life after which a process counts as lost (default 20)",
    )
    add_ema_argument(parser)
    add_engine_arguments(parser)
    add_speculate_arguments(parser)
    parser.add_argument(
        "--slots", type=parse_whole, default=0, metavar="N", help="answers decoded at a time (default: 8 or more)"
    )
    parser.add_argument(
        "--max-tokens",
        type=parse_whole,
        default=0,
        metavar="N",
        help="cached tokens of an answer, with its prompt (default: what the model reads, at most 4096)",
    )
    parser.add_argument(
        "--cache-tokens",
        type=parse_whole,
        default=0,
        metavar="N",
        help="cached tokens of all answers together (default: slots x max-tokens)",
    )


def _add_http_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to bind (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=parse_whole, default=8000, metavar="N", help="port to bind; 0 takes a free one (default 8000)"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the model in requests (default: the folder's)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="key that requests must carry (default: the environment's TRELLAX_API_KEY, else none)",
    )
    parser.add_argument(
        "--chat-template", type=parse_path, metavar="FILE", help="Jinja template of chats (default: the model's)"
    )
    parser.add_argument(
        "--queue", type=parse_whole, default=64, metavar="N", help="answers that wait for a slot (default 64)"
    )
    parser.add_argument(
        "--max-body-bytes", type=parse_whole, default=4 << 20, metavar="N", help="longest request (default 4 MiB)"
    )
    parser.add_argument(
        "--timeout", type=parse_real, default=600.0, metavar="S", help="most seconds of an answer (default 600)"
    )


def check_serve_arguments(args: argparse.Namespace) -> None:
    """Check that the folder and the extra exist, before jax is imported.

    Raises:
        ServeError: packages of the extra `serve` are missing, or a number is out of its range.
        CheckpointError: the folder does not exist or is not a folder.
    """
    missing = [name for name in ("jinja2", "starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ServeError(f"`trellax serve` needs {', '.join(missing)}.", fix="pip install 'trellax[serve]'.")
    for option, value, (least, most) in (
        ("--port", args.port, (0, 65535)),
        ("--queue", args.queue, (0, 10**6)),
        ("--max-body-bytes", args.max_body_bytes, (1, 1 << 30)),
        ("--timeout", args.timeout, (1e-3, 1e6)),
        ("--silence", args.silence, (5, 50)),
    ):
        if not least <= value <= most:
            raise ServeError(f"{option} {value} is out of range.", fix=f"give a number from {least:,} to {most:,}.")
    check_model_folder(args.folder)
