"""What one GPU gives: `python benchmarks/gpu.py [--minutes 8] [--tiny] [--json FILE] [CASE ...]`.

A case is SHAPE@TOKENS, 1b@2048 say, with overrides of the config behind a comma: 1b@2048,pipeline.unroll=off. For each:
tokens a second, MFU with the causal half of the scores and with all of them, peak memory beside what `trellax inspect`
predicts, the profile by class, and the three largest losses against the roofline. Then the same model, batch and
precision under torch.compile, where torch is installed. Every measurement has a process of its own, one at a time: what
fails is said, and costs nothing else its result; the file has every case that was done, also if the command is ended.
Cases that the minutes do not reach are named, and 90 seconds after them nothing runs any more. `--tiny` runs all of it
on any CPU in a minute.

It needs `pip install -e '.[cuda]' torch`. To a machine without a network that has Python 3.12, jax (0.11.2, say) with
its CUDA plugin, torch, and what these and orbax bring, the rest is carried, 10 MB of wheels in .whl:

    P="--only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64
       --platform manylinux2014_x86_64 -d .whl"
    pip download $P 'pydantic>=2.12,<3'
    pip download $P --no-deps flax optax orbax-checkpoint grain array-record portpicker protobuf tensorboardX

and there, in the root of the repository, which need not be installed:

    pip install --no-index --no-deps --target .site .whl/*.whl
    PYTHONPATH=.src:.site python benchmarks/gpu.py --json $OUT/gpu.json

Where a command may take ten minutes, give it `--minutes 6`, and name in the next those cases that were not reached.
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

from gpu_shapes import SHAPES
from trellax.layers import ModelConfig, flops_per_token

CASES = (
    "1b@2048,pipeline.unroll=on",
    "1b@2048,pipeline.unroll=on,pipeline.remat=none",
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

GRACE_S = 90.0
"""What is still running so long after the minutes are over is ended."""

_GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case is begun after them")
    parser.add_argument("--steps", type=int, default=10, help="steps to time")
    parser.add_argument("--json", metavar="FILE", help="write all numbers")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to see that all of it runs")
    arguments = parser.parse_args()
    cases = arguments.cases or (("tiny@64,pipeline.unroll=on", "tiny@128") if arguments.tiny else CASES)
    for case in cases:
        name, _, seq_len = case.split(",")[0].partition("@")
        if name not in SHAPES or not seq_len.isdecimal():
            parser.error(f"{case!r} is no case: SHAPE@TOKENS, where SHAPE is one of {', '.join(SHAPES)}.")
    end_s, rows, torch_rows = time.monotonic() + 60 * arguments.minutes, [], {}
    with tempfile.TemporaryDirectory() as cache:
        for case in cases:
            if time.monotonic() > end_s:
                print(f"{case}: not measured, {arguments.minutes:g} minutes are over", flush=True)
                continue
            how = {"steps": arguments.steps, "tiny": arguments.tiny, "cache": cache, "end_s": end_s + GRACE_S}
            rows.append(measure(case, **how, torch_rows=torch_rows))
            print(describe(rows[-1]), flush=True)
            if arguments.json:
                # After every case: what is there is kept if a time limit ends the command.
                Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    verdicts = judge(rows, cases=cases)
    print("\n".join(text for text, _ in verdicts))
    return 0 if rows and all(is_met for _, is_met in verdicts) else 1


def measure(
    case: str, *, steps: int, tiny: bool, cache: str, end_s: float, torch_rows: dict[str, Any]
) -> dict[str, Any]:
    """Return what trellax and torch take for a case; torch once for each shape and length.

    Either has an "error" if it failed or was not done at `end_s` of the monotonic clock; the other is told even so.
    """
    what, *settings = case.split(",")
    name, _, seq_len = what.partition("@")
    overrides = [f"--{setting}" for setting in settings]
    environment = {**os.environ, "TRELLAX_CACHE": cache} | ({"JAX_PLATFORMS": "cpu"} if tiny else {})
    ours = _run("gpu_step.py", name, seq_len, str(steps), *overrides, environment=environment, end_s=end_s)
    if what not in torch_rows and importlib.util.find_spec("torch"):
        environment = {**os.environ} | ({"CUDA_VISIBLE_DEVICES": ""} if tiny else {})
        torch_rows[what] = _run("gpu_torch.py", name, seq_len, str(steps), environment=environment, end_s=end_s)
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
    if "peak_flops_per_s" not in ours:
        return {"tokens_per_s": tokens_per_s}
    causal, full = (
        tokens_per_s * flops_per_token(model, num_tokens=seq_len, attention=kind).training / ours["peak_flops_per_s"]
        for kind in ("causal", "full")
    )
    return {"tokens_per_s": tokens_per_s, "mfu_causal": causal, "mfu_full": full}


def describe(row: dict[str, Any]) -> str:
    """Return a case as text."""
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
    """What was found beside the time of a step; parts that failed are left out."""
    ours = row["trellax"]
    if "mfu_causal" in row:
        tflops = ours["peak_flops_per_s"] / 1e12
        yield f"  MFU {row['mfu_causal']:.1%} causal, {row['mfu_full']:.1%} full, of the measured {tflops:.1f} Tflop/s"
    peak = f"the allocator's peak {ours['peak_bytes'] / _GIB:.2f} GiB" if ours["peak_bytes"] else "no peak told"
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
    peer, ours = row["torch"], row["trellax"]
    if not peer or "error" in peer:
        return f"  torch: {peer['error'] if peer else 'not installed'}"
    text = f"  torch {peer['torch']}: {1e3 * peer['step_s']:.1f} ms a step"
    if "step_s" in ours:
        text += f", trellax is {peer['step_s'] / ours['step_s']:.2f} x as fast"
    return text + (f"; its peak {peer['peak_bytes'] / _GIB:.2f} GiB" if peer["peak_bytes"] else "")


def judge(rows: list[dict[str, Any]], *, cases: Sequence[str]) -> list[tuple[str, bool]]:
    """Return every promise with what was measured for it, and whether it is met; unmeasured is not met."""
    done = {row["case"] for row in rows if "error" not in row["trellax"]}
    verdicts = [(f"MISSED: {case} was not measured", False) for case in cases if case not in done]
    found = [row for row in rows if row["case"].startswith("1b@2048") and "step_s" in row["trellax"]]
    if not found:
        return verdicts or [("no promise is made for these cases", True)]
    best = min(found, key=lambda row: row["trellax"]["step_s"])
    peer = best["torch"] or {}
    ratio = peer["step_s"] / best["trellax"]["step_s"] if "step_s" in peer else None
    promises = [
        (f"MFU of {best['case']}", best.get("mfu_causal"), ENOUGH_MFU),
        ("speed over torch.compile", ratio, OVER_TORCH),
    ]
    for name, measured, least in promises:
        is_met = measured is not None and measured >= least
        told = "not measured" if measured is None else f"{measured:.3f}"
        verdicts.append((f"{'met' if is_met else 'MISSED'}: {name}: {told}, at least {least:g}", is_met))
    return verdicts


def _run(script: str, *words: str, environment: dict[str, str], end_s: float) -> dict[str, Any]:
    """Return the JSON of a worker's last line, or its error."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *words]
    limit_s = max(1.0, end_s - time.monotonic())
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"error": f"{script} was ended after {limit_s:.0f} s"}
    if done.returncode:
        return {"error": "\n".join(done.stderr.strip().splitlines()[-8:]) or f"{script} ended with {done.returncode}"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"{script} ended without an answer: {done.stdout[-200:]!r}"}


if __name__ == "__main__":
    sys.exit(main())
