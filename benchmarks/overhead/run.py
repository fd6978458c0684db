"""Measure the overhead of trellax over plain Flax and over PyTorch's pipelining, on a CPU.

Command:  python benchmarks/overhead/run.py [--rounds 7] [--quick] [--json]

Three comparisons: trellax's layers on a 1x1x1 mesh against the same GPT in plain Flax, on the whole batch; its executor
with one stage against plain Flax with gradients accumulated over microbatches; and four stages against one device and,
where torch is installed, against `torch.distributed.pipelining` with four processes. The ways take turns, and a target
is compared with the median of the ratios of each round, since other load slows both ways of a round. Fake devices share
the cores, so pipeline bubbles are free, and CPU seconds are printed beside wall seconds. The last results are in
RESULTS.md.
"""

import importlib.util
import os
import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.arguments import make_parser, parse_count
from benchmarks.rounds import Times, Ways, take_turns
from benchmarks.tables import format_table
from benchmarks.targets import Target, exit_code, format_targets, print_json
from benchmarks.workers.process import Worker


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two ways to do the same work, and the most that the first may take over the second."""

    name: str
    ours: str
    theirs: str
    limit: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Times of several ways to do the same work in interleaved rounds, and the pairs of them that are compared."""

    title: str
    times: Mapping[str, list[Times]]
    pairs: tuple[Pair, ...]

    @property
    def targets(self) -> list[Target]:
        """The targets for wall seconds."""
        return [Target.at_most(f"{pair.name}, wall", self.ratio_of(pair, "wall_s"), pair.limit) for pair in self.pairs]

    def ratio_of(self, pair: Pair, clock: str) -> float:
        """Return the median of the ratios of a pair's seconds in each round."""
        both = zip(self.times[pair.ours], self.times[pair.theirs], strict=True)
        return statistics.median(ours[clock] / theirs[clock] for ours, theirs in both)


def main() -> int:
    parser = make_parser(__doc__, quick="8 microbatches alone, not 16 too")
    parser.add_argument("--rounds", type=parse_count, default=7, help="number of rounds (default 7)")
    arguments = parser.parse_args()
    about = {"cpu_cores": os.cpu_count(), "load_before": os.getloadavg()[0], "rounds": arguments.rounds}
    comparisons = measure_all((8,) if arguments.quick else (8, 16), rounds=arguments.rounds)
    targets = [target for comparison in comparisons for target in comparison.targets]
    if arguments.json:
        times = {comparison.title: comparison.times for comparison in comparisons}
        print_json({"about": about, "times": times}, targets)
    else:
        print_report(about, comparisons, targets)
    return exit_code(targets)


def measure_all(counts: tuple[int, ...], *, rounds: int) -> list[Comparison]:
    """Return all comparisons, with four stages for each number of microbatches."""
    with ExitStack() as stack:
        flax = stack.enter_context(Worker("benchmarks.overhead.plain_flax", num_devices=1))
        stages = stack.enter_context(Worker("benchmarks.workers.train_step", num_devices=4))
        device = stack.enter_context(Worker("benchmarks.workers.train_step", num_devices=1))
        has_torch = importlib.util.find_spec("torch") is not None
        torch = stack.enter_context(Worker("benchmarks.overhead.torch_pipeline", num_devices=4)) if has_torch else None
        return [
            measure_layers(flax, rounds),
            measure_executor(flax, rounds),
            *(measure_stages(stages, device, torch, m, rounds) for m in counts),
        ]


def measure_layers(flax: Worker, rounds: int) -> Comparison:
    """Compare the layers alone, on 16 sequences at once."""
    ways: Ways = {way: lambda way=way: flax.ask("step", way=way, num_microbatches=4) for way in ("layers", "plain")}
    title = "layers against plain Flax"
    times = take_turns(ways, rounds=rounds, what=title, warm_up="every turn")
    pair = Pair(name="layers on 1x1x1 over plain Flax", ours="layers", theirs="plain", limit=1.01)
    return Comparison(title=title, times=times, pairs=(pair,))


def measure_executor(flax: Worker, rounds: int) -> Comparison:
    """Compare the executor with one stage and 8 microbatches with plain accumulation."""
    pair = Pair(
        name="executor, one stage, m=8, over plain accumulation",
        ours="executor",
        theirs="plain_accumulation",
        limit=1.03,
    )
    names = (pair.ours, pair.theirs)
    ways: Ways = {way: lambda way=way: flax.ask("step", way=way, num_microbatches=8) for way in names}
    title = "executor with one stage against plain accumulation"
    times = take_turns(ways, rounds=rounds, what=title, warm_up="every turn")
    return Comparison(title=title, times=times, pairs=(pair,))


def measure_stages(stages: Worker, device: Worker, torch: Worker | None, m: int, rounds: int) -> Comparison:
    """Compare four stages with one device, which accumulates or takes the full batch, and with torch."""
    one_device: Ways = {
        "one device, accumulation": lambda: device.ask("step", num_microbatches=m, num_sequences=4),
        "one device, full batch": lambda: device.ask("step", num_microbatches=1, num_sequences=4 * m),
    }
    ways = {"4 stages": lambda: stages.ask("step", num_microbatches=m, num_sequences=4), **one_device}
    if torch is not None:
        ways["torch, 4 processes"] = lambda: torch.ask("step", num_microbatches=m)
    title = f"four stages, m={m}"
    times = take_turns(ways, rounds=rounds, what=title, warm_up="every turn")
    best = min(one_device, key=lambda way: median_of(times[way], "wall_s"))
    pairs = [Pair(name=f"4 stages over one device, m={m}", ours="4 stages", theirs=best, limit=0.99)]
    if torch is not None:
        name = f"4 stages over torch's pipelining, m={m}"
        pairs.append(Pair(name=name, ours="4 stages", theirs="torch, 4 processes", limit=1.0))
    return Comparison(title=title, times=times, pairs=tuple(pairs))


def print_report(about: Mapping[str, Any], comparisons: list[Comparison], targets: list[Target]) -> None:
    """Print the times of all ways and the verdicts in Markdown."""
    print(f"{about['cpu_cores']} cores, load before {about['load_before']:.1f}")
    for comparison in comparisons:
        rows = [("way", "wall s", "CPU s")]
        for way, own in comparison.times.items():
            wall, cpu = (f"{median_of(own, c):.3f} ({min(one[c] for one in own):.3f})" for c in ("wall_s", "cpu_s"))
            rows.append((way, wall, cpu))
        title = f"{comparison.title}: median (minimum) of {about['rounds']} interleaved rounds"
        print(format_table(title, rows))
        for pair in comparison.pairs:
            wall, cpu = (comparison.ratio_of(pair, clock) for clock in ("wall_s", "cpu_s"))
            print(f"\n{pair.name}: wall {wall:.3f}, CPU {cpu:.3f} (medians of the ratios in each round)")
    print(format_targets(targets))


def median_of(own: list[Times], clock: str) -> float:
    """Return the median seconds of one clock."""
    return statistics.median(one[clock] for one in own)


if __name__ == "__main__":
    sys.exit(main())
