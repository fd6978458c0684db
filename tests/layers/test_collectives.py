"""Every verb inside `shard_map`: the type of its result, and what its transpose sends."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.layers import collectives as verbs
from trellax.meshes import DEFAULT_RULES, ShardingError, device_axes

from .sharded import collectives, differing, mesh_of, normal, place, text_of

TENSOR = ("tensor",)
WHOLE, BLOCK = P(), P(None, "tensor")
X = normal(4, 8)


def enter(x: jax.Array) -> jax.Array:
    return verbs.enter_split(x, device_axes.mark_varying(jnp.ones((8, 2)), TENSOR), TENSOR)[0]


def own_heads(x: jax.Array) -> jax.Array:
    return verbs.own_columns(x, TENSOR, unit=4)


def gather(x: jax.Array) -> jax.Array:
    return verbs.gather_blocks(x, TENSOR, dim=1)


def add_up(x: jax.Array) -> jax.Array:
    return verbs.sum_blocks(x, TENSOR)


def gather_tokens(x: jax.Array) -> jax.Array:
    return verbs.gather_tokens(x[..., None], TENSOR)[..., 0]


def scatter_tokens(x: jax.Array) -> jax.Array:
    # Each device's two columns, four times over, are its partial sums of eight tokens.
    return verbs.scatter_tokens(jnp.tile(x, (1, 4))[..., None], TENSOR)[..., 0]


def gather_weight(x: jax.Array) -> jax.Array:
    return verbs.gather_weight(x, TENSOR, dim=0)


SENT: dict[str, tuple[Callable[[jax.Array], jax.Array], P, P, list[str], list[str]]] = {
    "enter_split": (enter, WHOLE, BLOCK, [], ["all-reduce"]),
    "sum_blocks": (add_up, BLOCK, WHOLE, ["all-reduce"], []),
    "own_columns": (own_heads, WHOLE, BLOCK, [], ["all-reduce"]),
    "gather_blocks": (gather, BLOCK, WHOLE, ["all-gather"], []),
    "gather_tokens": (gather_tokens, BLOCK, BLOCK, ["all-gather"], ["reduce-scatter"]),
    "scatter_tokens": (scatter_tokens, BLOCK, BLOCK, ["reduce-scatter"], ["all-gather"]),
    "gather_weight": (gather_weight, P("tensor"), P("tensor"), ["all-gather"], ["reduce-scatter"]),
}


@pytest.mark.parametrize("verb", SENT)
def test_verb_and_its_transpose_send_what_is_said(verb: str) -> None:
    run, before, after, forward, backward = SENT[verb]
    mesh = mesh_of("tensor=4")

    def back(x: jax.Array) -> jax.Array:
        y, vjp = jax.vjp(run, x)
        # A gradient that differs between devices, where it may: XLA does not send what it knows to be the same.
        return vjp(jnp.ones_like(y) * (device_axes.block_index(TENSOR) if after != WHOLE else 1))[0]

    def kinds(fn: Any, out: P) -> list[str]:
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=before, out_specs=out)
        return [one.kind for one in collectives(text_of(jax.jit(mapped).lower(X).compile()))]

    # `shard_map` itself checks the types: a result that varies over tensor cannot leave as WHOLE.
    assert kinds(run, after) == forward
    assert kinds(back, before) == backward


def test_devices_that_share_a_head_have_the_same_columns() -> None:
    mesh = mesh_of("tensor=4")
    own = jax.shard_map(own_heads, mesh=mesh, in_specs=WHOLE, out_specs=BLOCK)(jnp.asarray(X))
    assert np.array_equal(own, np.concatenate([X[:, :4], X[:, :4], X[:, 4:], X[:, 4:]], axis=1))


@pytest.mark.parametrize("mesh", [None, "tensor=1", "data=2,tensor=4", "pipe=2,data=2,tensor=2"])
def test_function_in_blocks_is_the_function_and_so_is_its_gradient(mesh: str | None) -> None:
    """A sum over features and over sequences, which are split over tensor and data."""

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sin(verbs.sum_blocks((x * w[None]).sum(-1), TENSOR)).sum()

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        dims = (("batch", "ffn"), ("ffn",))
        return verbs.run_in_blocks(loss, rules=DEFAULT_RULES, in_dims=dims, out_dims=())(x, w)

    step, args = jax.jit(jax.value_and_grad(run, argnums=(0, 1))), (X, normal(8, seed=1))
    expected = jax.value_and_grad(loss, argnums=(0, 1))(*args)
    if mesh is None:
        assert differing(jax.device_get(step(*args)), jax.device_get(expected)) == {}
        return
    with jax.set_mesh(mesh_of(mesh)):
        placed = [place(a, d, mesh=mesh_of(mesh)) for a, d in zip(args, (("batch", "ffn"), ("ffn",)), strict=True)]
        assert differing(jax.device_get(step(*placed)), jax.device_get(expected)) == {}


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="a barrier of jax 0.10 takes values of one type alone")
def test_gradients_of_input_and_kernel_wait_for_each_other() -> None:
    """Without a barrier XLA would not run the kernel's gradient beside the all-reduce of the input's."""

    def grads(x: jax.Array, w: jax.Array) -> Any:
        def column(x: jax.Array, w: jax.Array) -> jax.Array:
            x, w = verbs.enter_split(x, w, TENSOR)
            return x @ w

        y, vjp = jax.vjp(column, x, w)
        return vjp(y)

    mapped = jax.shard_map(grads, mesh=mesh_of("tensor=4"), in_specs=(WHOLE, BLOCK), out_specs=(WHOLE, BLOCK))
    text = str(jax.make_jaxpr(mapped)(X, normal(8, 8)))
    assert "optimization_barrier" in text


def test_a_layer_with_split_tokens_equals_one_device() -> None:
    """A row and a column product with tokens split between them, and a weight split over the same axis besides."""
    x, up, down = (jnp.asarray(normal(*shape)) for shape in ((2, 8, 16), (16, 32), (32, 16)))

    def layer(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        whole = verbs.gather_tokens(x, TENSOR)
        return x + verbs.scatter_tokens(jnp.tanh(whole @ up) @ down, TENSOR)

    def loss(fn: Any) -> Any:
        return jax.value_and_grad(lambda *args: (fn(*args) ** 2).sum(), argnums=(0, 1, 2))

    split = jax.shard_map(
        layer,
        mesh=mesh_of("tensor=4"),
        in_specs=(P(None, "tensor"), P(None, "tensor"), P("tensor")),
        out_specs=P(None, "tensor"),
    )
    (ours, d_ours), (theirs, d_theirs) = loss(jax.jit(split))(x, up, down), loss(layer)(x, up, down)
    # float32: the same terms in another order.
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)
    for one, other in zip(d_ours, d_theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * float(jnp.abs(other).max()))


def test_tokens_that_do_not_split_are_refused() -> None:
    run = jax.shard_map(
        lambda y: verbs.scatter_tokens(device_axes.mark_varying(y, TENSOR), TENSOR),
        mesh=mesh_of("tensor=4"),
        in_specs=P(),
        out_specs=P(None, "tensor"),
    )
    with pytest.raises(ShardingError, match="tokens=6 does not split"):
        run(jnp.ones((2, 6, 4)))


def test_a_sum_of_what_is_whole_is_refused() -> None:
    run = jax.shard_map(add_up, mesh=mesh_of("tensor=4"), in_specs=P(), out_specs=P())
    with pytest.raises(ShardingError, match="the same on all 4 devices: the sum would be as many times too large"):
        run(jnp.ones((2, 6)))


def test_a_kernel_that_is_whole_is_refused() -> None:
    def double(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x, kernel = verbs.enter_split(x, kernel, TENSOR)
        return verbs.sum_blocks(x @ kernel, TENSOR)

    run = jax.shard_map(double, mesh=mesh_of("tensor=4"), in_specs=(P(), P()), out_specs=P())
    with pytest.raises(ShardingError, match="every device would compute the same product"):
        run(jnp.ones((2, 6)), jnp.ones((6, 4)))


def test_one_axis_may_be_given_by_its_name_alone() -> None:
    mesh = mesh_of("tensor=4")
    run = lambda axes: jax.shard_map(  # noqa: E731
        lambda x: verbs.sum_blocks(x, axes), mesh=mesh, in_specs=BLOCK, out_specs=WHOLE
    )
    np.testing.assert_array_equal(jax.jit(run("tensor"))(X), jax.jit(run(TENSOR))(X))


@pytest.mark.parametrize("verb", [gather, gather_tokens, scatter_tokens, gather_weight])
def test_what_is_whole_is_neither_gathered_nor_scattered(verb: Callable[[jax.Array], jax.Array]) -> None:
    run = jax.shard_map(verb, mesh=mesh_of("tensor=4"), in_specs=WHOLE, out_specs=BLOCK)
    with pytest.raises(ShardingError, match="that is the same on all 4 devices"):
        jax.eval_shape(run, X)


def test_types_that_say_nothing_are_refused() -> None:
    run = jax.shard_map(add_up, mesh=mesh_of("tensor=4"), in_specs=BLOCK, out_specs=WHOLE, check_vma=False)
    with pytest.raises(ShardingError, match=r"sum_blocks over tensor inside shard_map\(check_vma=False\)"):
        jax.eval_shape(run, X)


@pytest.mark.parametrize(("columns", "units"), [(12, 3), (24, 6), (2, 0)])
def test_heads_that_neither_split_nor_are_shared_are_refused(columns: int, units: int) -> None:
    run = jax.shard_map(own_heads, mesh=mesh_of("tensor=4"), in_specs=WHOLE, out_specs=BLOCK)
    with pytest.raises(ShardingError, match=f"own_columns of {units} units of 4 columns over tensor=4"):
        jax.eval_shape(run, normal(4, columns))
