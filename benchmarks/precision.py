"""Whether bfloat16 and eight bits learn what float32 learns: `python benchmarks/precision.py [--steps N] [--seeds N]`.

Trains the quickstart model on one device in each, on the same batches, and compares the training loss in windows of 20
steps with float32's. Rounding sends two runs different ways as another seed would, so curves are means over seeds. The
band is 1% for bfloat16 and 2% for fp8 in every window after the first. fp8 needs `trellax[quant]`. With `--folder` a
run that was stopped goes on.
"""

import argparse
import importlib.util
import io
import sys
import tempfile

import numpy as np
from rich.console import Console
from trellax.train import load_config, train
from trellax.train.metrics import read_metrics

BANDS = {"bfloat16": 0.01, "fp8": 0.02}
WINDOW = 20
SETTINGS = {
    "float32": "--model.dtype float32",
    "bfloat16": "--model.dtype bfloat16",
    "fp8": "--model.dtype bfloat16 --model.matmuls fp8",
}
ONE_DEVICE = "--run.fake_devices 1 --mesh.data 1 --mesh.tensor 1 --mesh.pipe 1 --train.log_every 1 --train.eval_every 0"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each")
    parser.add_argument("--folder", help="of the runs, to keep them and to go on")
    arguments = parser.parse_args()
    steps = arguments.steps
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
    is_met = True
    for name in names[1:]:
        gap = distance(curves[name], curves["float32"])
        is_met &= gap <= BANDS[name]
        verdict = "met" if gap <= BANDS[name] else "MISSED"
        print(f"{verdict}: {name} differs from float32 by {gap:.2%} at most, {BANDS[name]:.0%} allowed")
        single = ", ".join(f"{distance(own[name], own['float32']):.2%}" for own in runs.values())
        print(f"seed by seed: {single}")
    return 0 if is_met else 1


def distance(curve: np.ndarray, other: np.ndarray) -> float:
    """Return the largest distance of two curves in any window after the first, as a share of the other."""
    return max(abs(mean(curve, start) / mean(other, start) - 1) for start in range(WINDOW, len(curve), WINDOW))


def learn(name: str, *, seed: int, steps: int, folder: str) -> np.ndarray:
    """Return the training loss of every step."""
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
