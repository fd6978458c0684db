"""`trellax inspect`: compile the training step of a config, for devices that need not exist, and report on it.

Read `serving/inspect.py` for the programs of a server.
"""

import argparse
import json
import resource

from ..configs.check import check_run
from ..configs.run_config import RunConfig
from ..layers.own.check_config import has_own_classes
from ..meshes import ConfigError, TargetError, build_mesh
from ..meshes.columns import align
from ..programs import Machine, ProgramReport, Target, draw_report, format_report, hlo_text, open_target
from ..programs.memory import judge_memory
from ..programs.report_tables import format_bytes
from ..train.state import Setup
from ..train.xla import MEMORY_FRACTION
from .inspect_advice import MemorySaving, list_memory_savings
from .inspect_step import compile_step, report_step, step_sizes
from .output_file import check_output_files, write_output_file
from .serving.inspect import run_inspect_serving

_MAX_SAVINGS = 5


def run_inspect(config: RunConfig, args: argparse.Namespace) -> int:
    """Compile the step, print the report, write the files asked for, and return the exit code.

    Raises:
        TrellaxError: the target is unknown, the config does not fit it, or the compiler rejects the step.
    """
    if args.serve:
        return run_inspect_serving(config, args, num_devices=_count_devices(config, Target.parse(args.target)))
    # Compiling may take minutes, so the output files are checked first.
    check_output_files(args.hlo, args.png)
    machine, setup = _prepare(config, Target.parse(args.target))
    compiled, compile_s = compile_step(setup, hardware=machine.hardware)
    report = report_step(
        compiled,
        setup,
        hardware=machine.hardware,
        devices_per_node=machine.devices_per_node,
        compile_s=compile_s,
    )
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        print(_describe_program(report, setup, machine), format_report(report), sep="\n\n")
        print(_describe_verdict(report, setup, machine), end="")
    if args.hlo:
        write_output_file(args.hlo, hlo_text(compiled).encode())
    if args.png:
        write_output_file(args.png, draw_report(report))
    return 0


def _prepare(config: RunConfig, target: Target) -> tuple[Machine, Setup]:
    """Return the devices of the target and the setup of the run on them; the config is checked first."""
    num_devices = _count_devices(config, target)
    # A module of the user's that the check imports may start jax, with devices that are not the target's.
    opened = open_target(target, num_devices=num_devices) if has_own_classes(config.model) else None
    spec = check_run(config, num_devices=num_devices)
    machine = opened or open_target(target, num_devices=num_devices)
    setup = Setup(config, build_mesh(spec, devices=machine.devices))
    setup.check()
    return machine, setup


def _count_devices(config: RunConfig, target: Target) -> int:
    """Return the number of devices of the target; by default what the mesh needs.

    Raises:
        TrellaxError: the mesh needs another number, or neither says how many.
    """
    sizes = config.mesh.sizes.values()
    needed = config.mesh.num_devices if -1 not in sizes else config.run.fake_devices
    num_devices = target.num_devices or needed
    if not num_devices:
        raise ConfigError(
            f"mesh {config.mesh} leaves an axis open, and target {target} does not say how many devices there are.",
            fix=f"write for example --target {target}:8.",
        )
    if needed and num_devices != needed and -1 not in sizes:
        raise TargetError(
            f"mesh {config.mesh} takes {needed} devices, but target {target} has {num_devices}.",
            fix=f"write --target {target.name}:{needed}, or --mesh.data -1 for all that are left.",
        )
    return num_devices


def _describe_program(report: ProgramReport, setup: Setup, machine: Machine) -> str:
    nodes = len(machine.devices) // machine.devices_per_node
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    schedule = setup.schedule
    return (
        f"target    {machine.hardware.name}: {report.devices} devices, {nodes} x {machine.devices_per_node}; "
        f"{setup.sizes}\n"
        f"schedule  {schedule.name}, {schedule.num_microbatches} microbatches, bubble {report.bubble_fraction:.1%}\n"
        f"compiled  in {report.compile_s:.1f} s, {report.hlo_instructions:,} instructions; this process took "
        f"{format_bytes(peak_bytes)}"
    )


def _describe_verdict(report: ProgramReport, setup: Setup, machine: Machine) -> str:
    """Return advice for a step that does not fit, and for one that needs more memory than `train` gives to jax."""
    memory = report.memory
    text = "" if memory.verdict == "fits" else f"\n{_describe_savings(report, setup)}\n"
    is_gpu = machine.devices[0].platform != "cpu"
    if is_gpu and MEMORY_FRACTION * machine.hardware.memory_bytes < memory.total <= machine.hardware.memory_bytes:
        text += (
            f"\ntrain lets jax take {MEMORY_FRACTION:.0%} of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says "
            "otherwise; this\nstep needs more.\n"
        )
    return text


def _describe_savings(report: ProgramReport, setup: Setup) -> str:
    sizes = step_sizes(setup)
    savings = list_memory_savings(setup.config, mesh=sizes.mesh, sizes=sizes, memory=report.memory)
    if not savings:
        return "no single change of microbatches, remat, ZeRO, tensor or pipe is estimated to save memory."
    lines = [
        ("what would help (estimated)", "saves", "then", "devices"),
        *(_row(k, report) for k in savings[:_MAX_SAVINGS]),
    ]
    return align(lines)


def _row(saving: MemorySaving, report: ProgramReport) -> tuple[str, ...]:
    total = report.memory.total - saving.saved_bytes
    memory = report.memory
    verdict = judge_memory(total, capacity=memory.capacity, limit=memory.limit) or "fits"
    return saving.overrides, format_bytes(saving.saved_bytes), f"{format_bytes(total)}, {verdict}", str(saving.devices)
