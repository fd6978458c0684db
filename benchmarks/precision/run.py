"""Compare the training loss in bfloat16 and in 8 bits with that in float32.

Command:  python benchmarks/precision/run.py [--quick] [--json] [--steps N] [--seeds N] [--folder RUNS]
Time: two minutes or more per run on one core, and there are 24 runs. With `--folder`, runs that were stopped continue.

It trains the quickstart model on one device in each precision, on the same batches, and compares the training loss in
windows of 20 steps with float32's. Any small change sends a run another way: float32 with a learning rate 0.1% higher
("nudged") shows how far apart two runs come by that alone, which is up to 1% on one seed. So curves are means over
seeds, printed with the standard error of their distance. In every window after the first, bfloat16 may differ by 1% and
fp8 by 2%; with `--quick`, one seed and 40 steps, that shows little. fp8 needs `trellax[quant]`. The exit code is 1 if a
target is missed or fp8 was not measured.
"""

import importlib.util
import io
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from rich.console import Console
from trellax.configs import load_config
from trellax.train import train
from trellax.train.metrics import read_metrics

from benchmarks.arguments import make_parser, parse_count
from benchmarks.rounds import tell
from benchmarks.tables import Rows, format_table
from benchmarks.targets import Target, exit_code, format_targets, print_json

LIMITS = {"bfloat16": 0.01, "fp8": 0.02}
"""Largest relative distance from the loss in float32, by precision."""

WINDOW = 20
"""Number of steps over which losses are averaged."""

SETTINGS = {
    "float32": "--model.dtype float32",
    "nudged": "--model.dtype float32 --optimizer.learning_rate 3.003e-3",
    "bfloat16": "--model.dtype bfloat16",
    "fp8": "--model.dtype bfloat16 --model.matmuls fp8",
}
ONE_DEVICE = "--run.fake_devices 1 --mesh.data 1 --mesh.tensor 1 --mesh.pipe 1 --train.log_every 1 --train.eval_every 0"

Curves = Mapping[str, np.ndarray]
"""Training loss of every step, [steps], by the name of a setting."""


def main() -> int:
    parser = make_parser(__doc__, quick="40 steps and one seed, to see that all of it runs")
    parser.add_argument("--steps", type=parse_count, help="steps of each run (default 300)")
    parser.add_argument("--seeds", type=parse_count, help="number of runs of each precision (default 6)")
    parser.add_argument("--folder", help="folder of the runs, to keep them and to continue stopped ones")
    arguments = parser.parse_args()
    steps = arguments.steps or (2 * WINDOW if arguments.quick else 300)
    num_seeds = arguments.seeds or (1 if arguments.quick else 6)
    if steps < 2 * WINDOW:
        parser.error(f"argument --steps: expected {2 * WINDOW} or more, two windows of {WINDOW} steps, got {steps}")
    runs = train_all(steps=steps, num_seeds=num_seeds, folder=arguments.folder)
    curves = {name: np.mean([own[name] for own in runs], axis=0) for name in runs[0]}
    targets = judge(curves)
    if arguments.json:
        losses = [{name: curve.tolist() for name, curve in own.items()} for own in runs]
        print_json({"steps": steps, "seeds": num_seeds, "losses": losses}, targets)
    else:
        print_report(curves, runs, targets)
    if "fp8" not in curves:
        tell("MISSED: fp8 was not measured: pip install 'trellax[quant]'")
        return 1
    return exit_code(targets)


def train_all(*, steps: int, num_seeds: int, folder: str | None) -> list[Curves]:
    """Train with every setting that can run here, and return the curves of each seed."""
    names = [name for name in SETTINGS if name != "fp8" or importlib.util.find_spec("qwix")]
    with tempfile.TemporaryDirectory() as temporary:
        where = folder or temporary
        return [
            {name: train_once(name, seed=seed, steps=steps, folder=where) for name in names}
            for seed in range(num_seeds)
        ]


def train_once(name: str, *, seed: int, steps: int, folder: str) -> np.ndarray:
    """Train with one setting, and return the training loss of every step, [steps]."""
    where = f"--run.folder {folder} --run.name {name}-{seed} --run.seed {seed} --checkpoint.every 50"
    config = load_config("quickstart", f"{ONE_DEVICE} {where} --train.steps {steps} {SETTINGS[name]}")
    train(config, console=Console(file=io.StringIO()))
    losses = [line["loss"] for line in read_metrics(config.run_folder) if "loss" in line]
    tell(f"{name}, seed {seed}: {losses[0]:.4f} to {losses[-1]:.4f}")
    return np.array(losses)


def judge(curves: Curves) -> list[Target]:
    """Compare the distance of each precision from float32 with its limit."""
    return [
        Target.at_most(
            f"{name} from float32, largest relative distance", distance(curves[name], curves["float32"]), limit
        )
        for name, limit in LIMITS.items()
        if name in curves
    ]


def print_report(curves: Curves, runs: list[Curves], targets: list[Target]) -> None:
    """Print the mean curves, the distances from float32 and the verdicts in Markdown."""
    losses: Rows = [("steps", *curves)]
    for start in range(0, len(curves["float32"]), 2 * WINDOW):
        means = (f"{window_mean(curve, start):.4f}" for curve in curves.values())
        losses.append((f"{start + 1}-{start + WINDOW}", *means))
    print(format_table("Training loss, means over steps and seeds", losses))
    print(format_table("Relative distance from float32", distance_rows(curves, runs)))
    print(format_targets(targets))


def distance_rows(curves: Curves, runs: list[Curves]) -> Rows:
    """Return the largest distance of each mean curve, and the distances of all seeds in the last window."""
    rows: Rows = [("precision", "largest", "last window, mean", "standard error", "by seed")]
    for name in list(curves)[1:]:
        ends = [last_distance(own[name], own["float32"]) for own in runs]
        error = f"{np.std(ends, ddof=1) / len(ends) ** 0.5:.2%}" if len(ends) > 1 else ""
        seeds = ", ".join(f"{end:+.2%}" for end in ends)
        largest = distance(curves[name], curves["float32"])
        rows.append((name, f"{largest:.2%}", f"{np.mean(ends):+.2%}", error, seeds))
    return rows


def distance(curve: np.ndarray, other: np.ndarray) -> float:
    """Return the largest relative distance of a curve from the other in any window after the first."""
    starts = range(WINDOW, len(curve), WINDOW)
    return max(abs(window_mean(curve, start) / window_mean(other, start) - 1) for start in starts)


def last_distance(curve: np.ndarray, other: np.ndarray) -> float:
    """Return the relative distance of a curve from the other in the last window, with its sign."""
    last = len(curve) - WINDOW
    return window_mean(curve, last) / window_mean(other, last) - 1


def window_mean(curve: np.ndarray, start: int) -> float:
    """Return the mean loss of the window that begins at a step."""
    return float(curve[start : start + WINDOW].mean())


if __name__ == "__main__":
    sys.exit(main())
