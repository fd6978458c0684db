"""Measure how long a checkpoint blocks the training loop, and how much CPU time it takes from the steps.

Command:  python benchmarks/saving/run.py [--quick] [--json] [--pairs 4]
Time: about 3 minutes on two cores, 1 with --quick.

It runs blocks of 20 quickstart steps. Every other block begins with a save, as `train` makes it, which goes on while
the steps run. Fake devices keep all cores busy, so a save takes its CPU time from the steps. The cost is the CPU
seconds of a save alone over those of 20 steps; unlike wall time, it hardly depends on other programs on the machine.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from trellax.configs import load_config
from trellax.train import Batches, Checkpoints, Setup, TrainState, load_corpus, make_train_step, prepare

from benchmarks.arguments import make_parser, parse_count
from benchmarks.tables import Rows, format_table

STEPS = 20
"""Number of training steps of a block."""

NUM_SAVES_ALONE = 10
"""Number of saves that are measured without steps beside them."""


@dataclass(frozen=True, kw_only=True)
class SavingTimes:
    """Seconds of each block, of the stall of the loop at each save, and of each save alone.

    `with_save` and `without_save` have a block (wall seconds, CPU seconds) for each pair.
    """

    state_bytes: int
    with_save: list[tuple[float, float]]
    without_save: list[tuple[float, float]]
    stall_s: list[float]
    alone_cpu_s: list[float]


def main() -> None:
    parser = make_parser(__doc__, quick="one pair of blocks")
    parser.add_argument("--pairs", type=parse_count, help="number of pairs of blocks (default 4)")
    arguments = parser.parse_args()
    times = measure(num_pairs=arguments.pairs or (1 if arguments.quick else 4))
    print(json.dumps(asdict(times), indent=2)) if arguments.json else print_report(times)


def measure(*, num_pairs: int) -> SavingTimes:
    """Run pairs of blocks of quickstart steps, one without and one with a save, then saves alone."""
    setup = prepare(load_config("quickstart"))
    step, batches = make_train_step(setup), place_batches(setup)
    blocks: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    stalls: list[float] = []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=2) as checkpoints:
        state, _ = step(setup.init_state(), batches[0])
        # The first save compiles.
        checkpoints.save(state, setup)
        checkpoints.wait()
        for _ in range(num_pairs):
            for kind, own in blocks.items():
                jax.block_until_ready(state)
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                if kind == "with":
                    checkpoints.save(state, setup)
                    stalls.append(time.perf_counter() - wall_s)
                for batch in batches:
                    state, metrics = step(state, batch)
                    metrics.loss.block_until_ready()
                own.append((time.perf_counter() - wall_s, time.process_time() - cpu_s))
                checkpoints.wait()
        later = [replace(state, step=state.step + n) for n in range(1, NUM_SAVES_ALONE + 1)]
        alone = [time_save(checkpoints, one, setup) for one in later]
    return SavingTimes(
        state_bytes=sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(setup.shapes)),
        with_save=blocks["with"],
        without_save=blocks["without"],
        stall_s=stalls,
        alone_cpu_s=alone,
    )


def place_batches(setup: Setup) -> list[Any]:
    """Return the batches of a block on the devices."""
    config, tokens = setup.config, load_corpus(setup.config.data).train
    batches = Batches(
        tokens, seq_len=config.data.seq_len, batch_size=32, microbatches=config.pipeline.microbatches, seed=0
    )
    return [jax.device_put(batches[index], setup.batch_sharding) for index in range(STEPS)]


def time_save(checkpoints: Checkpoints, state: TrainState, setup: Setup) -> float:
    """Save a state, wait until it is on disk, and return the CPU seconds."""
    cpu_s = time.process_time()
    checkpoints.save(state, setup)
    checkpoints.wait()
    return time.process_time() - cpu_s


def print_report(times: SavingTimes) -> None:
    """Print the costs of a save in Markdown."""
    wall_s, cpu_s = (statistics.median(block[clock] for block in times.without_save) for clock in (0, 1))
    stall_s, alone_s = statistics.median(times.stall_s), statistics.median(times.alone_cpu_s)
    print(f"state {times.state_bytes / 1e6:.1f} MB, {STEPS} steps a save, {len(times.stall_s)} pairs of blocks")
    rows: Rows = [
        ("medians", "seconds", f"share of {STEPS} steps"),
        ("step without saves, wall", f"{wall_s / STEPS:.3f}", f"{1 / STEPS:.1%}"),
        ("stall of the loop at a save, wall", f"{stall_s:.3f}", f"{stall_s / wall_s:.1%}"),
        ("save alone, CPU", f"{alone_s:.3f}", f"{alone_s / cpu_s:.1%}"),
    ]
    print(format_table("Cost of a save", rows))
    print(format_table("A block with a save over one without", [("clock", "median", "by pair"), *ratio_rows(times)]))


def ratio_rows(times: SavingTimes) -> Rows:
    """Return the relative difference between the two blocks of each pair, by clock."""
    rows: Rows = []
    for clock, name in enumerate(("wall", "CPU")):
        pairs = zip(times.with_save, times.without_save, strict=True)
        ratios = [with_save[clock] / without[clock] - 1 for with_save, without in pairs]
        rows.append((name, f"{statistics.median(ratios):+.1%}", join_percents(ratios)))
    return rows


def join_percents(ratios: Sequence[float]) -> str:
    """Return relative differences as text."""
    return ", ".join(f"{ratio:+.1%}" for ratio in ratios)


if __name__ == "__main__":
    main()
