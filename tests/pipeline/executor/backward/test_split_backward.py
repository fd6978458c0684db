"""The two halves of a backward do its work once, and the first half computes no weight gradient."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from trellax.layers import Remat, activation_bytes
from trellax.layers.collectives import hide_reduction
from trellax.meshes import MeshSpec, build_mesh
from trellax.pipeline import split_transformer
from trellax.plan.costs.activations import split_backward_bytes

from ...law import NUM_TOKENS, natural_params, small_model
from ...plain_vjp import PlainHalves, PlainVjp, plan_plain

NUM_SEQUENCES = 2
NUM_WEIGHTS = {"gpt": 6, "llama": 7, "qwen": 7}
"""Matmuls of a layer with a weight: query, key, value, output, up, down, and a gate in Llama's and Qwen's."""

EVERY_LAYER = [(style, remat) for style in NUM_WEIGHTS for remat in ("none", "dots", "full")]


@dataclass(frozen=True, kw_only=True)
class Halves:
    """A layer's backward, whole and split, with arguments for both."""

    vjp: PlainVjp
    split: PlainHalves
    params: Any
    x: jax.Array
    microbatch: Any
    kept: list[jax.ShapeDtypeStruct]

    def whole(self, params: Any, x: jax.Array, grad: jax.Array) -> Any:
        """Return (gradients of params, gradient of x) as the unsplit backward has them."""
        _, saved = self.vjp.forward(params, x, self.microbatch)
        return self.vjp.backward(params, saved, self.microbatch, grad)

    def both(self, params: Any, x: jax.Array, grad: jax.Array) -> Any:
        """Return the same by one half after the other."""
        _, saved = self.vjp.forward(params, x, self.microbatch)
        dx, kept = self.split.input_grad(params, saved, self.microbatch, grad)
        return self.split.weight_grad(params, kept, self.microbatch), dx

    def second_jaxpr(self) -> Any:
        kept = [*self.kept, *self.split.extra]
        return jax.make_jaxpr(lambda p, k: self.split.weight_grad(p, k, self.microbatch))(self.params, kept)

    def first_jaxpr(self) -> Any:
        run = lambda p, s, g: self.split.input_grad(p, s, self.microbatch, g)  # noqa: E731
        return jax.make_jaxpr(run)(self.params, self.kept, self.x)

    def whole_jaxpr(self) -> Any:
        run = lambda p, s, g: self.vjp.backward(p, s, self.microbatch, g)  # noqa: E731
        return jax.make_jaxpr(run)(self.params, self.kept, self.x)


def halves_of(layer: Callable[..., jax.Array], params: Any, x: jax.Array, microbatch: Any = None) -> Halves:
    vjp = plan_plain(layer, params, x, microbatch)
    return Halves(
        vjp=vjp, split=vjp.halves(params, x, microbatch), params=params, x=x, microbatch=microbatch, kept=vjp.kept
    )


@cache
def block(style: str, remat: Remat) -> Halves:
    config = small_model(style=style)
    mesh = build_mesh(MeshSpec(), devices=jax.devices()[:1])
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), natural_params(config)["blocks"])
    x = np.random.default_rng(0).standard_normal((NUM_SEQUENCES, NUM_TOKENS, 64), np.float32)
    layer: Any = split_transformer(config, mesh=mesh, remat=remat).fns.layer
    return halves_of(layer, params, jnp.asarray(x))


def users_layer(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    """Two matmuls by one weight, a bias, a gate from the microbatch, a scan, a parameter without influence."""
    hidden = jnp.tanh(x @ params["w"] + params["b"][None]) @ params["w"].T

    def step(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(carry @ params["square"]), None

    looped, _ = jax.lax.scan(step, hidden, None, length=3)
    return x + microbatch["gate"][:, None] * looped + 0.0 * params["unused"].sum()


@cache
def users_halves() -> Halves:
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {"w": draw(8, 16), "b": draw(16), "square": draw(8, 8), "unused": draw(3)}
    return halves_of(users_layer, params, draw(6, 8), {"gate": draw(6)})


def differences(halves: Halves) -> dict[str, float]:
    """Return the largest difference of each gradient that is not bitwise equal."""
    run = jax.jit(lambda p, x: (halves.both(p, x, jnp.cos(x)), halves.whole(p, x, jnp.cos(x))))
    actual, expected = run(halves.params, halves.x)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    errors = {jax.tree_util.keystr(path): float(jnp.abs(a - b).max()) for (path, a), b in pairs}
    return {name: error for name, error in errors.items() if error != 0}


def num_matmuls(closed: Any) -> int:
    """Return how many matmuls a program has, loops counted once, without those that no result needs."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _count(jaxpr)


def _count(jaxpr: Any) -> int:
    inner = [value for eqn in jaxpr.eqns for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)]
    own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    return own + sum(_count(getattr(value, "jaxpr", value)) for value in inner if _is_jaxpr(value))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def passed_through(halves: Halves) -> list[bool]:
    """Return of every parameter's gradient whether the second half gets it finished."""
    jaxpr = halves.second_jaxpr().jaxpr
    return [out in jaxpr.invars for out in jaxpr.outvars]


@pytest.mark.parametrize(("style", "remat"), EVERY_LAYER)
def test_halves_of_a_block_equal_the_whole(style: str, remat: Remat) -> None:
    assert differences(block(style, remat)) == {}


def test_halves_of_a_users_layer_equal_the_whole() -> None:
    assert differences(users_halves()) == {}


def test_gradients_tied_by_a_barrier_run_in_separate_halves() -> None:
    def layer(kernel: jax.Array, x: jax.Array, _: Any) -> jax.Array:
        x, kernel = hide_reduction(x, kernel, ())
        return jnp.tanh(x @ kernel)

    rng = np.random.default_rng(2)
    kernel, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 8), (6, 8)))
    halves = halves_of(layer, kernel, x)
    assert "optimization_barrier" in str(halves.whole_jaxpr())
    assert [num_matmuls(jaxpr) for jaxpr in (halves.first_jaxpr(), halves.second_jaxpr())] == [1, 1]
    assert differences(halves) == {}


def test_residuals_that_are_read_after_their_cut_is_made_are_named() -> None:
    def late(w: jax.Array, x: jax.Array, _: Any) -> jax.Array:
        return x + jnp.sin(x) @ w

    rng = np.random.default_rng(3)
    w, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 8), (6, 8)))
    # dw = sin(x).T @ dy: the gradient of the output waits in the place of cos(x), by which dy @ w.T is multiplied last.
    own = halves_of(late, w, x).split.own
    kept = plan_plain(late, w, x, None).forward(w, x, None)[1]
    assert [(np.allclose(kept[place], jnp.cos(x)), until) for place, until in own.early.items()] == [(True, None)]
    # That of tanh is multiplied by its residual first, and waits in its place.
    assert halves_of(lambda w, x, _: jnp.tanh(x @ w), w, x).split.own.early == {}


@pytest.mark.parametrize(("style", "remat"), EVERY_LAYER)
def test_no_matmul_runs_in_both_halves(style: str, remat: Remat) -> None:
    halves = block(style, remat)
    programs = (halves.first_jaxpr(), halves.second_jaxpr(), halves.whole_jaxpr())
    first, second, whole = map(num_matmuls, programs)
    assert first + second == whole


@pytest.mark.parametrize(("style", "remat"), EVERY_LAYER)
def test_second_half_has_one_matmul_for_each_weight(style: str, remat: Remat) -> None:
    assert num_matmuls(block(style, remat).second_jaxpr()) == NUM_WEIGHTS[style]


@pytest.mark.parametrize(("style", "remat"), EVERY_LAYER)
def test_biases_and_norm_scales_are_done_in_the_first_half(style: str, remat: Remat) -> None:
    halves = block(style, remat)
    assert passed_through(halves) == [leaf.ndim == 1 for leaf in jax.tree.leaves(halves.params)]


@pytest.mark.parametrize(
    ("style", "remat", "expected"),
    [
        ("gpt", "none", 3),
        ("llama", "none", 3),
        ("qwen", "none", 1),
        ("gpt", "dots", 2),
        ("llama", "dots", 2),
        ("gpt", "full", 7),
        ("llama", "full", 7),
    ],
)
def test_few_activations_are_kept_besides_the_residuals(style: str, remat: Remat, expected: int) -> None:
    """As `plan/costs/activations.py` counts them; in widths of x, of which the feed-forward has four or three."""
    halves = block(style, remat)
    extra = [math.prod(leaf.shape) / halves.x.size for leaf in halves.split.extra if len(leaf.shape) > 1]
    wide = {"gpt dots": [4], "llama dots": [3] * 2, "gpt full": [4] * 2, "llama full": [3] * 4}
    assert sorted(extra) == [1] * expected + wide.get(f"{style} {remat}", [])


@pytest.mark.parametrize(("style", "remat"), EVERY_LAYER)
def test_plan_and_describe_count_what_both_halves_keep(style: str, remat: Remat) -> None:
    halves = block(style, remat)
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in (*halves.kept, *halves.split.extra))
    sizes: dict[str, Any] = {"num_sequences": NUM_SEQUENCES, "num_tokens": NUM_TOKENS, "tensor": 1, "remat": remat}
    counted = activation_bytes(small_model(style=style), **sizes).layer
    # What vectors keep, statistics of norms say, is counted by neither.
    assert counted + split_backward_bytes(small_model(style=style), **sizes) == pytest.approx(kept, rel=0.03)


def branching(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    """A cond, and a switch with a cond inside; a weight in several branches, a bias, a branch without products."""

    def inner(x: jax.Array) -> jax.Array:
        sine = lambda x: jnp.sin(x @ params["v"]) @ params["v"]  # noqa: E731
        return jax.lax.cond(x.sum() > 0, lambda x: x @ params["v"], sine, x) @ params["w"]

    branches = (lambda x: jnp.tanh(x @ params["w"] + params["b"][None]), inner, lambda x: 2 * x)
    x = x + jax.lax.switch(microbatch["branch"], branches, x) @ params["u"]
    return jax.lax.cond(microbatch["branch"] > 0, lambda x: x @ params["u"], lambda x: x * params["b"][None], x)


@cache
def branching_halves(remat: Literal["none", "full"]) -> Halves:
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    layer = branching if remat == "none" else jax.checkpoint(branching)
    params = {name: draw(8, 8) for name in "uvw"} | {"b": draw(8)}
    return halves_of(layer, params, draw(6, 8), {"branch": jnp.int32(0)})


def test_weight_products_in_branches_wait_for_the_second_half() -> None:
    halves = branching_halves("none")
    programs = (halves.first_jaxpr(), halves.second_jaxpr(), halves.whole_jaxpr())
    # Of w twice, v three times and u twice: for x one each, and for the weight.
    assert [num_matmuls(jaxpr) for jaxpr in programs] == [7, 7, 14]
    assert passed_through(halves) == [name == "b" for name in sorted(halves.params)]


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_halves_of_branches_equal_the_whole(remat: Literal["none", "full"]) -> None:
    halves = branching_halves(remat)

    @jax.jit
    def run(branch: jax.Array, x: jax.Array) -> Any:
        here = replace(halves, microbatch={"branch": branch})
        return here.both(halves.params, x, jnp.cos(x)), here.whole(halves.params, x, jnp.cos(x))

    for branch in range(3):
        for x in (halves.x, -halves.x):
            actual, expected = run(jnp.int32(branch), x)
            assert jax.tree.all(jax.tree.map(partial(np.allclose, rtol=1e-5, atol=1e-6), actual, expected))
