"""Which kernel runs attention, and that what is around the fused one is right: blocks, gradients, what is kept.

cuDNN runs on GPUs alone, so here a stand-in has its contract: the same shapes in and out, the same five residuals.
`tests/programs/test_cuda.py` compiles the real one.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from trellax.layers import Block, ModelConfig, Remat, Transformer, activation_bytes
from trellax.layers.attention import flash
from trellax.layers.block import rematerialize
from trellax.meshes import MeshSpec, ModelError

from ...pipeline.plain_vjp import plan_plain
from ..sharded import differing, mesh_of, normal, place, small_config

B, T, H = 4, 8, 16


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def stand_in(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    return plain(q, k, v, window)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    seen = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=seen)


def forward(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> tuple[jax.Array, Any]:
    y = plain(q, k, v, window)
    return y, (q, k, v, jnp.zeros((0,), q.dtype), jnp.einsum("btnh->bnt", y), y)


def backward(window: int, saved: Any, grad: jax.Array) -> Any:
    q, k, v, _, stats, y = saved
    # What is kept must come back as it was: a wrong order or block makes this NaN.
    is_same = jnp.abs(stats - jnp.einsum("btnh->bnt", y)).max() < 1e-4
    return jax.tree.map(
        lambda g: jnp.where(is_same, g, jnp.nan), jax.vjp(partial(plain, window=window), q, k, v)[1](grad)
    )


stand_in.defvjp(forward, backward)


@pytest.fixture
def has_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "choose_kernel", lambda _: "cudnn")
    monkeypatch.setattr(flash, "attend_fused", lambda q, k, v, *, window: stand_in(q, k, v, window))


@pytest.mark.usefixtures("has_flash")
@pytest.mark.parametrize(
    ("mesh", "kv_heads", "window"), [("data=2,tensor=4", 4, 0), ("tensor=1", 2, 3), ("data=4", 8, 0)]
)
def test_blocks_of_the_kernel_and_their_gradients_equal_attention_as_a_whole(
    mesh: str, kv_heads: int, window: int
) -> None:
    config, devices = small_config(num_kv_heads=kv_heads, attention_window=window), mesh_of(mesh)
    q, k, v, grad = (jnp.asarray(normal(B, T, n, H, seed=s)) for s, n in enumerate((8, kv_heads, kv_heads, 8)))

    def run(attend: Any, *qkv: jax.Array) -> Any:
        y, vjp = jax.vjp(attend, *qkv)
        return y, vjp(jnp.asarray(grad))

    expected = run(partial(plain, window=window), q, k, v)
    with jax.set_mesh(devices):
        qkv = [place(x, ("batch", None, "heads", None), mesh=devices) for x in map(np.asarray, (q, k, v))]
        actual = jax.jit(partial(run, partial(flash.attend_causally, config=config)))(*qkv)
    assert differing(jax.device_get(actual), jax.device_get(expected)) == {}


LLAMA: dict[str, Any] = {"vocab_size": 64, "num_layers": 1, "hidden_size": 64, "num_heads": 1, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("NVIDIA H200 141GB HBM3e", {}, "cudnn"),
        ("NVIDIA H200 141GB HBM3e", {"attention": "xla"}, "xla"),
        ("NVIDIA H200 141GB HBM3e", {"dtype": "float32"}, "xla"),
        ("NVIDIA H200 141GB HBM3e", {"head_size": 20}, "xla"),
        ("NVIDIA H200 141GB HBM3e", {"head_size": 256}, "cudnn"),
        ("Tesla V100-SXM2-16GB", {}, "xla"),
        ("TPU v5", {}, "xla"),
    ],
)
def test_kernel_follows_the_devices_of_the_mesh(kind: str, changes: dict[str, Any], expected: str) -> None:
    with on_devices(kind):
        assert flash.choose_kernel(ModelConfig(**(LLAMA | changes))) == expected


def test_without_a_mesh_the_kernel_follows_jax() -> None:
    assert flash.choose_kernel(ModelConfig(**LLAMA)) == "xla"


@pytest.mark.usefixtures("has_flash")
def test_kernel_runs_without_a_mesh_too() -> None:
    config = small_config()
    model = Transformer(config, rngs=nnx.Rngs(0))
    logits = model(jnp.zeros((2, T), jnp.int32))
    assert np.isfinite(np.asarray(logits)).all()
    q = jnp.asarray(normal(B, T, 2, H))
    run = partial(flash.attend_causally, config=config)
    found, expected = (jax.grad(lambda q, f=f: f(q, q, q).sum())(q) for f in (run, partial(plain, window=0)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_cudnn_on_other_devices_is_refused(golden: Any) -> None:
    with on_devices("TPU v5"), pytest.raises(ModelError) as error:
        flash.choose_kernel(ModelConfig(**LLAMA, attention="cudnn"))
    golden("errors/layers/attention_kernel_devices.txt", str(error.value))


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"head_size": 20}, {"head_size": 264}])
def test_cudnn_for_a_dtype_or_head_size_that_it_lacks_is_refused(changes: dict[str, Any], golden: Any) -> None:
    with pytest.raises(ModelError) as error:
        ModelConfig(**(LLAMA | {"attention": "cudnn"} | changes))
    golden(f"errors/layers/attention_kernel_{'_'.join(map(str, *changes.items()))}.txt", str(error.value))


def on_devices(kind: str) -> Any:
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    sizes = MeshSpec().sizes
    axes = AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * 3, abstract_device=device)
    return jax.sharding.use_abstract_mesh(axes)


@pytest.mark.usefixtures("has_flash")
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_layers_keep_what_is_counted_and_dots_keep_what_the_kernel_made(remat: Remat, style: str) -> None:
    config = small_config(style, num_kv_heads=4)
    graph, params = nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))
    layer = rematerialize(lambda params, x, _: nnx.merge(graph, params)(x), remat)
    x = jnp.zeros((B, T, config.hidden_size))
    with jax.sharding.use_abstract_mesh(mesh_of("tensor=1").abstract_mesh):
        kept = plan_plain(layer, params, x, None).kept
    counted = activation_bytes(config, num_sequences=B, num_tokens=T, remat=remat)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) == counted.layer
    assert [leaf.shape for leaf in kept if leaf.ndim == 4 and leaf.shape[-2:] == (T, T)] == []


def test_without_cudnn_its_attention_says_what_to_install() -> None:
    # The real thing: jax asks for cuDNN's version while it traces, and the machines of these tests have none.
    q_BTNH = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    with pytest.raises(ModelError, match=r"whose library jax cannot use here: cuDNN(?s:.*)pip install"):
        jax.eval_shape(partial(flash.attend_fused, window=0), q_BTNH, q_BTNH, q_BTNH)
