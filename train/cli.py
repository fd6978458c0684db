"""The command line: `trellax train`, `describe`, `inspect` and `plan` of a CONFIG, and commands without one.

stdout is the result, stderr the talk. Exit codes: 0 done or stopped as asked, 1 a fault of ours or a damaged save, 2 a
mistake in what was asked or a run that cannot go on, 75 another process was lost, 130 interrupted, 141 nobody reads
stdout. A stdout that cannot be written is 1; a run is done without it.
"""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..meshes import LostProcessError, TrellaxError, suggest
from .argument_types import path, whole
from .bench_decode_command import add_bench_decode_arguments, run_bench_decode
from .changes import Changes
from .checkpoints_command import add_checkpoints_arguments, run_checkpoints
from .config import RunConfig, load_config, render_help
from .generate_command import add_generate_arguments, run_generate
from .hf_commands import add_export_arguments, add_import_arguments, run_export, run_import
from .inspect_command import add_inspect_arguments, run_inspect
from .loop import prepare, train
from .metrics import NO_SCHEDULE, Summary, summary_values
from .outputs import EXIT_UNREAD, LostOutputError, guarded_outputs
from .plan_command import add_plan_arguments, run_plan
from .processes import add_process_arguments, join_run
from .report import describe
from .run_folder import Start
from .schedule_arguments import add_schedule_arguments
from .schedule_command import run_schedule
from .together import is_first
from .watch import EXIT_LOST


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
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_LOST if isinstance(error, LostProcessError) else 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = _load(args, overrides)
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


def _sum_up(summary: Summary) -> str:
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
    report = describe(prepare(_load(args, overrides)))
    print(json.dumps(report.numbers) if args.json else report)
    return 0


def _inspect(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    return run_inspect(_load(args, overrides), args)


def _plan(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    words = [*overrides, *_short_overrides(args)]
    return run_plan(load_config(args.config, words), args, overrides=words)


def _without_config(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace, Sequence[str]], int]:
    def checked(args: argparse.Namespace, overrides: Sequence[str]) -> int:
        if overrides:
            what = f"`trellax {args.command}`"
            raise TrellaxError(
                f"{what} reads no config, so it takes no {overrides[0]}.", fix=f"see {what[:-1]} --help`."
            )
        return run(args)

    return checked


def _load(args: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    return load_config(args.config, [*overrides, *_short_overrides(args)])


_COMMANDS: dict[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
    "train": _train,
    "describe": _describe,
    "inspect": _inspect,
    "plan": _plan,
    "schedule": _without_config(run_schedule),
    "import-hf": _without_config(run_import),
    "export-hf": _without_config(run_export),
    "generate": _without_config(run_generate),
    "bench-decode": _without_config(run_bench_decode),
    "checkpoints": _without_config(run_checkpoints),
}


def _parse(words: Sequence[str]) -> argparse.Namespace:
    args, unknown = _make_parser().parse_known_args(words)
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


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trellax",
        allow_abbrev=False,
        description="Tensor and pipeline parallel transformers in JAX.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trellax {importlib.metadata.version('trellax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, what in (
        ("train", "train a model as a config says, resuming where the last run stopped"),
        ("describe", "show mesh, shardings and schedule of a config without training"),
        ("inspect", "compile the step of a config for any machine and show what it keeps, sends and computes"),
        ("plan", "rank meshes, schedules and rematerialisation of a config on any machine, with reasons"),
    ):
        command = commands.add_parser(
            name,
            help=what,
            description=f"{what}.\n\nAny key of the config can be set as --section.key value.",
            epilog=render_help(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
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
    _add_commands_without_config(commands)
    return parser


def _add_commands_without_config(commands: Any) -> None:
    for name, what, add_arguments in (
        ("schedule", "draw, save or compare pipeline schedules", add_schedule_arguments),
        ("checkpoints", "list the saves of a run folder, with sizes; verify them", add_checkpoints_arguments),
        ("import-hf", "make a run folder of a Hugging Face model", add_import_arguments),
        ("export-hf", "write the weights of a run folder for transformers", add_export_arguments),
        ("generate", "answer prompts with a trained model, on any mesh", add_generate_arguments),
        ("bench-decode", "time the answers of a model over meshes and batch sizes", add_bench_decode_arguments),
    ):
        add_arguments(commands.add_parser(name, help=what, description=f"{what}.", allow_abbrev=False))


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
