"""Compare the training loss in bfloat16 and in 8 bits with that in float32.

Command:  python benchmarks/precision/run.py [--steps N] [--seeds N] [--folder RUNS]
Time: two minutes or more per run on one core. With `--folder`, runs that were stopped continue.

It trains the quickstart model on one device in each precision, on the same batches, and compares the training loss in
windows of 20 steps with float32's. Any small change sends a run another way: float32 with a learning rate 0.1% higher
("nudged") shows how far apart two runs come by that alone, which is up to 1% on one seed. So curves are means over
seeds, printed with the standard error of their distance. In every window after the first, bfloat16 may differ by 1% and
fp8 by 2%. fp8 needs `trellax[quant]`.
"""

import argparse
import importlib.util
import io
import sys
import tempfile

import numpy as np
from rich.console import Console
from trellax.configs import load_config
from trellax.train import train
from trellax.train.metrics import read_metrics

BANDS = {"bfloat16": 0.01, "fp8": 0.02}
WINDOW = 20
SETTINGS = {
    "float32": "--model.dtype float32",
    "nudged": "--model.dtype float32 --optimizer.learning_rate 3.003e-3",
    "bfloat16": "--model.dtype bfloat16",
    "fp8": "--model.dtype bfloat16 --model.matmuls fp8",
}
ONE_DEVICE = "--run.fake_devices 1 --mesh.data 1 --mesh.tensor 1 --mesh.pipe 1 --train.log_every 1 --train.eval_every 0"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=6, help="number of runs of each")
    parser.add_argument("--folder", help="of the runs, to keep them and to go on")
    arguments = parser.parse_args()
    steps = arguments.steps
    if steps < 2 * WINDOW or arguments.seeds < 1:
        parser.error(
            f"--steps {steps} --seeds {arguments.seeds}: two windows of {WINDOW} steps and a seed are the least."
        )
    names = [name for name in SETTINGS if name != "fp8" or importlib.util.find_spec("qwix")]
    with tempfile.TemporaryDirectory() as folder:
        where = arguments.folder or folder
        runs = {
            seed: {n: learn(n, seed=seed, steps=steps, folder=where) for n in names} for seed in range(arguments.seeds)
        }
    curves = {name: np.mean([own[name] for own in runs.values()], axis=0) for name in names}
    print("| steps | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for window in range(0, steps, 2 * WINDOW):
        print(
            f"| {window + 1}-{window + WINDOW} | " + " | ".join(f"{mean(curves[n], window):.4f}" for n in names) + " |"
        )
    verdicts = [judge(name, curves, runs) for name in names[1:]]
    if "fp8" not in names:
        print("MISSED: fp8 was not measured: pip install 'trellax[quant]'")
    return 0 if all(verdicts) and "fp8" in names else 1


def judge(name: str, curves: dict[str, np.ndarray], runs: dict[int, dict[str, np.ndarray]]) -> bool:
    """Print how far a precision is from float32, and return whether that is within its band."""
    band, gap = BANDS.get(name), distance(curves[name], curves["float32"])
    is_met = band is None or gap <= band
    allowed = "" if band is None else f", {band:.0%} allowed"
    verdict = "for scale" if band is None else "met" if is_met else "MISSED"
    print(f"{verdict}: {name} differs from float32 by {gap:.2%} at most{allowed}")
    ends = [signed_end(own[name], own["float32"]) for own in runs.values()]
    error = np.std(ends, ddof=1) / len(ends) ** 0.5 if len(ends) > 1 else np.nan
    print(f"  last window: {', '.join(f'{end:+.2%}' for end in ends)}; mean {np.mean(ends):+.2%} +- {error:.2%}")
    return is_met


def distance(curve: np.ndarray, other: np.ndarray) -> float:
    """Return the largest relative distance of a curve from the other in any window after the first."""
    return max(abs(mean(curve, start) / mean(other, start) - 1) for start in range(WINDOW, len(curve), WINDOW))


def signed_end(curve: np.ndarray, other: np.ndarray) -> float:
    """Return the relative distance of a curve from the other in the last window, with its sign."""
    last = len(curve) - WINDOW
    return mean(curve, last) / mean(other, last) - 1


def learn(name: str, *, seed: int, steps: int, folder: str) -> np.ndarray:
    """Train in one precision, and return the training loss of every step."""
    where = f"--run.folder {folder} --run.name {name}-{seed} --run.seed {seed} --checkpoint.every 50"
    config = load_config("quickstart", f"{ONE_DEVICE} {where} --train.steps {steps} {SETTINGS[name]}")
    train(config, console=Console(file=io.StringIO()))
    losses = [line["loss"] for line in read_metrics(config.run_folder) if "loss" in line]
    print(f"{name}, seed {seed}: {losses[0]:.4f} to {losses[-1]:.4f}", file=sys.stderr, flush=True)
    return np.array(losses)


def mean(curve: np.ndarray, start: int) -> float:
    return float(curve[start : start + WINDOW].mean())


if __name__ == "__main__":
    sys.exit(main())
