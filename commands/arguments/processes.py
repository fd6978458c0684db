"""The arguments of a run of several processes."""

import argparse

START_S = 300
"""Seconds that processes wait for each other to start."""


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the address of process 0, the number of processes, the index of this one, and how long to wait for them.

    Under SLURM and Open MPI the first three are found in the environment.
    """
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, for a run of many processes")
    parser.add_argument("--num-processes", metavar="N", help="number of processes")
    parser.add_argument("--process-id", metavar="I", help="index of this process, from 0")
    parser.add_argument(
        "--start-timeout", metavar="S", help=f"seconds to wait for the other processes to start (default {START_S})"
    )
