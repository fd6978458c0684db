"""Measure training steps on one GPU, against the roofline and against torch.compile.

Command:  python benchmarks/gpu/run.py [--minutes 8] [--tiny] [--json FILE] [CASE ...]

A case is SHAPE@TOKENS, such as 1b@2048, optionally with config overrides after a comma: 1b@2048,pipeline.unroll=off.
For each case the benchmark prints tokens per second, MFU with causal and with full attention scores, the peak memory
beside the prediction of `trellax inspect`, the profile by class, and the three largest losses against the roofline.
Then it runs the same model, batch and precision under torch.compile if torch is installed.

Every measurement runs in its own process, one at a time, so that a failure costs no other result. `--json FILE` writes
all numbers after every case, so that they survive an interrupted command. No case starts after `--minutes`, and 90
seconds later the last one is ended; cases that were not reached are named. `--tiny` runs everything on any CPU in a
minute.

It needs `pip install -e '.[cuda]' torch`. For a machine without a network that has Python 3.12, jax (such as 0.11.2)
with its CUDA plugin, torch, and their dependencies and those of orbax, download the rest, 10 MB of wheels, into .whl:

    P="--only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64
       --platform manylinux2014_x86_64 -d .whl"
    pip download $P 'pydantic>=2.12,<3'
    pip download $P --no-deps flax optax orbax-checkpoint grain array-record portpicker protobuf tensorboardX

On that machine, in the root of the repository, which need not be installed:

    pip install --no-index --no-deps --target .site .whl/*.whl
    PYTHONPATH=.src:.site python benchmarks/gpu/run.py --json $OUT/gpu.json

Where a command may take at most ten minutes, pass `--minutes 6` and name the cases that were not reached in the next.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from trellax.layers import ModelConfig, flops_per_token

from benchmarks.arguments import parse_count, parse_minutes
from benchmarks.gpu.shapes import SHAPES
from benchmarks.workers.process import find_modules

CASES = (
    "1b@2048,pipeline.unroll=on",
    "1b@2048,pipeline.unroll=on,pipeline.remat=none",
    "1b@2048",
    "125m@2048,pipeline.unroll=on",
    "8b@2048,pipeline.unroll=on",
    "3b@2048,pipeline.unroll=on",
    "1b@2048,pipeline.unroll=on,train.offload=optimizer",
    "1b@2048,pipeline.unroll=on,model.matmuls=fp8",
    "1b@4096,pipeline.unroll=on",
    "125m@4096,pipeline.unroll=on",
    "3b@4096,pipeline.unroll=on",
)
"""In order of importance, since the last ones may not be reached. "8b" has four of its 32 layers."""

ENOUGH_MFU = 0.60
"""Target for 1b@2048: causal MFU as a share of the measured matmul peak."""

OVER_TORCH = 1.1
"""Target for 1b@2048: speed over torch.compile."""

GRACE_S = 90.0
"""Seconds after `--minutes` at which a running measurement is ended."""

_GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="such as 1b@2048,pipeline.unroll=on")
    parser.add_argument(
        "--minutes", type=parse_minutes, default=8.0, help="minutes after which no case starts (default 8)"
    )
    parser.add_argument("--steps", type=parse_count, default=10, help="number of steps to time (default 10)")
    parser.add_argument("--json", metavar="FILE", help="file for all numbers")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to see that all of it runs")
    arguments = parser.parse_args()
    cases = arguments.cases or (("tiny@64,pipeline.unroll=on", "tiny@128") if arguments.tiny else CASES)
    for case in cases:
        name, _, seq_len = case.split(",")[0].partition("@")
        if name not in SHAPES or not seq_len.isdecimal():
            parser.error(f"argument CASE: expected SHAPE@TOKENS with a shape of {', '.join(SHAPES)}, got {case!r}")
    end_s, rows, torch_rows = time.monotonic() + 60 * arguments.minutes, [], {}
    with tempfile.TemporaryDirectory() as cache:
        for case in cases:
            if time.monotonic() > end_s:
                print(f"{case}: not measured, {arguments.minutes:g} minutes are over", flush=True)
                continue
            how = {"steps": arguments.steps, "tiny": arguments.tiny, "cache": cache, "end_s": end_s + GRACE_S}
            rows.append(measure(case, **how, torch_rows=torch_rows))
            print(describe_case(rows[-1]), flush=True)
            if arguments.json:
                # After every case, so that a time limit on the command loses none.
                Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    verdicts = judge(rows, cases=cases)
    print("\n".join(text for text, _ in verdicts))
    return 0 if rows and all(is_met for _, is_met in verdicts) else 1


def measure(
    case: str, *, steps: int, tiny: bool, cache: str, end_s: float, torch_rows: dict[str, Any]
) -> dict[str, Any]:
    """Measure trellax and torch on a case; torch runs once for each shape and length.

    The result of either has an "error" if it failed or was still running at `end_s` of the monotonic clock.
    """
    what, *settings = case.split(",")
    name, _, seq_len = what.partition("@")
    overrides = [f"--{setting}" for setting in settings]
    environment = {**os.environ, "TRELLAX_CACHE": cache} | ({"JAX_PLATFORMS": "cpu"} if tiny else {})
    ours = _run(
        "benchmarks.gpu.trellax_step", name, seq_len, str(steps), *overrides, environment=environment, end_s=end_s
    )
    if what not in torch_rows and importlib.util.find_spec("torch"):
        environment = {**os.environ} | ({"CUDA_VISIBLE_DEVICES": ""} if tiny else {})
        torch_rows[what] = _run(
            "benchmarks.gpu.torch_step", name, seq_len, str(steps), environment=environment, end_s=end_s
        )
    return {"case": case, "trellax": ours, "torch": torch_rows.get(what)} | _derive(name, int(seq_len), ours)


def _derive(name: str, seq_len: int, ours: dict[str, Any]) -> dict[str, Any]:
    """Return tokens per second and MFU as a share of the measured peak."""
    shape = SHAPES[name]
    if "error" in ours:
        return {}
    sizes = {key: getattr(shape, key) for key in ("vocab_size", "num_layers", "hidden_size", "num_heads")}
    model = ModelConfig(
        **sizes, num_kv_heads=shape.num_kv_heads, ffn_size=shape.ffn_size, mlp="swiglu", max_tokens=seq_len
    )
    tokens_per_s = shape.tokens / ours["step_s"]
    if "peak_flops_per_s" not in ours:
        return {"tokens_per_s": tokens_per_s}
    causal, full = (
        tokens_per_s * flops_per_token(model, num_tokens=seq_len, attention=kind).training / ours["peak_flops_per_s"]
        for kind in ("causal", "full")
    )
    return {"tokens_per_s": tokens_per_s, "mfu_causal": causal, "mfu_full": full}


def describe_case(row: dict[str, Any]) -> str:
    """Return the measurements of a case as text."""
    ours = row["trellax"]
    if "error" in ours:
        lines = [f"\n{row['case']}: FAILED", ours["error"]]
    else:
        step_ms, least_ms = 1e3 * ours["step_s"], 1e3 * ours["step_min_s"]
        lines = [
            f"\n{row['case']} on {ours['device']}, jax {ours['jax']}, compiled in {ours['compile_s']:.0f} s",
            f"  {row['tokens_per_s']:,.0f} tokens/s, {step_ms:.1f} ms a step (least {least_ms:.1f})",
            *_describe_parts(row),
            *(f"  no {part}: {error}" for part, error in ours["failed"].items()),
        ]
    return "\n".join([*lines, _describe_peer(row)])


def _describe_parts(row: dict[str, Any]) -> Iterator[str]:
    """Yield lines about MFU, memory, classes and losses; parts that failed are left out."""
    ours = row["trellax"]
    if "mfu_causal" in row:
        peak = f"{ours['peak_flops_per_s'] / 1e12:.1f} Tflop/s"
        yield f"  MFU {row['mfu_causal']:.1%} causal, {row['mfu_full']:.1%} full, of the measured {peak}"
    peak = f"the allocator's peak {ours['peak_bytes'] / _GIB:.2f} GiB" if ours["peak_bytes"] else "no peak reported"
    if "predicted_bytes" in ours:
        yield f"  memory: predicted {ours['predicted_bytes'] / _GIB:.2f} GiB, {peak}"
        yield f"  roofline {1e3 * (ours['roofline_s'] or 0):.1f} ms"
    else:
        yield f"  memory: {peak}"
    if "classes_s" in ours:
        yield "  by class " + ", ".join(f"{kind} {1e3 * s:.1f} ms" for kind, s in ours["classes_s"].items())
    for one in ours.get("losses", ()):
        lost_ms, bound_ms = one["ms"] - one["bound_ms"], one["bound_ms"]
        yield f"  lost {lost_ms:.1f} ms: {one['ms']:.1f} where peaks allow {bound_ms:.1f}: {one['what']}"


def _describe_peer(row: dict[str, Any]) -> str:
    """Return the line about torch."""
    peer, ours = row["torch"], row["trellax"]
    if not peer or "error" in peer:
        return f"  torch: {peer['error'] if peer else 'not installed'}"
    text = f"  torch {peer['torch']}: {1e3 * peer['step_s']:.1f} ms a step"
    if "step_s" in ours:
        text += f", trellax is {peer['step_s'] / ours['step_s']:.2f} x as fast"
    return text + (f"; its peak {peer['peak_bytes'] / _GIB:.2f} GiB" if peer["peak_bytes"] else "")


def judge(rows: list[dict[str, Any]], *, cases: Sequence[str]) -> list[tuple[str, bool]]:
    """Return a line for each target and whether it is met; a target that was not measured is not met."""
    done = {row["case"] for row in rows if "error" not in row["trellax"]}
    verdicts = [(f"MISSED: {case} was not measured", False) for case in cases if case not in done]
    found = [row for row in rows if row["case"].startswith("1b@2048") and "step_s" in row["trellax"]]
    if not found:
        return verdicts or [("these cases have no target", True)]
    best = min(found, key=lambda row: row["trellax"]["step_s"])
    peer = best["torch"] or {}
    ratio = peer["step_s"] / best["trellax"]["step_s"] if "step_s" in peer else None
    targets = [
        (f"MFU of {best['case']}", best.get("mfu_causal"), ENOUGH_MFU),
        ("speed over torch.compile", ratio, OVER_TORCH),
    ]
    for name, measured, least in targets:
        is_met = measured is not None and measured >= least
        number = "not measured" if measured is None else f"{measured:.3f}"
        verdicts.append((f"{'met' if is_met else 'MISSED'}: {name}: {number}, at least {least:g}", is_met))
    return verdicts


def _run(module: str, *words: str, environment: dict[str, str], end_s: float) -> dict[str, Any]:
    """Return the JSON in the last line that a worker prints, or its error."""
    command = [sys.executable, "-m", module, *words]
    limit_s = max(1.0, end_s - time.monotonic())
    try:
        done = subprocess.run(
            command, env=find_modules(environment), capture_output=True, text=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return {"error": f"{module} was ended after {limit_s:.0f} s"}
    if done.returncode:
        return {"error": "\n".join(done.stderr.strip().splitlines()[-8:]) or f"{module} ended with {done.returncode}"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"{module} ended without an answer: {done.stdout[-200:]!r}"}


if __name__ == "__main__":
    sys.exit(main())
