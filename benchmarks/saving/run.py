"""Measure how long a checkpoint blocks the training loop, and how much CPU time it takes from the steps.

Command:  python benchmarks/saving/run.py [--pairs 4]
Hardware: 2 CPU cores, 4 GB.  Time: about 3 minutes.

It runs blocks of 20 quickstart steps. Every other block begins with a save, as `train` makes it, which goes on while
the steps run. Fake devices keep all cores busy, so a save takes its CPU time from the steps. The cost is the CPU
seconds of a save alone over those of 20 steps; unlike wall time, it hardly depends on other programs on the machine.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace

import jax
import numpy as np
from trellax.configs import load_config
from trellax.train import Batches, Checkpoints, Setup, TrainState, load_corpus, make_train_step, prepare

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4, help="pairs of blocks")
    pairs = parser.parse_args().pairs
    setup = prepare(load_config("quickstart"))
    config, tokens = setup.config, load_corpus(setup.config.data).train
    batches = Batches(
        tokens, seq_len=config.data.seq_len, batch_size=32, microbatches=config.pipeline.microbatches, seed=0
    )
    placed = [jax.device_put(batches[index], setup.batch_sharding) for index in range(STEPS)]
    state, step = setup.init_state(), make_train_step(setup)
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=2) as checkpoints:
        state, _ = step(state, placed[0])
        # The first save compiles.
        checkpoints.save(state, setup)
        checkpoints.wait()
        walls, cpus, stalls = {True: [], False: []}, {True: [], False: []}, []
        for block in range(2 * pairs):
            saves = block % 2 == 1
            jax.block_until_ready(state)
            wall, cpu = time.perf_counter(), time.process_time()
            if saves:
                checkpoints.save(state, setup)
                stalls.append(time.perf_counter() - wall)
            for batch in placed:
                state, metrics = step(state, batch)
                metrics.loss.block_until_ready()
            walls[saves].append(time.perf_counter() - wall)
            cpus[saves].append(time.process_time() - cpu)
            checkpoints.wait()
        alone = [_time_save(checkpoints, replace(state, step=state.step + n), setup) for n in range(1, 11)]
    size = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(setup.shapes))
    print(f"state {size / 1e6:.1f} MB, {STEPS} steps a save, {pairs} pairs of blocks")
    report(walls, cpus, stalls=stalls, alone=alone)


def report(
    walls: dict[bool, list[float]], cpus: dict[bool, list[float]], *, stalls: list[float], alone: list[float]
) -> None:
    print(f"step without saves {statistics.median(walls[False]) / STEPS * 1e3:.0f} ms (median of blocks)")
    share = statistics.median(stalls) / statistics.median(walls[False])
    print(f"the loop stands still for {statistics.median(stalls) * 1e3:.0f} ms a save: {share:.1%} of {STEPS} steps")
    cost = statistics.median(alone) / statistics.median(cpus[False])
    print(f"a save alone takes {statistics.median(alone):.2f} CPU seconds: {cost:.1%} of those of {STEPS} steps")
    for name, times in (("wall time", walls), ("CPU time", cpus)):
        ratios = [with_save / without - 1 for with_save, without in zip(times[True], times[False], strict=True)]
        shown = ", ".join(f"{ratio:+.1%}" for ratio in ratios)
        print(f"{name} of a block with a save over one without: median {statistics.median(ratios):+.1%} ({shown})")


def _time_save(checkpoints: Checkpoints, state: TrainState, setup: Setup) -> float:
    cpu = time.process_time()
    checkpoints.save(state, setup)
    checkpoints.wait()
    return time.process_time() - cpu


if __name__ == "__main__":
    main()
