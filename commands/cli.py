"""The command line `trellax COMMAND ...`: parse the arguments, run the command, turn errors into exit codes.

Results go to stdout, everything else to stderr. Exit codes are listed in docs/reference/exit-codes.md. `<command>.py`
is imported only when the command runs, so help, --version and mistakes do not wait for jax.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ..meshes.errors import LostProcessError, TrellaxError, suggest
from ..meshes.terminal import fold, terminal_width
from .registry import COMMANDS, Command, find_command, import_function
from .standard_streams import EXIT_UNREAD, LostOutputError, guarded_outputs

if TYPE_CHECKING:
    from ..configs.run_config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the words after `trellax`; those of this process if left out.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with guarded_outputs():
        try:
            try:
                return _run_reporting(words)
            finally:
                sys.stdout.flush()
        except LostOutputError as lost:
            if lost.exit_code != EXIT_UNREAD:
                print(f"{lost}; the result is lost", file=sys.stderr)
            return lost.exit_code


def _run_reporting(words: Sequence[str]) -> int:
    """Run a command, and report user errors and interruptions on stderr; return the exit code."""
    try:
        return _run(words)
    except TrellaxError as error:
        print(fold(f"{type(error).__name__}: {error}", width=terminal_width(sys.stderr)), file=sys.stderr)
        if not isinstance(error, LostProcessError):
            return 2
        from ..train.processes.watchdog import EXIT_LOST

        return EXIT_LOST
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _run(words: Sequence[str]) -> int:
    own, overrides = _split_overrides(words)
    _check_command_name(own)
    args = _parse(own)
    command = find_command(args.command)
    if command.takes == "arguments" and overrides:
        raise TrellaxError(
            f"`trellax {command.name}` reads no config, so it takes no {overrides[0]}.",
            fix=f"see `trellax {command.name} --help`.",
        )
    # Cheapest first: reading a config takes 0.2 s, importing the module of `run` takes seconds.
    values = [_load_config(args, overrides)] if command.takes == "config" else []
    if command.check:
        import_function(command.check)(args)
    return import_function(command.run)(*values, args)


def _load_config(args: argparse.Namespace, overrides: Sequence[str]) -> "RunConfig":
    """Load the config, and keep its overrides as `args.overrides`."""
    from ..configs.run_config import load_config

    short = [] if args.fake_devices is None else ["--run.fake_devices", args.fake_devices]
    args.overrides = [*overrides, *short]
    return load_config(args.config, args.overrides)


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words into those that argparse knows and overrides, `--section.key value`."""
    own: list[str] = []
    overrides: list[str] = []
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            if word.startswith("--") and word.endswith("=--"):
                # argparse would take the value for an empty list.
                raise TrellaxError(f"{word}: a value is missing.", fix="see `trellax --help`.")
            own.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest and not rest[-1].startswith("--"):
            overrides.append(rest.pop())
    return own, overrides


def _check_command_name(words: Sequence[str]) -> None:
    names = [command.name for command in COMMANDS]
    if words and not words[0].startswith("-") and words[0] not in names:
        raise TrellaxError(
            f"unknown command {words[0]!r}; there are {', '.join(names)}.{suggest(words[0], names)}",
            fix="see `trellax --help`.",
        )


def _parse(words: Sequence[str]) -> argparse.Namespace:
    args, unknown = _make_parser(words).parse_known_args(words)
    if unknown:
        names = " ".join(word if word.strip() else repr(word) for word in unknown)
        raise TrellaxError(f"unrecognized arguments: {names}", fix=f"see `trellax {args.command} --help`.")
    return args


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are `TrellaxError`s."""

    def error(self, message: str) -> NoReturn:
        raise TrellaxError(message, fix=f"see `{self.prog} --help`.")


class _Version(argparse.Action):
    """Print the version, which is looked up only here, since that takes 50 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import importlib.metadata

        print(f"trellax {importlib.metadata.version('trellax')}")
        parser.exit()


def _make_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser of all commands, with the arguments of the one that the words name."""
    parser = _Parser(
        prog="trellax",
        allow_abbrev=False,
        description="Tensor and pipeline parallel transformers in JAX.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    asked = next((word for word in words if not word.startswith("-")), "")
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help}.",
            allow_abbrev=False,
        )
        if command.name == asked:
            _fill_subparser(subparser, command)
    return parser


def _fill_subparser(subparser: argparse.ArgumentParser, command: Command) -> None:
    import_function(command.arguments)(subparser)
    if command.takes == "config":
        from ..configs.run_config import render_help

        text = f"{command.help}.\n\nAny key of the config can be set as --section.key value."
        subparser.description = fold(text, width=terminal_width())
        subparser.epilog = render_help()
        subparser.formatter_class = argparse.RawDescriptionHelpFormatter


if __name__ == "__main__":
    sys.exit(main())
