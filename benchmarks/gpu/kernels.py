"""Check attention's kernels on a GPU against plain products in float32, time them, and time a conditional.

Command:  python benchmarks/gpu/kernels.py [--tiny] [--json]

Attention as the layers call it, by cuDNN on a GPU, is compared with scores and softmax written out in float32 with
exact products, on the same random inputs in bfloat16: output and gradients, by the norm of the difference over the
norm. XLA's blocks in bfloat16 are beside it, since rounding alone makes a difference too. Times are medians of
calls that the host waits for. A conditional is timed as a loop whose body chooses one of four branches by data, over
the loop without a choice. `--tiny` runs everything on a CPU, where both are XLA's blocks, without wide values.

Tables go to stdout. The exit code is 1 if a kernel is more than twice as far from float32 as XLA's blocks.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
from trellax.layers import ModelConfig
from trellax.layers.attention.blockwise import attend_blockwise
from trellax.layers.attention.flash import attend_causally, attend_fused

from benchmarks.arguments import make_parser
from benchmarks.rounds import tell
from benchmarks.tables import format_table
from benchmarks.targets import Target, exit_code, format_targets, print_json

CALLS = 10


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of an attention: H features of queries and keys, U of values; `causal=False` is a pair of chunks."""

    name: str
    b: int = 2
    t: int = 2048
    n: int = 16
    k: int = 8
    h: int = 128
    u: int = 128
    window: int = 0
    causal: bool = True
    sinks: bool = False


CASES = (
    Case(name="grouped queries"),
    Case(name="a window of 512", window=512),
    Case(name="sinks", sinks=True),
    Case(name="heads of 256", n=8, k=4, h=256, u=256),
    Case(name="heads of 256, a window of 512", n=8, k=4, h=256, u=256, window=512),
    Case(name="a pair of chunks", causal=False),
    Case(name="latent: keys 192, values 128", k=16, h=192),
)
"""As in Llama, Mistral, gpt-oss, Gemma, a rank of `context`, and DeepSeek."""

Attend = Callable[..., jax.Array]


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="sequences of 128 tokens on a CPU")
    arguments = parser.parse_args()
    if arguments.tiny:
        jax.config.update("jax_platforms", "cpu")
    cases = [replace(case, b=1, t=128, window=case.window // 16) for case in CASES] if arguments.tiny else CASES
    rows = [measure(case) for case in cases if can_run(case)]
    iterations = 100 if arguments.tiny else 1000
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "attention": rows,
        "conditional": measure_conditional(iterations),
    }
    targets = [
        Target.at_most(f"{row['name']}: difference over that of XLA's blocks", row["error"] / row["plain_error"], 2.0)
        for row in rows
    ]
    if arguments.json:
        print_json(report, targets)
    else:
        print_report(report)
        print(format_targets(targets))
    return exit_code(targets)


def can_run(case: Case) -> bool:
    """Return whether this device has a kernel for the case: XLA's blocks are causal, with values as wide as keys."""
    return jax.default_backend() == "gpu" or (case.causal and case.h == case.u)


def measure(case: Case) -> dict[str, Any]:
    """Return the differences from float32 and the milliseconds of a case, forward and with gradients."""
    tell(f"attention: {case.name}")
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = ((case.n, case.h), (case.k, case.h), (case.k, case.u), (case.n, case.u))
    q, k, v, grad = (
        jax.random.normal(key, (case.b, case.t, *size), jnp.bfloat16) for key, size in zip(keys[:4], sizes, strict=True)
    )
    more: dict[str, Any] = {"sinks_N": jax.random.normal(keys[4], (case.n,))} if case.sinks else {}
    exact = run(partial(attend_plainly, case=case, **more), *(leaf.astype(jnp.float32) for leaf in (q, k, v, grad)))
    own = choose_attention(case, more)
    plain = partial(attend_plainly, case=case, **more)
    if case.causal and case.h == case.u:
        plain = lambda q, k, v: attend_blockwise(q, k, v, case.window, **more)  # noqa: E731
    row = asdict(case) | {"error": difference(run(own, q, k, v, grad), exact)}
    row |= {"plain_error": difference(run(plain, q, k, v, grad), exact)}
    for name, attend in (("", own), ("plain_", plain)):
        row[f"{name}forward_ms"] = time_ms(jax.jit(attend), q, k, v)
        row[f"{name}ms"] = time_ms(partial(run, attend), q, k, v, grad)
    return row


def choose_attention(case: Case, more: dict[str, Any]) -> Attend:
    """Return the attention of the layers for a case: that of a model, or the kernel that a pair or wide keys take."""
    if not case.causal or case.h != case.u:
        return lambda q, k, v: attend_fused(q, k, v, window=case.window, causal=case.causal)
    config = ModelConfig(
        vocab_size=256,
        num_layers=1,
        hidden_size=case.n * case.h,
        num_heads=case.n,
        num_kv_heads=case.k,
        attention_window=case.window,
        dtype="bfloat16",
        max_tokens=case.t,
        positions="rotary",
    )
    return lambda q, k, v: attend_causally(q, k, v, config=config, **more)


def attend_plainly(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, *, case: Case, sinks_N: jax.Array | None = None
) -> jax.Array:
    """Compute attention with scores and softmax written out, in the dtype of q."""
    groups = case.n // case.k
    k_BSNH, v_BSNU = (jnp.repeat(leaf, groups, axis=2) for leaf in (k_BSKH, v_BSKU))
    how: dict[str, Any] = {"precision": "highest", "preferred_element_type": jnp.float32}
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, **how) * case.h**-0.5
    if case.causal:
        distance = jnp.arange(case.t)[:, None] - jnp.arange(case.t)[None]
        seen = (distance >= 0) & (distance < (case.window or case.t))
        scores_BNTS = jnp.where(seen[None, None], scores_BNTS, -jnp.inf)
    if sinks_N is not None:
        of_sinks = jnp.broadcast_to(sinks_N[None, :, None, None], (*scores_BNTS.shape[:3], 1))
        shares = jax.nn.softmax(jnp.concatenate([scores_BNTS, of_sinks], axis=-1), axis=-1)[..., :-1]
    else:
        shares = jax.nn.softmax(scores_BNTS, axis=-1)
    return jnp.einsum("bnts,bsnu->btnu", shares.astype(q_BTNH.dtype), v_BSNU, **how).astype(q_BTNH.dtype)


@partial(jax.jit, static_argnums=0)
def run(attend: Attend, q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
    """Return output and gradients of queries, keys and values."""
    y, backward = jax.vjp(attend, q, k, v)
    return (y, *backward(grad))


def difference(found: tuple[jax.Array, ...], exact: tuple[jax.Array, ...]) -> float:
    """Return the largest relative norm of a difference among output and gradients."""
    norms = [
        float(jnp.linalg.norm((one.astype(jnp.float32) - of).ravel()) / jnp.linalg.norm(of.ravel()))
        for one, of in zip(found, exact, strict=True)
    ]
    # A maximum would skip NaN.
    return max(norms) if all(map(math.isfinite, norms)) else math.inf


def measure_conditional(iterations: int) -> dict[str, float]:
    """Return microseconds of an iteration of a loop with and without a choice among four branches by data."""
    tell("a conditional in a loop")
    choices = jax.random.randint(jax.random.key(0), (iterations,), 0, 4)
    scales = jnp.asarray([0.5, 0.6, 0.7, 0.8])
    x = jax.random.normal(jax.random.key(1), (256, 256))

    @jax.jit
    def choose(x: jax.Array, choices: jax.Array) -> jax.Array:
        branches = [lambda x, scale=scale: jnp.sin(x * scale) for scale in (0.5, 0.6, 0.7, 0.8)]
        return jax.lax.scan(lambda x, choice: (jax.lax.switch(choice, branches, x), None), x, choices)[0]

    @jax.jit
    def scale(x: jax.Array, choices: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, choice: (jnp.sin(x * scales[choice]), None), x, choices)[0]

    found = {"choice_us": 1e3 * time_ms(choose, x, choices) / iterations}
    found |= {"plain_us": 1e3 * time_ms(scale, x, choices) / iterations}
    return found | {"conditional_us": found["choice_us"] - found["plain_us"]}


def time_ms(call: Callable[..., Any], *arguments: jax.Array) -> float:
    """Return the median milliseconds of a call, compiled before."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(CALLS):
        start_s = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - start_s)
    return 1e3 * statistics.median(times)


def print_report(report: dict[str, Any]) -> None:
    head = ("attention", "difference", "XLA's blocks", "forward, ms", "XLA", "with gradients, ms", "XLA")
    rows: list[tuple[str, ...]] = [head]
    for row in report["attention"]:
        times = [f"{row[name]:.2f}" for name in ("forward_ms", "plain_forward_ms", "ms", "plain_ms")]
        rows.append((row["name"], f"{row['error']:.1e}", f"{row['plain_error']:.1e}", *times))
    print(f"{report['device']}, jax {report['jax']}")
    print(format_table("Attention", rows))
    found = report["conditional"]
    print(
        f"\nAn iteration of a loop with a choice of four branches {found['choice_us']:.1f} us, without "
        f"{found['plain_us']:.1f}: a conditional takes {found['conditional_us']:.1f} us"
    )


if __name__ == "__main__":
    sys.exit(main())
