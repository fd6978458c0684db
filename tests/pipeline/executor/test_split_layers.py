"""A user's own layer whose weights are split over tensor equals one device, in three ways to say what it sends.

Each way is a column-split product, a nonlinearity and a row-split product (Shoeybi et al. 2019, section 3).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.layers.collectives import enter_split, sum_blocks
from trellax.pipeline import PipelineParams, stages_from_layers

from ..tiny import BATCH, FNS, NUM_LAYERS, WIDTH, grads_of, natural, plain_loss, tiny_given, worst

TOLERANCE = 2e-5  # sums in another order, in float32: see test_law.py
FFN = 8

Layer = Callable[[Any, jax.Array, Any], jax.Array]


def plain(params: Any, x: jax.Array, _: Any) -> jax.Array:
    return x + jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None]


def by_verbs(params: Any, x: jax.Array, _: Any) -> jax.Array:
    h, up = enter_split(x, params["up"], ["tensor"])
    return x + sum_blocks(jnp.tanh(h @ up) @ params["down"], ["tensor"]) + params["bias"][None]


def by_lax(params: Any, x: jax.Array, _: Any) -> jax.Array:
    """jax marks x as varying itself, and sums its gradient."""
    return x + jax.lax.psum(jnp.tanh(x @ params["up"]) @ params["down"], "tensor") + params["bias"][None]


@jax.custom_vjp
def f(x: jax.Array) -> jax.Array:
    return jax.lax.pcast(x, ("tensor",), to="varying")


@jax.custom_vjp
def g(y: jax.Array) -> jax.Array:
    return jax.lax.psum(y, "tensor")


f.defvjp(lambda x: (f(x), None), lambda _, grad: (jax.lax.psum(grad, "tensor"),))
g.defvjp(lambda y: (g(y), None), lambda _, grad: (jax.lax.pcast(grad, ("tensor",), to="varying"),))


def by_hand(params: Any, x: jax.Array, _: Any) -> jax.Array:
    return x + g(jnp.tanh(f(x) @ params["up"]) @ params["down"]) + params["bias"][None]


SPECS = {"up": P(None, "tensor"), "down": P("tensor"), "bias": P()}
LAYERS: dict[str, Layer] = {"verbs": by_verbs, "lax": by_lax, "hand": by_hand}
CASES = [("1x2x2", "1f1b"), ("2x2x2", "zb-h1"), ("1x4x1", "1f1b"), ("2x1x2", "1f1b")]


@pytest.mark.parametrize("way", LAYERS)
@pytest.mark.parametrize(
    ("mesh", "schedule"), [pytest.param(*c, marks=[] if c == CASES[0] else pytest.mark.slow) for c in CASES]
)
def test_a_layer_split_over_tensor_equals_one_device(way: str, mesh: str, schedule: str) -> None:
    rng, given = np.random.default_rng(3), tiny_given(mesh, schedule=schedule)
    draw = lambda *shape: (0.5 * rng.standard_normal((NUM_LAYERS, *shape))).astype(np.float32)  # noqa: E731
    layers = {"up": draw(WIDTH, FFN), "down": draw(FFN, WIDTH), "bias": draw(WIDTH)}
    stages = stages_from_layers(jax.tree.map(jnp.asarray, layers), num_ranks=given["mesh"].shape["pipe"])
    given["params"] = PipelineParams(stages=stages, shared=given["params"].shared)
    found = grads_of({"layer": LAYERS[way]}, given, stage_specs=SPECS)

    def loss(params: PipelineParams) -> jax.Array:
        own = [jax.tree.map(lambda leaf, index=index: leaf[index], params.stages) for index in range(NUM_LAYERS)]
        return plain_loss(PipelineParams(stages=own, shared=params.shared), given["batch"], {"layer": plain})

    assert worst(found, jax.value_and_grad(loss)(natural(given["params"]))) <= TOLERANCE


def _own(x: jax.Array) -> jax.Array:
    """Return this tensor rank's columns of x[b, D]."""
    size = WIDTH // jax.lax.axis_size("tensor")
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tensor") * size, size, axis=1)


def _whole(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, "tensor", axis=1, tiled=True)


SPLIT_BETWEEN_LAYERS: dict[str, Callable[..., Any]] = {
    "first": lambda shared, microbatch: _own(FNS["first"](shared, microbatch)),
    "layer": lambda weight, x, microbatch: _own(FNS["layer"](weight, _whole(x), microbatch)),
    "last": lambda shared, x, microbatch: jax.lax.psum(
        ((x - _own(microbatch["y"])) ** 2).sum() / (BATCH * WIDTH), "tensor"
    ),
}


@pytest.mark.parametrize(
    ("mesh", "schedule"), [pytest.param(*c, marks=[] if c == CASES[0] else pytest.mark.slow) for c in CASES]
)
def test_what_layers_pass_on_may_differ_over_tensor(mesh: str, schedule: str) -> None:
    """Each tensor rank passes on its own columns, as with sequence parallelism its own tokens."""
    given = tiny_given(mesh, schedule=schedule)
    if given["mesh"].shape["pipe"] == 1:
        given["params"] = PipelineParams(
            stages=given["params"].stages.reshape(1, 1, NUM_LAYERS, WIDTH, WIDTH), shared=given["params"].shared
        )
    expected = jax.value_and_grad(plain_loss)(natural(given["params"]), given["batch"], {})
    assert worst(grads_of(SPLIT_BETWEEN_LAYERS, given), expected) <= TOLERANCE


def test_a_layer_may_return_the_same_on_all_tensor_ranks() -> None:
    """Where it was given what differs between them: its type says less than the carry of the loop over layers."""
    given, zeros = tiny_given("1x2x2"), {"layer": lambda weight, x, _: jnp.zeros_like(x) + weight.sum()}
    alike: dict[str, Callable[..., Any]] = SPLIT_BETWEEN_LAYERS | {
        "layer": lambda weight, x, _: jnp.zeros(x.shape) + weight.sum()
    }
    expected = jax.value_and_grad(plain_loss)(natural(given["params"]), given["batch"], zeros)
    loss, grads = grads_of(alike, given)
    assert worst((loss, grads.stages), (expected[0], expected[1].stages)) <= TOLERANCE
