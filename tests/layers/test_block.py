"""A stack of blocks is its layers in order, and rematerialisation changes memory alone."""

import math
from functools import cache
from typing import Any, get_args

import jax
import numpy as np
import pytest
from flax import nnx
from trellax.layers import Block, Remat
from trellax.layers.block import run_blocks, stack_blocks

from .sharded import STYLES, Probe, differing, normal, small_config

REMATS: tuple[Remat, ...] = get_args(Remat)
X = normal(2, 16, 32)


@cache
def stack(style: str) -> Probe:
    return Probe.of(lambda: stack_blocks(small_config(style, num_layers=3), rngs=nnx.Rngs(0)))


@cache
def grads(style: str, remat: Remat) -> dict[str, Any]:
    probe = stack(style)

    @jax.jit
    def step(params: Any, x: jax.Array) -> dict[str, Any]:
        y, vjp = jax.vjp(lambda params, x: run_blocks(probe.graph, params, x, remat=remat)[0], params, x)
        grads, grad_x = vjp(normal(*y.shape, seed=2))
        return {"y": y, "grads": grads, "x": grad_x}

    return jax.device_get(step(probe.params, X))


def saved_bytes(style: str, remat: Remat) -> int:
    probe = stack(style)

    def backward(params: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda params, x: run_blocks(probe.graph, params, x, remat=remat)[0], params, x)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, probe.params, X))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept)


@pytest.mark.parametrize("style", STYLES)
def test_scan_over_a_stack_is_a_loop_over_its_layers(style: str) -> None:
    probe, x = stack(style), X
    for layer in range(3):
        params = jax.tree.map(lambda leaf, i=layer: leaf[i], probe.params)
        x = jax.jit(probe.forward)(params, x)
    assert differing(grads(style, "none")["y"], x) == {}


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("style", STYLES)
def test_remat_policy_changes_no_gradient(style: str, remat: Remat) -> None:
    assert differing(grads(style, remat), grads(style, "none")) == {}


@pytest.mark.parametrize("style", STYLES)
def test_full_remat_saves_less_than_dots_and_dots_less_than_none(style: str) -> None:
    full, dots, none = (saved_bytes(style, remat) for remat in ("full", "dots", "none"))
    assert full < dots < none


def test_layers_of_a_stack_are_drawn_one_by_one() -> None:
    blocks: Any = stack_blocks(small_config(num_layers=3), rngs=nnx.Rngs(0))
    kernel_LDF = blocks.mlp.up.kernel[...]
    assert kernel_LDF.shape == (3, 32, 128)
    assert len(np.unique(kernel_LDF[:, 0, 0])) == 3


def test_residual_branches_start_smaller_the_deeper_the_model() -> None:
    shallow, deep = (np.std(Block(small_config(num_layers=n), rngs=nnx.Rngs(0)).mlp.down.kernel[...]) for n in (1, 16))
    assert shallow / deep == pytest.approx(4.0, rel=1e-5)
