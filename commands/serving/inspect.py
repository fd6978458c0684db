"""`trellax inspect --serve`: compile the programs of an engine for devices that need not exist, and report on them."""

import argparse
import json

from ...configs.run_config import RunConfig
from ...layers.own.check_config import has_own_classes
from ...meshes import ConfigError, ServeError, build_mesh
from ...programs import Machine, Target, hlo_text, open_target
from ...serve.inspection.report import ServeReport, inspect_serving
from ...serve.inspection.tables import format_serving, serving_numbers
from ..output_file import check_output_files, write_output_file
from .sizes import Served, served_by

_CONTEXT = 1024


def run_inspect_serving(config: RunConfig, args: argparse.Namespace, *, num_devices: int) -> int:
    """Compile prefill and decode, print the report, write the program of decode if asked for; return the exit code.

    Args:
        num_devices: those of the target.

    Raises:
        TrellaxError: the engine does not fit model or mesh, or the target is unknown.
    """
    if args.png:
        raise ConfigError("--png draws a training step.", fix="leave it out with --serve.")
    check_output_files(args.hlo)
    target = Target.parse(args.target)
    # A module of the user's that the check imports may start jax, with devices that are not the target's.
    opened = open_target(target, num_devices=num_devices) if has_own_classes(config.model) else None
    served = served_by(config, config.mesh.resolve(num_devices=num_devices), args)
    context = _check_context(args.context, served)
    machine = opened or open_target(target, num_devices=num_devices)
    report = inspect_serving(
        served.config,
        served.sizes,
        mesh=build_mesh(served.spec, devices=machine.devices),
        context=context,
        axes=served.spec.roles,
        cache_dtype=served.cache_dtype,
        weights=served.weights,
        hardware=machine.hardware,
        devices_per_node=machine.devices_per_node,
    )
    print(json.dumps(serving_numbers(report)) if args.json else _describe(report, served, machine))
    if args.hlo:
        write_output_file(args.hlo, hlo_text(report.compiled.programs.decode).encode())
    return 0


def _check_context(context: int, served: Served) -> int:
    most = served.sizes.max_tokens
    if not 0 <= context <= most:
        raise ServeError(
            f"--context {context} is not within a sequence of --max-tokens {most}.", fix=f"give 1 to {most}."
        )
    return context or min(_CONTEXT, most)


def _describe(report: ServeReport, served: Served, machine: Machine) -> str:
    sizes = served.sizes
    return (
        f"target    {machine.hardware.name}: {report.devices} devices; {served.spec}\n"
        f"engine    {sizes.slots} slots of {sizes.max_tokens:,} tokens in {sizes.groups} groups a data shard; weights "
        f"{served.weights}, cache {served.cache_dtype}\n"
        f"compiled  in {report.compiled.compile_s:.1f} s\n\n{format_serving(report)}"
    )
