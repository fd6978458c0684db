"""The call of cuDNN's kernel for wide heads and narrow values: what is around it here, its text where jax can compile.

The stand-in has the contract of the call: results with heads before tokens, a workspace, and a backward that reads sums
and output as the forward made them.
"""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from trellax.layers import ModelConfig
from trellax.layers.attention import flash, wide_heads
from trellax.layers.attention.blockwise import Limits
from trellax.layers.context.fused_tiles import FusedKernel
from trellax.layers.context.gathered import How, attend_gathered
from trellax.layers.context.places import order_chunks
from trellax.meshes import ModelError

from ...programs.test_cuda import clean_env, inspect
from ..sharded import differing, mesh_of, normal
from .test_flash import on_devices

B, T, N, K, H, U = 2, 32, 4, 2, 24, 16
"""Keys of 24 features and values of 16: no array has the shape of another by chance."""


def plain(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Attention by the definition, and the logarithms of its softmax's sums [B, N, T]."""
    k, v = (jnp.repeat(leaf, q.shape[2] // leaf.shape[2], axis=2) for leaf in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    behind = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None]
    seen = (behind >= 0) & (behind < window) if window else behind >= 0
    scores = jnp.where(seen[None, None], scores, -1e30) if causal else scores
    sums = jax.nn.logsumexp(scores, axis=-1)
    return jnp.einsum("bnts,bsnu->btnu", jnp.exp(scores - sums[..., None]), v), sums


def stand_in(target: str, kinds: Any, text: str, *operands: jax.Array) -> list[jax.Array]:
    """Compute what the text asks for, from and to arrays of the shapes that the kernel has."""
    asked = json.loads(text)["cudnn_fmha_backend_config"]
    how = {"window": asked["sliding_window_length"], "causal": asked["mask_type"] == "CAUSAL"}
    q, k, v, *rest = operands
    if target.endswith("Backward"):
        sums, grad, y = rest
        delta = jax.lax.stop_gradient((grad * y).sum(-1, keepdims=True))

        def of_all(*qkv: jax.Array) -> jax.Array:
            """A scalar whose gradients are those of attention in which these keys have a share, by the given sums."""
            mixed, own = plain(*qkv, **how)
            share = jnp.swapaxes(jnp.exp(own - sums), 1, 2)[..., None]
            return (share * (mixed * grad - delta / mixed.shape[-1])).sum()

        made = [jnp.swapaxes(leaf, 1, 2) for leaf in jax.grad(of_all, argnums=(0, 1, 2))(q, k, v)]
    else:
        mixed, sums = plain(q, k, v, **how)
        made = [jnp.swapaxes(mixed, 1, 2), sums]
    assert [leaf.shape for leaf in made] == [kind.shape for kind in kinds]
    return made


@pytest.fixture(autouse=True)
def _has_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_heads, "_call", stand_in)


def inputs() -> tuple[jax.Array, ...]:
    sizes = ((N, H), (K, H), (K, U), (N, U))
    return tuple(jnp.asarray(normal(B, T, *size, seed=seed)) for seed, size in enumerate(sizes))


def run(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> Any:
    y, vjp = jax.vjp(attend, q, k, v)
    return y, vjp(grad)


@pytest.mark.parametrize("window", [0, 5])
def test_values_narrower_than_keys_give_the_attention_and_gradients_of_the_definition(window: int) -> None:
    expected = run(lambda *qkv: plain(*qkv, window=window, causal=True)[0], *inputs())
    call = partial(wide_heads.attend_wide, window=window, causal=True)
    assert differing(run(call, *inputs()), expected) == {}
    # As training runs it, with the kernel's residuals kept by their name.
    kept = lambda *qkv: flash._attend_flash(*qkv, Limits(), window)  # noqa: E731
    assert differing(run(kept, *inputs()), expected) == {}


def test_context_ranks_run_it_for_pairs_of_chunks() -> None:
    attend = jax.shard_map(
        lambda *qkv: attend_gathered(*qkv, Limits(None), How(window=0, axes=("context",), kernel=FusedKernel())),
        mesh=mesh_of("context=4"),
        in_specs=P(None, "context"),
        out_specs=P(None, "context"),
    )
    ordered = [order_chunks(leaf, num_ranks=4, dim=1) for leaf in inputs()]
    found = jax.jit(partial(run, attend))(*ordered)
    expected = run(lambda *qkv: plain(*qkv, window=0, causal=True)[0], *inputs())
    assert differing(found, jax.tree.map(lambda leaf: order_chunks(leaf, num_ranks=4, dim=1), expected)) == {}


LATENT: dict[str, Any] = {"vocab_size": 64, "num_layers": 1, "hidden_size": 64, "num_heads": 1, "dtype": "bfloat16"}
LATENT |= {"latent_size": 32, "rope_head_size": 64, "head_size": 192, "positions": "rotary", "bias": "off"}


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("NVIDIA H200 141GB HBM3e", {}, "cudnn"),
        ("NVIDIA B200", {}, "cudnn"),
        ("NVIDIA A100-SXM4-80GB", {}, "xla"),
        ("NVIDIA H200 141GB HBM3e", {"value_head_size": 64}, "xla"),
        ("NVIDIA H200 141GB HBM3e", {"head_size": 264, "rope_head_size": 136}, "xla"),
    ],
)
def test_latents_are_fused_from_hopper_on(kind: str, changes: dict[str, Any], expected: str) -> None:
    with on_devices(kind):
        assert flash.choose_kernel(ModelConfig(**(LATENT | changes))) == expected


def test_wide_heads_on_older_gpus_are_refused(golden: Any) -> None:
    with on_devices("NVIDIA A100-SXM4-80GB"), pytest.raises(ModelError) as error:
        flash.choose_kernel(ModelConfig(**LATENT, attention="cudnn"))
    golden("errors/layers/attention_wide_heads_ampere.txt", str(error.value))


ROOT = Path(__file__).parents[3]
LOWER = """
import re, sys
import jax
from jax.sharding import PartitionSpec as P
from trellax.layers.attention.wide_heads import attend_wide
from trellax.meshes import MeshSpec, build_mesh
from trellax.programs.targets import Target, open_target
devices = open_target(Target(name="h200", num_devices=2), num_devices=2).devices
own = lambda q, k, v: attend_wide(q, k, v, {window}, True)
theirs = lambda q, k, v: jax.nn.dot_product_attention(
    q, k, v, is_causal=True, local_window_size=({window} - 1, 0) if {window} else None, implementation="cudnn")
def text_of(attend):
    step = lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g)
    mesh = build_mesh(MeshSpec(data=2), devices=devices)
    split = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    shape = lambda heads: jax.ShapeDtypeStruct((4, 256, heads, 64), "bfloat16")
    text = jax.jit(split).lower(shape(4), shape(2), shape(2), shape(4)).as_text()
    # Names of values and places in the source differ.
    return [re.sub(r"%\\w+|loc\\(.*\\)", "", line).strip() for line in text.splitlines() if "__cudnn" in line]
found = text_of(own)
assert len(found) == 2, found
assert found == text_of(theirs)
"""


@pytest.mark.cuda
@pytest.mark.parametrize("window", [0, 100])
def test_the_call_is_what_jax_makes_of_sizes_that_both_run(window: int) -> None:
    command = [sys.executable, "-c", LOWER.format(window=window)]
    done = subprocess.run(command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.cuda
def test_a_step_with_latents_runs_it_over_context(tmp_path: Path) -> None:
    sizes = "--model.num_heads 2 --model.num_kv_heads 2 --model.head_size 192 --model.value_head_size 128"
    sizes += " --model.latent_size 64 --model.rope_head_size 64 --model.positions rotary --model.bias off"
    tokens = "--model.dtype bfloat16 --model.max_tokens 1024 --data.seq_len 1024 --train.batch_size 8"
    mesh = "--mesh.data 1 --mesh.context 2 --mesh.tensor 2 --mesh.pipe 1 --pipeline.context_attention gather-once"
    inspect(f"quickstart h200:4 {mesh} {sizes} {tokens} --pipeline.microbatches 2", hlo=str(tmp_path / "step.hlo"))
    calls = re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', (tmp_path / "step.hlo").read_text())
    # On the diagonal, and in the loop over the other pairs of chunks.
    assert sorted(calls) == ["Softmax", "Softmax", "SoftmaxBackward", "SoftmaxBackward"]
