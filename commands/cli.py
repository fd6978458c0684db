"""The command line: `trellax train`, `describe`, `inspect` and `plan` of a CONFIG, and commands without one.

stdout is the result, stderr the talk. Exit codes: 0 done or stopped as asked, 1 a fault of ours or a damaged save, 2 a
mistake in what was asked or a run that cannot go on, 75 another process was lost, 130 interrupted, 141 nobody reads
stdout. A stdout that cannot be written is 1; a run is done without it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from ..meshes.errors import LostProcessError, TrellaxError, suggest
from ..meshes.terminal import fold, terminal_width
from ..train.outputs import EXIT_UNREAD, LostOutputError, guarded_outputs
from .argument_types import path, whole
from .command_arguments import add_inspect_arguments, add_plan_arguments, add_process_arguments

if TYPE_CHECKING:
    from ..configs.changes import Changes
    from ..configs.run_config import RunConfig
    from ..train.metrics import Summary
    from ..train.run_folder import Start

# What a command needs is imported by it: help, version and mistakes are answered without jax, in a tenth of the time.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with guarded_outputs():
        try:
            try:
                return _run(words)
            finally:
                sys.stdout.flush()
        except LostOutputError as lost:
            if lost.exit_code != EXIT_UNREAD:
                print(f"{lost}; the result is lost", file=sys.stderr)
            return lost.exit_code


def _run(words: Sequence[str]) -> int:
    try:
        own, overrides = _split_overrides(words)
        args = _parse(own)
        return _COMMANDS[args.command](args, overrides)
    except TrellaxError as error:
        print(fold(f"{type(error).__name__}: {error}", width=terminal_width(sys.stderr)), file=sys.stderr)
        if not isinstance(error, LostProcessError):
            return 2
        from ..train.processes.watch import EXIT_LOST

        return EXIT_LOST
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = _load(args, overrides)
    from ..meshes.processes.together import is_first
    from ..train.loop import train
    from ..train.metrics import summary_values
    from .processes import join_run

    start: Start = "resume" if not args.fresh else "replace" if args.force else "fresh"
    changes: Changes = "accept" if args.override else "refuse"
    with join_run(args, config, start=start, changes=changes):
        summary = train(config, start=start, changes=changes, profile_steps=args.profile)
    if not is_first():
        return 0
    try:
        print(json.dumps(summary_values(summary)) if args.json else _sum_up(summary), flush=True)
    except LostOutputError as lost:
        print(f"{lost}; all is in {summary.folder}", file=sys.stderr)
        # The result of a run is its folder; JSON was asked for by who reads it.
        return lost.exit_code if args.json else 0
    return 0


def _sum_up(summary: "Summary") -> str:
    from ..train.metrics import NO_SCHEDULE

    if summary.ended != "done":
        return (
            f"stopped by {summary.ended} after step {summary.steps}, saved in {summary.folder}; "
            "the same command goes on"
        )
    pace = f", {summary.tokens_per_s:,.0f} tokens/s" if summary.tokens_per_s else ""
    schedule = "" if summary.schedule == NO_SCHEDULE else f" with {summary.schedule}"
    return (
        f"{summary.steps} steps on {summary.mesh}{schedule} in {summary.wall_time_s:.0f} s{pace}\n"
        f"train loss {_loss_text(summary.final_train_loss)}   "
        f"validation loss {_loss_text(summary.final_val_loss)}\n"
        f"{summary.folder}: summary.json, metrics.jsonl, loss.png, tensorboard, checkpoints"
    )


def _loss_text(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"


def _describe(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = _load(args, overrides)
    from ..train.loop import prepare
    from ..train.report import describe

    report = describe(prepare(config), width=terminal_width())
    print(json.dumps(report.numbers) if args.json else report)
    return 0


def _inspect(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = _load(args, overrides)
    from .inspect import run_inspect

    return run_inspect(config, args)


def _plan(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = _load(args, overrides)
    if args.topology:
        # A mistake in it is told before all that a plan needs is imported.
        _import_from("..plan.machines.topology", "read_topology")(args.topology)
    from .plan import run_plan

    return run_plan(config, args, overrides=[*overrides, *_short_overrides(args)])


def _without_config(module: str, name: str) -> Callable[[argparse.Namespace, Sequence[str]], int]:
    def checked(args: argparse.Namespace, overrides: Sequence[str]) -> int:
        if overrides:
            what = f"`trellax {args.command}`"
            raise TrellaxError(
                f"{what} reads no config, so it takes no {overrides[0]}.", fix=f"see {what[:-1]} --help`."
            )
        return _import_from(module, name)(args)

    return checked


def _generate(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    if not overrides:
        # Told before all that a model needs is imported.
        _import_from("model_arguments", "check_generate_words")(args)
    return _without_config("generate", "run_generate")(args, overrides)


def _import_from(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(module if module.startswith(".") else f".{module}", __package__), name)


def _load(args: argparse.Namespace, overrides: Sequence[str]) -> "RunConfig":
    from ..configs.run_config import load_config

    return load_config(args.config, [*overrides, *_short_overrides(args)])


_COMMANDS: dict[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
    "train": _train,
    "describe": _describe,
    "inspect": _inspect,
    "plan": _plan,
    "schedule": _without_config("schedule", "run_schedule"),
    "import-hf": _without_config("import_hf", "run_import"),
    "export-hf": _without_config("export_hf", "run_export"),
    "generate": _generate,
    "bench-decode": _without_config("bench_decode", "run_bench_decode"),
    "checkpoints": _without_config("checkpoints", "run_checkpoints"),
}


def _parse(words: Sequence[str]) -> argparse.Namespace:
    args, unknown = _make_parser(words).parse_known_args(words)
    if unknown:
        names = " ".join(word if word.strip() else repr(word) for word in unknown)
        raise TrellaxError(
            f"unrecognized arguments: {names}", fix="see `trellax --help`, or `trellax train --help` for every key."
        )
    return args


class _Parser(argparse.ArgumentParser):
    """argparse, whose mistakes are ours: nearest names, exit code 2, no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise TrellaxError(message, fix="see `trellax --help`, or `trellax train --help` for every key.")


class _Version(argparse.Action):
    """Print the version, which takes long to find and is rarely asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import importlib.metadata

        print(f"trellax {importlib.metadata.version('trellax')}")
        parser.exit()


def _make_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of all commands, with the options of the one that the words begin with."""
    parser = _Parser(
        prog="trellax",
        allow_abbrev=False,
        description="Tensor and pipeline parallel transformers in JAX.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    asked = next((word for word in words if not word.startswith("-")), "")
    for name, what in _WITH_CONFIG.items():
        is_asked = name == asked
        command = commands.add_parser(
            name,
            help=what,
            description=fold(
                f"{what}.\n\nAny key of the config can be set as --section.key value.", width=terminal_width()
            ),
            epilog=_import_from("..configs.run_config", "render_help")() if is_asked else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if is_asked:
            _add_config_arguments(command, name)
    for name, (what, module, add_arguments) in _WITHOUT_CONFIG.items():
        command = commands.add_parser(name, help=what, description=f"{what}.", allow_abbrev=False)
        if name == asked:
            _import_from(module, add_arguments)(command)
    return parser


_WITH_CONFIG = {
    "train": "train a model as a config says, resuming where the last run stopped",
    "describe": "show mesh, shardings and schedule of a config without training",
    "inspect": "compile the step of a config for any machine and show what it keeps, sends and computes",
    "plan": "rank meshes, schedules and rematerialisation of a config on any machine, with reasons",
}

_WITHOUT_CONFIG = {
    "schedule": ("draw, save or compare pipeline schedules", "schedule_arguments", "add_schedule_arguments"),
    "checkpoints": (
        "list the saves of a run folder, with sizes; verify them",
        "checkpoints",
        "add_checkpoints_arguments",
    ),
    "import-hf": ("make a run folder of a Hugging Face model", "model_arguments", "add_import_arguments"),
    "export-hf": ("write the weights of a run folder for transformers", "model_arguments", "add_export_arguments"),
    "generate": ("answer prompts with a trained model, on any mesh", "model_arguments", "add_generate_arguments"),
    "bench-decode": (
        "time the answers of a model over meshes and batch sizes",
        "model_arguments",
        "add_bench_decode_arguments",
    ),
}


def _add_config_arguments(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument(
        "config", type=path, metavar="CONFIG", help="a TOML file, or the name of one that comes with trellax"
    )
    command.add_argument("--fake-devices", metavar="N", help="run on N fake CPU devices (run.fake_devices)")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    if name == "train":
        _add_train_arguments(command)
    if name == "inspect":
        add_inspect_arguments(command)
    if name == "plan":
        add_plan_arguments(command)


def _add_train_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--fresh", action="store_true", help="start over; refuses where something is saved")
    command.add_argument("--force", action="store_true", help="with --fresh: move what is saved into a folder beside")
    command.add_argument("--override", action="store_true", help="go on although the config differs in what matters")
    command.add_argument("--profile", metavar="N", type=_number_of_steps, default=0, help="trace N steps, once warm")
    add_process_arguments(command)


def _number_of_steps(text: str) -> int:
    """A number of steps; argparse turns the error into one of ours."""
    if not 0 < (steps := whole(text)) < 2**31:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return steps


def _short_overrides(args: argparse.Namespace) -> list[str]:
    return [] if args.fake_devices is None else ["--run.fake_devices", args.fake_devices]


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part `--section.key value` from the rest, which argparse knows."""
    own: list[str] = []
    overrides: list[str] = []
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            if word.startswith("--") and word.endswith("=--"):
                # argparse would make an empty list of it.
                raise TrellaxError(f"{word}: a value is missing.", fix="see `trellax --help`.")
            own.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest and not rest[-1].startswith("--"):
            overrides.append(rest.pop())
    if own and not own[0].startswith("-") and own[0] not in _COMMANDS:
        raise TrellaxError(
            f"unknown command {own[0]!r}; there are {', '.join(_COMMANDS)}.{suggest(own[0], _COMMANDS)}",
            fix="see `trellax --help`.",
        )
    return own, overrides


if __name__ == "__main__":
    sys.exit(main())
