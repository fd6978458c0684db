"""Declare the arguments of `trellax generate`."""

import argparse

from ...hub.folder import check_model_folder
from ...meshes.errors import ServeError
from .ema import add_ema_argument
from .engine import add_engine_arguments, add_speculate_arguments
from .types import parse_bias, parse_path, parse_real, parse_whole


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "folder",
        type=parse_path,
        metavar="FOLDER",
        help="run folder of `trellax train`, or a Hugging Face model, or org/name of one in its cache",
    )
    _add_prompt_arguments(parser)
    _add_chat_arguments(parser)
    _add_sampling_arguments(parser)
    parser.add_argument("--mesh", default="", metavar="SIZES", help="for example tensor=2,pipe=2 (default: one device)")
    add_ema_argument(parser)
    add_engine_arguments(parser)
    add_speculate_arguments(parser)
    parser.add_argument(
        "--slots", type=parse_whole, default=0, metavar="N", help="requests decoded at a time (default: at most 8)"
    )
    parser.add_argument(
        "--max-tokens",
        type=parse_whole,
        default=0,
        metavar="N",
        help="cached tokens of a request, prompt and answer (default: as many as needed; in a chat at most 4096)",
    )


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument("--prompts-file", type=parse_path, metavar="FILE", help="a text file, one prompt a line")
    parser.add_argument(
        "--max-new-tokens",
        type=parse_whole,
        metavar="N",
        help="most tokens of an answer (default 64; in a chat what --max-tokens leaves)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text that ends an answer; may be repeated"
    )


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat",
        action="store_true",
        help="a conversation: prompts are messages in turn; without any they are typed, or one is read from a pipe",
    )
    parser.add_argument("--system", metavar="TEXT", help="message of the system that begins a chat")
    parser.add_argument(
        "--chat-template", type=parse_path, metavar="FILE", help="Jinja template of chats (default: the model's)"
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature", type=parse_real, default=0.0, metavar="X", help="sampling temperature; 0 is greedy (default 0)"
    )
    parser.add_argument(
        "--top-k", type=parse_whole, default=0, metavar="K", help="sample from the K most likely tokens (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=parse_real,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens whose probabilities sum to P (default 1)",
    )
    parser.add_argument(
        "--min-p",
        type=parse_real,
        default=0.0,
        metavar="P",
        help="sample from tokens with at least P times the probability of the likeliest (default 0)",
    )
    _add_penalty_arguments(parser)
    parser.add_argument(
        "--json-schema", type=parse_path, metavar="FILE", help="answer in JSON that keeps to the schema in a file"
    )
    parser.add_argument("--regex", metavar="PATTERN", help="answer with a text that matches a regular expression")
    parser.add_argument(
        "--seed",
        type=parse_whole,
        default=0,
        metavar="N",
        help="seed of prompt 0; prompt i has N + i (default 0)",
    )


def _add_penalty_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repetition-penalty",
        type=parse_real,
        default=1.0,
        metavar="X",
        help="divide logits of tokens in prompt and answer by X (default 1, none)",
    )
    parser.add_argument(
        "--presence-penalty",
        type=parse_real,
        default=0.0,
        metavar="X",
        help="take X from the logits of tokens in the answer (default 0)",
    )
    parser.add_argument(
        "--frequency-penalty",
        type=parse_real,
        default=0.0,
        metavar="X",
        help="take X from the logits of tokens in the answer for each time (default 0)",
    )
    parser.add_argument(
        "--logit-bias",
        type=parse_bias,
        action="append",
        default=[],
        metavar="ID=X",
        help="add X to the logit of token ID; may be repeated",
    )
    parser.add_argument(
        "--logprobs",
        type=parse_whole,
        metavar="N",
        help="show log probabilities of the answer's tokens and of the N likeliest in their places",
    )


def check_generate_arguments(args: argparse.Namespace) -> None:
    """Check that there is a prompt and that the folder exists, before jax is imported.

    Raises:
        ServeError: no prompt is given, two forms of the answer, or what belongs to a chat without one.
        CheckpointError: the folder does not exist or is not a folder.
    """
    if not (args.prompt or args.prompts_file or args.chat):
        raise no_prompt()
    if args.json_schema is not None and args.regex is not None:
        raise ServeError("--json-schema and --regex both say what an answer looks like.", fix="give one of them.")
    for option, value in (("--system", args.system), ("--chat-template", args.chat_template)):
        if value is not None and not args.chat:
            raise ServeError(f"{option} belongs to a chat, and --chat is not given.", fix="add --chat.")
    check_model_folder(args.folder)


def no_prompt() -> ServeError:
    """Return the error for a command line, or a file of prompts, that has none."""
    return ServeError("there is no prompt.", fix='give --prompt "def main(" or --prompts-file FILE.')
