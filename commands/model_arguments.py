"""The options of commands that read a folder with a model in it, apart from what they do: help needs no jax."""

import argparse

from ..hub.architectures import ARCHITECTURES
from ..hub.folder import check_model_folder
from ..meshes.errors import ServeError
from .argument_types import number, path, whole


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.add_argument("folder", type=path, metavar="FOLDER", help="a run of `trellax train`, or a Hugging Face model")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts-file", type=path, metavar="FILE", help="a prompt on each line")
    parser.add_argument(
        "--max-new-tokens", type=whole, default=64, metavar="N", help="tokens of an answer at most (64)"
    )
    parser.add_argument("--temperature", type=number, default=0.0, metavar="X", help="0 takes the likeliest token (0)")
    parser.add_argument("--top-k", type=whole, default=0, metavar="K", help="draw among the K likeliest (0: all)")
    parser.add_argument("--top-p", type=number, default=1.0, metavar="P", help="draw among the likeliest of mass P (1)")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the first prompt; counted up from there")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a token that ends an answer, beside the model's own",
    )
    parser.add_argument("--mesh", default="", metavar="SIZES", help="tensor=2,pipe=2 say (one device)")
    _add_engine_arguments(parser)
    parser.add_argument("--slots", type=whole, default=0, metavar="N", help="prompts answered at a time (at most 8)")
    parser.add_argument(
        "--max-tokens", type=whole, default=0, metavar="N", help="of prompt and answer (what is needed)"
    )


def check_generate_words(args: argparse.Namespace) -> None:
    """Raise for the mistakes that need neither jax nor a model to be seen.

    Raises:
        ServeError: no prompt is given.
        CheckpointError: the folder is none.
    """
    if not (args.prompt or args.prompts_file):
        raise no_prompt()
    check_model_folder(args.folder)


def no_prompt() -> ServeError:
    """Return what is said where there is nothing to answer."""
    return ServeError("there is no prompt.", fix='give --prompt "def main(" or --prompts-file FILE.')


def add_bench_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.add_argument(
        "model", type=path, metavar="CONFIG_OR_FOLDER", help="random weights of a config, or a folder with a model"
    )
    parser.add_argument("--batch", default="1,4,16", metavar="N,N", help="requests at a time (1,4,16)")
    parser.add_argument("--meshes", default="data=1", metavar="M;M", help="tensor=4;pipe=4 say (one device)")
    parser.add_argument("--prompt-tokens", type=whole, default=32, metavar="N", help="read for each request (32)")
    parser.add_argument("--new-tokens", type=whole, default=32, metavar="N", help="written for each, 2 or more (32)")
    parser.add_argument("--png", metavar="FILE", help="draw latency against throughput")
    _add_engine_arguments(parser)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fake-devices", type=whole, default=0, metavar="N", help="run on N fake CPU devices")
    parser.add_argument("--dtype", metavar="T", help="float32 or bfloat16, to compute in (the model's)")
    parser.add_argument("--cache-dtype", metavar="T", help="float32 or bfloat16, of keys and values (the model's)")
    parser.add_argument("--chunk", type=whole, default=64, metavar="N", help="tokens of a prompt read at once (64)")
    parser.add_argument("--groups", type=whole, default=0, metavar="N", help="groups in flight (one for each stage)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.add_argument("source", type=path, metavar="DIR", help="folder with config.json and safetensors")
    parser.add_argument("out", type=path, metavar="OUT", help="run folder to make; must not be there yet")
    _add_shared_arguments(parser)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.add_argument("source", type=path, metavar="CHECKPOINT", help="run folder, as train or import-hf leaves it")
    parser.add_argument("out", type=path, metavar="OUT", help="folder to make; must not be there yet")
    parser.add_argument("--architecture", metavar="NAME", help=f"one of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the tensors (default model.dtype)")
    _add_shared_arguments(parser)


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", default="data=1", metavar="SIZES", help="split the weights, by tensor=2,pipe=2 say")
    parser.add_argument("--fake-devices", type=whole, metavar="N", help="on N fake CPU devices")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
