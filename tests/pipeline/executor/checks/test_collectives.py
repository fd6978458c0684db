"""Collectives in functions are checked by tracing, with the same answer on every mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.meshes import TrellaxError
from trellax.pipeline import StageFns, pipeline_grads

from ...tiny import FNS, tiny_given, tiny_mesh

Golden = Callable[[str, str], None]


def _after(name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: lambda *args: change(FNS[name](*args))}


def _permute(x: jax.Array) -> jax.Array:
    return jax.lax.ppermute(x, "data", [(0, 0)])


def _branch(x: jax.Array) -> jax.Array:
    sum_all = lambda x: jax.lax.pmean(x, "data") + 0 * x  # noqa: E731
    return jax.lax.cond(jax.lax.axis_index("data") == 0, sum_all, lambda x: x, x)


@jax.custom_vjp
def _sum_backwards(x: jax.Array) -> jax.Array:
    return x


_sum_backwards.defvjp(lambda x: (x, None), lambda _, grad: (jax.lax.psum(grad, "pipe") + 0 * grad,))

CASES: dict[str, dict[str, Any]] = {
    "layer_sums_over_pipe": _after("layer", lambda x: x + jax.lax.psum(x, "pipe")),
    "last_sums_over_pipe": _after("last", lambda loss: jax.lax.psum(loss, ("pipe", "data"))),
    "prepare_gathers_over_pipe": {"prepare": lambda w: jax.lax.all_gather(w, "pipe")[0]},
    "layer_permutes_over_data": _after("layer", _permute),
    "first_permutes_over_data": _after("first", jax.checkpoint(_permute)),
    "layer_permutes_over_tensor": _after("layer", lambda x: jax.lax.ppermute(x, "tensor", [(0, 0)])),
    "last_names_no_axis": _after("last", lambda loss: loss / jax.lax.axis_size("dat")),
    "layer_sums_over_no_axis": _after("layer", lambda x: jax.lax.psum(x, "tensr")),
    "last_sums_over_what_is_alike": _after("last", lambda loss: jax.lax.pmean(loss, ("data", "tensor"))),
    "layer_constrains_over_data": _after("layer", lambda x: jax.lax.with_sharding_constraint(x, P("data"))),
    "layer_constrains_over_tensor": _after("layer", lambda x: jax.lax.with_sharding_constraint(x, P(None, "tensor"))),
}


def trace(mesh: str, **fns: Any) -> Any:
    functions: dict[str, Any] = FNS | fns
    given = tiny_given(mesh)
    run = partial(pipeline_grads, StageFns(**functions), mesh=given["mesh"], schedule=given["schedule"])
    return jax.eval_shape(lambda p, b: run(params=p, batch=b), given["params"], given["batch"])


@pytest.mark.parametrize("mesh", ["2x1x2", "1x1x1"])
@pytest.mark.parametrize("name", CASES)
def test_collectives_that_would_hang_are_refused_on_every_mesh(name: str, mesh: str, golden: Golden) -> None:
    with pytest.raises(TrellaxError) as caught:
        trace(mesh, **CASES[name])
    golden(f"errors/pipeline/collective_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


@pytest.mark.parametrize(
    ("name", "fns"),
    [
        ("in_a_branch", _after("layer", _branch)),
        ("in_the_backward", _after("layer", _sum_backwards)),
    ],
)
def test_collectives_that_would_hang_in_branches_and_backwards_are_refused(name: str, fns: Any, golden: Golden) -> None:
    with pytest.raises(TrellaxError) as caught:
        trace("2x1x2", **fns)
    golden(f"errors/pipeline/collective_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


def test_a_sharding_on_the_users_own_mesh_is_refused(golden: Golden) -> None:
    place = NamedSharding(tiny_mesh("1x2x2"), P(None, "tensor"))
    with pytest.raises(TrellaxError) as caught:
        trace("1x2x2", **_after("layer", lambda x: jax.lax.with_sharding_constraint(x, place)))
    golden(
        "errors/pipeline/collective_layer_constrains_on_a_mesh.txt", f"{type(caught.value).__name__}: {caught.value}"
    )


def test_sums_over_tensor_and_gathers_over_data_are_allowed() -> None:
    average = _after("layer", lambda x: jax.lax.pmean(x, "tensor"))
    gather = _after("first", lambda x: x + jax.lax.all_gather(x, "data").mean((0, 1))[None])
    assert trace("2x2x2", **average, **gather).loss.shape == ()


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("explicit", lambda mesh: Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * 3)),
        ("other", lambda mesh: jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)),
    ],
)
def test_another_mesh_in_the_context_is_refused(name: str, context: Callable[[Mesh], Mesh], golden: Golden) -> None:
    with jax.set_mesh(context(tiny_mesh("2x1x2"))), pytest.raises(TrellaxError) as caught:
        trace("2x1x2")
    golden(f"errors/pipeline/context_mesh_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


def test_the_same_mesh_in_the_context_is_allowed() -> None:
    with jax.set_mesh(tiny_mesh("2x1x2")):
        assert trace("2x1x2").loss.dtype == jnp.float32
