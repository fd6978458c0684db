"""Measure the overhead of trellax over plain Flax and over PyTorch's pipelining, on a CPU.

Command:  python benchmarks/overhead/run.py [--rounds 7] [--quick]

Three comparisons: trellax's layers on a 1x1x1 mesh against the same GPT in plain Flax, on the whole batch; its executor
with one stage against plain Flax with gradients accumulated over microbatches; and four stages against one device and,
where torch is installed, against `torch.distributed.pipelining` with four processes. The ways take turns, and medians
count. Fake devices share the cores, so pipeline bubbles are free, and CPU seconds are printed beside wall seconds. The
last results are in RESULTS.md.
"""

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.targets import Target
from benchmarks.workers.process import Worker

Times = dict[str, float]
Ways = Mapping[str, Callable[[], Times]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="m=8 alone")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    with ExitStack() as stack:
        flax = stack.enter_context(Worker("benchmarks.overhead.plain_flax", num_devices=1))
        stages = stack.enter_context(Worker("benchmarks.workers.train_step", num_devices=4))
        device = stack.enter_context(Worker("benchmarks.workers.train_step", num_devices=1))
        has_torch = importlib.util.find_spec("torch") is not None
        torch = stack.enter_context(Worker("benchmarks.overhead.torch_pipeline", num_devices=4)) if has_torch else None
        targets = [*measure_layers(flax, arguments.rounds), *measure_executor(flax, arguments.rounds)]
        for m in (8,) if arguments.quick else (8, 16):
            targets += measure_stages(stages, device, torch, m, arguments.rounds)
    for target in targets:
        print(f"{'met' if target.is_met else 'MISSED'}: {target.name}: {target.measured:.3f}, at most {target.limit:g}")
    return 0 if all(target.is_met for target in targets) else 1


def measure_layers(flax: Worker, rounds: int) -> list[Target]:
    """Compare the layers alone, on 16 sequences at once."""
    ways: Ways = {way: lambda way=way: flax.ask("step", way=way, num_microbatches=4) for way in ("layers", "plain")}
    times = take_turns("layers against plain Flax", ways, rounds)
    return judge("layers on 1x1x1 over plain Flax", times, "layers", "plain", 1.01)


def measure_executor(flax: Worker, rounds: int) -> list[Target]:
    """Compare the executor with one stage and 8 microbatches with plain accumulation."""
    names = ("executor", "plain_accumulation")
    ways: Ways = {way: lambda way=way: flax.ask("step", way=way, num_microbatches=8) for way in names}
    times = take_turns("executor with one stage against plain accumulation", ways, rounds)
    return judge("executor, one stage, m=8, over plain accumulation", times, *names, 1.03)


def measure_stages(stages: Worker, device: Worker, torch: Worker | None, m: int, rounds: int) -> list[Target]:
    """Compare four stages with one device, which accumulates or takes the full batch, and with torch."""
    ways: dict[str, Callable[[], Times]] = {
        "4 stages": lambda: stages.ask("step", num_microbatches=m, num_sequences=4),
        "one device, accumulation": lambda: device.ask("step", num_microbatches=m, num_sequences=4),
        "one device, full batch": lambda: device.ask("step", num_microbatches=1, num_sequences=4 * m),
    }
    if torch is not None:
        ways["torch, 4 processes"] = lambda: torch.ask("step", num_microbatches=m)
    times = take_turns(f"four stages, m={m}", ways, rounds)
    best = min(list(ways)[1:3], key=lambda way: median(times[way], "wall_s"))
    found = judge(f"4 stages over one device, m={m}", times, "4 stages", best, 0.99)
    if torch is not None:
        found += judge(f"4 stages over torch's pipelining, m={m}", times, "4 stages", "torch, 4 processes", 1.0)
    return found


def take_turns(title: str, ways: Ways, rounds: int) -> dict[str, list[Times]]:
    """Measure every way once per round, print a table, and return the times without those of the first round.

    Each round begins with another way, and the first round warms up. Every turn begins with a step that is not
    counted: a process is idle while the others run, and the system needs time to bring back memory that was not touched
    for seconds (0.2 to 0.6 s of a step here, more for more memory).
    """
    names, times = list(ways), {way: [] for way in ways}
    for turn in range(-1, rounds):
        print(f"{title}, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        start = turn % len(names)
        for way in (*names[start:], *names[:start]):
            ways[way]()
            measured = ways[way]()
            if turn >= 0:
                times[way].append(measured)
    print(f"\n**{title}: seconds, median (minimum) of {rounds} interleaved rounds**\n")
    print("| | wall | CPU |\n|---|---|---|")
    for way, own in times.items():
        cells = (f"{median(own, c):.3f} ({min(one[c] for one in own):.3f})" for c in ("wall_s", "cpu_s"))
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)
    return times


def judge(name: str, times: dict[str, list[Times]], ours: str, theirs: str, limit: float) -> list[Target]:
    """Compare the median of the ratios of each round with the limit: other load slows both ways of a round."""
    wall, cpu = (
        statistics.median(a[clock] / b[clock] for a, b in zip(times[ours], times[theirs], strict=True))
        for clock in ("wall_s", "cpu_s")
    )
    print(f"\n{name}: wall {wall:.3f}, CPU {cpu:.3f} (medians of the ratios in each round)")
    return [Target.at_most(f"{name}, wall", wall, limit)]


def median(own: list[Any], clock: str) -> float:
    return statistics.median(one[clock] for one in own)


if __name__ == "__main__":
    sys.exit(main())
