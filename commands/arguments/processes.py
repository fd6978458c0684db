"""Declare the arguments of a run with several processes."""

import argparse

START_S = 300
"""Default seconds that processes wait for each other to start."""


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --coordinator, --num-processes, --process-id and --start-timeout.

    Under SLURM and Open MPI the first three are read from the environment.
    """
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, for a run of many processes")
    parser.add_argument("--num-processes", metavar="N", help="number of processes")
    parser.add_argument("--process-id", metavar="I", help="index of this process, from 0")
    parser.add_argument(
        "--start-timeout", metavar="S", help=f"seconds to wait for the other processes to start (default {START_S})"
    )
