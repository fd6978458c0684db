"""Compare pipelined decoding with one group of requests in flight and with one group per stage.

Command:  python benchmarks/decode/run.py [--quick] [--json]
Time: about a minute on two cores.

A Llama of 8 layers and width 256 on 4 stages answers 200 requests of mixed lengths twice, in groups of 4 slots: first
with one group in flight, where three of the four stages wait at any time, and then with four groups. The benchmark
counts ticks, which is the time that real devices would take. Fake devices share the cores, so waiting costs them
nothing; the CPU seconds show that both runs do the same work. All programs are compiled before the requests arrive, and
compilations after that are counted too. With `--quick` the last requests, which leave groups empty, are a larger share:
the gain is 3.196, and the target for 200 requests, 3.2, is missed.

Tables go to stdout, progress to stderr. The exit code is 1 if a target is missed.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from trellax.layers import ModelConfig
from trellax.meshes import MeshSpec, build_mesh, use_fake_devices
from trellax.programs import compilations
from trellax.serve import Engine, Request
from trellax.serve.measure import draw_params

from benchmarks.arguments import make_parser
from benchmarks.rounds import tell
from benchmarks.tables import format_table
from benchmarks.targets import Target, exit_code, format_targets, print_json

STAGES, GROUP_SIZE, MAX_TOKENS = 4, 4, 128
MODEL = ModelConfig(
    vocab_size=512,
    num_layers=8,
    hidden_size=256,
    num_heads=8,
    num_kv_heads=4,
    max_tokens=MAX_TOKENS,
    mlp="swiglu",
    norm="rmsnorm",
    positions="rotary",
    bias="off",
)


def main() -> int:
    arguments = make_parser(__doc__, quick="40 requests instead of 200").parse_args()
    use_fake_devices(STAGES)
    requests = make_requests(40 if arguments.quick else 200)
    rows = [measure(groups, requests) for groups in (1, STAGES)]
    same = rows[0].pop("answers") == rows[1].pop("answers")
    targets = judge(*rows, is_same=same)
    report = {"about": {"cpu_cores": os.cpu_count(), "jax": jax.__version__, "requests": len(requests)}, "rows": rows}
    if arguments.json:
        print_json(report, targets)
    else:
        print_report(report, targets)
    return exit_code(targets)


def make_requests(count: int) -> list[Request]:
    """Return requests with prompts of 1 to 48 tokens and answers of 4 to 64."""
    rng = np.random.default_rng(0)
    return [
        Request(
            prompt=tuple(rng.integers(0, MODEL.vocab_size, int(rng.integers(1, 49))).tolist()),
            max_new_tokens=int(rng.integers(4, 65)),
        )
        for _ in range(count)
    ]


def measure(groups: int, requests: list[Request]) -> dict[str, Any]:
    """Answer all requests with `groups` groups in flight; return ticks, seconds, tokens and compilations."""
    tell(f"{groups} of {STAGES} groups")
    mesh = build_mesh(MeshSpec(pipe=STAGES))
    engine = Engine(
        MODEL,
        draw_params(MODEL, mesh),
        mesh=mesh,
        slots=groups * GROUP_SIZE,
        groups=groups,
        max_tokens=MAX_TOKENS,
        chunk=16,
        rounds=2,
    )
    engine.generate(requests[:2])
    before = engine.usage
    with compilations() as compiled:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        answers = engine.generate(requests)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    after = engine.usage
    ticks = after.decode_ticks - before.decode_ticks
    prefill_ticks = after.prefill_ticks - before.prefill_ticks
    tokens = sum(len(answer.tokens) for answer in answers) - len(requests)
    return {
        "answers": answers,
        "groups": groups,
        "decoded_tokens": tokens,
        "decode_ticks": ticks,
        "prefill_ticks": prefill_ticks,
        "tokens_per_tick": tokens / ticks,
        "idle_share": 1 - float((after.busy - before.busy).mean()) / (ticks + prefill_ticks),
        "busy_ticks": int((after.busy - before.busy).sum()),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "compiled": len(compiled),
    }


def judge(one: dict[str, Any], four: dict[str, Any], *, is_same: bool) -> list[Target]:
    """Compare the runs with one and with four groups in flight with the targets."""
    gain = four["tokens_per_tick"] / one["tokens_per_tick"]
    return [
        Target.at_most(f"ideal gain in tokens a tick, {STAGES}, over measured (1 / 0.8)", STAGES / gain, 1.25),
        Target.at_most("CPU seconds, four groups over one", four["cpu_s"] / one["cpu_s"], 1.1),
        Target.at_most("programs compiled while requests came", one["compiled"] + four["compiled"], 0),
        Target.at_most("answers that differ (1 if any)", float(not is_same), 0),
    ]


def print_report(report: dict[str, Any], targets: list[Target]) -> None:
    """Print the measurements and the verdicts in Markdown."""
    about, rows = report["about"], report["rows"]
    print(f"jax {about['jax']}, {about['cpu_cores']} cores, {about['requests']} requests on {STAGES} stages")
    names = {
        "decoded_tokens": "tokens decoded",
        "decode_ticks": "ticks of decoding",
        "prefill_ticks": "ticks of prefill",
        "tokens_per_tick": "tokens a tick",
        "idle_share": "idle share of all ticks",
        "busy_ticks": "stage runs",
        "wall_s": "seconds",
        "cpu_s": "CPU seconds",
        "compiled": "programs compiled",
    }
    table = [("what", *(f"{row['groups']} in flight" for row in rows))]
    for key, name in names.items():
        values = (f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for row in rows)
        table.append((name, *values))
    print(format_table("One group in flight and one per stage", table))
    print(format_targets(targets))


if __name__ == "__main__":
    sys.exit(main())
