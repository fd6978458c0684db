"""`trellax describe`: print the mesh, shardings and schedule of a config; no array is allocated."""

import argparse
import json

from ..configs.run_config import RunConfig
from ..meshes.terminal import terminal_width
from ..train.prepare import prepare
from ..train.report import describe_run
from .serving.describe import run_describe_serving


def run_describe(config: RunConfig, args: argparse.Namespace) -> int:
    """Print the report of a run, and return the exit code.

    Raises:
        TrellaxError: the config does not fit itself or the devices.
    """
    if args.serve:
        return run_describe_serving(config, args)
    report = describe_run(prepare(config), width=terminal_width())
    print(json.dumps(report.numbers) if args.json else report)
    return 0
