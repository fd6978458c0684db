"""List the commands of `trellax`, in the order of `trellax --help`.

A new command is one entry here, its arguments in `arguments/<command>.py` (which imports no jax), and its work in
`<command>.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its name, the line that help prints, and its functions.

    Functions are given as `module:function` within this package, like entry points, so that listing the commands
    imports none of them. `arguments` adds the arguments to a parser. `check` checks them before the module of `run` is
    imported.
    `run` is called as `run(config, args)` or `run(args)`, depending on `takes`.
    """

    name: str
    help: str
    takes: Literal["config", "arguments"] = "arguments"
    arguments: str
    check: str | None = None
    run: str


COMMANDS = (
    Command(
        name="train",
        help="train a model as a config says, resuming where the last run stopped",
        takes="config",
        arguments="arguments.train:add_train_arguments",
        run="train:run_train",
    ),
    Command(
        name="describe",
        help="show the mesh, shardings and schedule of a config without training",
        takes="config",
        arguments="arguments.describe:add_describe_arguments",
        check="arguments.served:check_served_arguments",
        run="describe:run_describe",
    ),
    Command(
        name="inspect",
        help="compile the training step of a config, or a server of it, for any machine, and report on it",
        takes="config",
        arguments="arguments.inspect:add_inspect_arguments",
        check="arguments.served:check_served_arguments",
        run="inspect:run_inspect",
    ),
    Command(
        name="plan",
        help="rank meshes, schedules and rematerialisation of a config on any machine, with reasons",
        takes="config",
        arguments="arguments.plan:add_plan_arguments",
        check="arguments.plan:check_plan_arguments",
        run="planning.plan:run_plan",
    ),
    Command(
        name="calibrate",
        help="measure products, copies and collectives of the devices at hand, for the planner",
        arguments="arguments.calibrate:add_calibrate_arguments",
        check="arguments.calibrate:check_calibrate_arguments",
        run="planning.calibrate:run_calibrate",
    ),
    Command(
        name="schedule",
        help="draw, save or compare pipeline schedules",
        arguments="arguments.schedule:add_schedule_arguments",
        check="arguments.schedule:check_schedule_arguments",
        run="schedule:run_schedule",
    ),
    Command(
        name="import-hf",
        help="make a run folder from a Hugging Face model",
        arguments="arguments.hugging_face:add_import_arguments",
        run="import_hf:run_import",
    ),
    Command(
        name="export-hf",
        help="write the weights of a run as a Hugging Face model",
        arguments="arguments.hugging_face:add_export_arguments",
        run="export_hf:run_export",
    ),
    Command(
        name="generate",
        help="answer prompts with a trained model, on any mesh",
        arguments="arguments.generate:add_generate_arguments",
        check="arguments.generate:check_generate_arguments",
        run="generate:run_generate",
    ),
    Command(
        name="serve",
        help="answer HTTP requests with a trained model, by OpenAI's API",
        arguments="arguments.serve:add_serve_arguments",
        check="arguments.serve:check_serve_arguments",
        run="serve:run_serve",
    ),
    Command(
        name="bench-decode",
        help="measure latency and throughput of decoding over meshes and batch sizes",
        arguments="arguments.bench_decode:add_bench_decode_arguments",
        run="bench_decode:run_bench_decode",
    ),
    Command(
        name="checkpoints",
        help="list the saves of a run folder with their sizes, and verify them",
        arguments="arguments.checkpoints:add_checkpoints_arguments",
        run="checkpoints:run_checkpoints",
    ),
    Command(
        name="runs",
        help="list runs with state, loss and speed, or compare some of them",
        arguments="arguments.runs:add_runs_arguments",
        check="arguments.runs:check_runs_arguments",
        run="experiments.list_runs:run_runs",
    ),
    Command(
        name="sweep",
        help="train a config with every combination of some keys, and compare the runs in a table",
        takes="config",
        arguments="arguments.runs:add_sweep_arguments",
        run="experiments.sweep:run_sweep",
    ),
    Command(
        name="eval",
        help="compute loss, perplexity and bits per byte of a model on files, on any mesh",
        arguments="arguments.evaluate:add_eval_arguments",
        check="arguments.evaluate:check_eval_arguments",
        run="data.evaluate:run_eval",
    ),
    Command(
        name="data",
        help="tokenize a corpus once into shards, or train a tokenizer on one",
        arguments="arguments.data:add_data_arguments",
        check="arguments.data:check_data_arguments",
        run="data.data:run_data",
    ),
)


def find_command(name: str) -> Command:
    """Return the command of this name, which must be one of `COMMANDS`."""
    return next(command for command in COMMANDS if command.name == name)


def import_function(entry: str) -> Callable[..., Any]:
    """Import the function that `module:function` names, the module relative to this package."""
    module, _, name = entry.partition(":")
    return getattr(import_module(f".{module}", __package__), name)
