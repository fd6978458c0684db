"""`trellax calibrate`: measure the devices at hand, and write a topology that `trellax plan` takes."""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime

from ...configs.run_config import load_config
from ...meshes import use_fake_devices
from ...meshes.build import visible_devices
from ...meshes.columns import align
from ...plan.calibration.measure import Measured, measure_devices
from ...plan.calibration.topology_file import figures_of, format_topology
from ...plan.machines.topology import read_topology
from ...train.prepare import prepare
from ...train.state import Setup
from ..output_file import write_output_file
from .measured_step import measure_step


def run_calibrate(args: argparse.Namespace) -> int:
    """Measure, write the file, print what was measured, and return the exit code.

    Raises:
        TrellaxError: the devices cannot be started, or the file cannot be written.
    """
    # First, since fake devices must be chosen before jax starts.
    if args.fake_devices:
        use_fake_devices(args.fake_devices)
    setup = _prepare(args) if args.config else None
    devices = visible_devices()
    found = measure_devices(devices, say=_say)
    figures = figures_of(devices, found)
    text = format_topology(figures, found, date=datetime.now(UTC).date().isoformat())
    write_output_file(args.file, text.encode())
    # What cannot be planned with is found here, not by the next command.
    topology = read_topology(args.file)
    step = measure_step(setup, topology=topology) if setup else None
    if args.json:
        told = asdict(step) | {"error": step.error} if step else None
        print(json.dumps({"topology": figures, "measured": [asdict(one) for one in found], "step": told}))
        return 0
    fake = ", which share this host's cores and memory" if devices[0].platform == "cpu" and len(devices) > 1 else ""
    print(f"{topology.num_devices} x {topology.accelerator.name}{fake}\n\n{_table(found)}")
    if step:
        told = f"{step.measured_s:.3g} s measured (range {step.spread:.0%}), {step.predicted_s:.3g} s predicted"
        print(f"\na step of {args.config}: {told}, {step.error:+.0%}")
    print(f"\ntrellax plan CONFIG --topology {args.file}")
    return 0


def _prepare(args: argparse.Namespace) -> Setup:
    """Return the setup of the config whose step is to be measured, on all devices."""
    fake = ["--run.fake_devices", str(args.fake_devices)] if args.fake_devices else []
    return prepare(load_config(args.config, fake))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _table(found: list[Measured]) -> str:
    rows = [("measured", "a second", "", "calls", "range")]
    for one in found:
        calls, spread = str(one.timed.calls), f"{one.timed.spread:.0%}"
        rows.append((one.name, f"{one.rate / 1e9:,.1f}", f"G{one.unit.removesuffix('/s')}", calls, spread))
    return align(rows)
