"""What one GPU gives: `python benchmarks/gpu.py [--minutes 8] [--tiny] [--json FILE] [CASE ...]`.

A case is SHAPE@TOKENS, 1b@2048 say, with overrides of the config behind a comma: 1b@2048,pipeline.unroll=off. For each:
tokens a second, MFU with the causal half of the scores and with all of them, peak memory beside what `trellax inspect`
predicts, the profile by class, and the three largest losses against the roofline. Then the same model, batch and
precision under torch.compile, where torch is installed. Every measurement has a process of its own, one at a time.
Cases that the minutes do not reach are named. `--tiny` runs all of it on any CPU in a minute.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_shapes import SHAPES
from trellax.layers import ModelConfig, flops_per_token

CASES = (
    "1b@2048,pipeline.unroll=on",
    "1b@2048",
    "125m@2048,pipeline.unroll=on",
    "3b@2048,pipeline.unroll=on",
    "1b@4096,pipeline.unroll=on",
    "125m@4096,pipeline.unroll=on",
    "3b@4096,pipeline.unroll=on",
)
"""The most telling first."""

ENOUGH_MFU = 0.55
"""Of the measured matmul peak, causal, 1b@2048."""

OVER_TORCH = 1.05


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case is begun after them")
    parser.add_argument("--steps", type=int, default=10, help="steps to time")
    parser.add_argument("--json", metavar="FILE", help="write all numbers")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to see that all of it runs")
    arguments = parser.parse_args()
    cases = arguments.cases or (("tiny@64,pipeline.unroll=on", "tiny@128") if arguments.tiny else CASES)
    end_s, rows, torch_rows = time.monotonic() + 60 * arguments.minutes, [], {}
    with tempfile.TemporaryDirectory() as cache:
        for case in cases:
            if time.monotonic() > end_s:
                print(f"{case}: not measured, {arguments.minutes:g} minutes are over", flush=True)
                continue
            row = measure(case, steps=arguments.steps, tiny=arguments.tiny, cache=cache, torch_rows=torch_rows)
            rows.append(row)
            print(describe(row), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    verdicts = judge(rows)
    print("\n".join(text for text, _ in verdicts))
    return 0 if rows and all(is_met for _, is_met in verdicts) else 1


def measure(case: str, *, steps: int, tiny: bool, cache: str, torch_rows: dict[str, Any]) -> dict[str, Any]:
    """Return what trellax and torch take for a case; torch once for each shape and length."""
    what, *settings = case.split(",")
    name, _, seq_len = what.partition("@")
    overrides = [f"--{setting}" for setting in settings]
    environment = {**os.environ, "TRELLAX_GPU_CACHE": cache} | ({"JAX_PLATFORMS": "cpu"} if tiny else {})
    ours = _run("gpu_step.py", name, seq_len, str(steps), *overrides, environment=environment)
    if what not in torch_rows and importlib.util.find_spec("torch"):
        environment = {**os.environ} | ({"CUDA_VISIBLE_DEVICES": ""} if tiny else {})
        torch_rows[what] = _run("gpu_torch.py", name, seq_len, str(steps), environment=environment)
    return {"case": case, "trellax": ours, "torch": torch_rows.get(what)} | _derive(name, int(seq_len), ours)


def _derive(name: str, seq_len: int, ours: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second and the shares of the measured peak."""
    shape = SHAPES[name]
    if "error" in ours:
        return {}
    sizes = {key: getattr(shape, key) for key in ("vocab_size", "num_layers", "hidden_size", "num_heads")}
    model = ModelConfig(
        **sizes, num_kv_heads=shape.num_kv_heads, ffn_size=shape.ffn_size, mlp="swiglu", max_tokens=seq_len
    )
    tokens_per_s = shape.tokens / ours["step_s"]
    causal, full = (
        tokens_per_s * flops_per_token(model, num_tokens=seq_len, attention=kind).training / ours["peak_flops_per_s"]
        for kind in ("causal", "full")
    )
    return {"tokens_per_s": tokens_per_s, "mfu_causal": causal, "mfu_full": full}


def describe(row: dict[str, Any]) -> str:
    """Return a case as text."""
    ours, peer = row["trellax"], row["torch"]
    if "error" in ours:
        return f"\n{row['case']}: FAILED\n{ours['error']}"
    gib, step_ms, least_ms = 2**30, 1e3 * ours["step_s"], 1e3 * ours["step_min_s"]
    tflops = ours["peak_flops_per_s"] / 1e12
    peak = f"{ours['peak_bytes'] / gib:.2f} GiB" if ours["peak_bytes"] else "not told"
    lines = [
        f"\n{row['case']} on {ours['device']}, jax {ours['jax']}, compiled in {ours['compile_s']:.0f} s",
        f"  {row['tokens_per_s']:,.0f} tokens/s, {step_ms:.1f} ms a step (least {least_ms:.1f})",
        f"  MFU {row['mfu_causal']:.1%} causal, {row['mfu_full']:.1%} full, of the measured {tflops:.1f} Tflop/s",
        f"  memory: predicted {ours['predicted_bytes'] / gib:.2f} GiB, the allocator's peak {peak}",
        f"  roofline {1e3 * (ours['roofline_s'] or 0):.1f} ms; by class "
        + ", ".join(f"{kind} {1e3 * s:.1f} ms" for kind, s in ours["classes_s"].items()),
        *(
            f"  lost {one['ms'] - one['bound_ms']:.1f} ms: {one['ms']:.1f} where peaks allow {one['bound_ms']:.1f}: "
            f"{one['what']}"
            for one in ours["losses"]
        ),
    ]
    if peer and "error" not in peer:
        lines.append(
            f"  torch {peer['torch']}: {1e3 * peer['step_s']:.1f} ms a step, trellax is "
            f"{peer['step_s'] / ours['step_s']:.2f} x as fast"
            + (f"; its peak {peer['peak_bytes'] / gib:.2f} GiB" if peer["peak_bytes"] else "")
        )
    else:
        lines.append(f"  torch: {peer['error'] if peer else 'not installed'}")
    return "\n".join(lines)


def judge(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Return every promise with what was measured for it, and whether it is met."""
    found = [row for row in rows if row["case"].startswith("1b@2048") and "mfu_causal" in row]
    if not found:
        return [("no promise is made for these cases", all("error" not in row["trellax"] for row in rows))]
    best = max(found, key=lambda row: row["mfu_causal"])
    ratio = best["torch"]["step_s"] / best["trellax"]["step_s"] if best["torch"] and "step_s" in best["torch"] else None
    verdicts = [(f"MFU of {best['case']}: {best['mfu_causal']:.1%}, at least {ENOUGH_MFU:.0%}", ENOUGH_MFU)]
    met = [(text, best["mfu_causal"] >= limit) for text, limit in verdicts]
    if ratio is not None:
        met.append((f"speed over torch.compile: {ratio:.2f}, at least {OVER_TORCH}", ratio >= OVER_TORCH))
    return [(f"{'met' if is_met else 'MISSED'}: {text}", is_met) for text, is_met in met]


def _run(script: str, *words: str, environment: dict[str, str]) -> dict[str, Any]:
    """Return the JSON of a worker's last line, or its error."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": "\n".join(done.stderr.strip().splitlines()[-8:])}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
