"""A derivative of a pipeline is right, or refused by name: never zero, never a hang."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.meshes import ScheduleError
from trellax.pipeline import StageFns, pipeline_grads, pipeline_loss

from ..tiny import FNS, MICROBATCHES, WIDTH, natural, plain_loss, tiny_given, worst

Golden = Callable[[str, str], None]
Entry = Callable[..., Any]

TOLERANCE = 2e-5  # sums in another order, in float32: see test_law.py


def loss_of(entry: Entry, given: dict[str, Any], **fns: Any) -> jax.Array:
    functions: dict[str, Any] = FNS | fns
    out = entry(StageFns(**functions), **given)
    return out.loss if entry is pipeline_grads else out


def text_of(error: pytest.ExceptionInfo[ScheduleError]) -> str:
    return f"{type(error.value).__name__}: {error.value}"


MESHES = [pytest.param(mesh, marks=[] if mesh == "1x1x1" else pytest.mark.slow) for mesh in ("1x1x1", "2x1x2", "2x2x2")]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("entry", [pipeline_grads, pipeline_loss])
def test_a_gradient_of_the_batch_equals_one_device(entry: Entry, mesh: str) -> None:
    given = tiny_given(mesh)
    found = jax.jit(jax.grad(lambda batch: loss_of(entry, given | {"batch": batch})))(given["batch"])
    expected = jax.grad(lambda batch: plain_loss(natural(given["params"]), batch, {}))(given["batch"])
    assert worst(found, expected) <= TOLERANCE


@pytest.mark.parametrize("mesh", MESHES)
def test_a_second_derivative_in_parameters_and_batch_equals_one_device(mesh: str) -> None:
    given = tiny_given(mesh)

    def mixed(loss: Callable[[Any, Any], jax.Array], params: Any) -> Any:
        steepness = lambda batch: sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.grad(loss)(params, batch)))  # noqa: E731
        return jax.jit(jax.grad(steepness))(given["batch"])

    ours = mixed(
        lambda params, batch: loss_of(pipeline_loss, given | {"params": params, "batch": batch}), given["params"]
    )
    plain = mixed(lambda params, batch: plain_loss(params, batch, {}), natural(given["params"]))
    assert worst(ours, plain) <= TOLERANCE


def scaled(name: str, scale: jax.Array) -> dict[str, Any]:
    return {name: lambda *args: FNS[name](*args) * scale}


CLOSED = [("first", "grad"), ("layer", "grad"), ("last", "grad"), ("last", "grad of jit")]


@pytest.mark.parametrize(("name", "transform"), CLOSED)
@pytest.mark.parametrize("entry", [pipeline_grads, pipeline_loss])
def test_a_gradient_of_what_a_function_closes_over_is_refused(
    entry: Entry, name: str, transform: str, golden: Golden
) -> None:
    """Compiled, it hung; or it was zero, as for `last`."""
    given = tiny_given("2x1x2")
    loss: Any = lambda scale: loss_of(entry, given, **scaled(name, scale))  # noqa: E731
    with pytest.raises(ScheduleError) as caught:
        jax.eval_shape(jax.grad(loss if transform == "grad" else jax.jit(loss)), jnp.float32(1.5))
    golden(f"errors/pipeline/derivative_closed_over_by_{name}.txt", text_of(caught))


@pytest.mark.parametrize("entry", [pipeline_grads, pipeline_loss])
def test_a_gradient_of_the_state_of_layers_is_refused(entry: Entry, golden: Golden) -> None:
    given = tiny_given("1x1x2")
    layer = lambda weight, x, microbatch, info: FNS["layer"](weight, x, microbatch) + info.state[None]  # noqa: E731
    loss = lambda state: loss_of(entry, given | {"state": state}, layer=layer)  # noqa: E731
    with pytest.raises(ScheduleError) as caught:
        jax.eval_shape(jax.grad(loss), jnp.ones((1, 2, 1, WIDTH)))
    golden("errors/pipeline/derivative_of_the_state.txt", text_of(caught))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_gradient_of_a_number_in_the_batch_equals_that_of_one_closed_over(mesh: str) -> None:
    """As the error above advises: one copy of it for each microbatch, whole on every data shard."""
    given = tiny_given(mesh)

    def loss(scale: jax.Array) -> jax.Array:
        batch = given["batch"] | {"scale": jnp.full(MICROBATCHES, scale)}
        scaled_by_batch = lambda weight, x, microbatch: FNS["layer"](weight, x, microbatch) * microbatch["scale"]  # noqa: E731
        return loss_of(pipeline_loss, given | {"batch": batch}, layer=scaled_by_batch)

    plain = lambda scale: plain_loss(natural(given["params"]), given["batch"], scaled("layer", scale))  # noqa: E731
    scale = jnp.float32(1.5)
    assert worst(jax.jit(jax.value_and_grad(loss))(scale), jax.value_and_grad(plain)(scale)) <= TOLERANCE


def test_a_function_may_close_over_a_traced_array() -> None:
    """Differentiated outside of the `jit` that traces it too: then jax is done with that trace."""
    given = tiny_given("1x1x2")

    @jax.jit
    def loss(params: Any, scale: jax.Array) -> jax.Array:
        return loss_of(pipeline_loss, given | {"params": params}, **scaled("layer", scale))

    value, grads = jax.jit(jax.value_and_grad(loss))(given["params"], jnp.float32(0.5))
    expected = jax.value_and_grad(plain_loss)(
        natural(given["params"]), given["batch"], scaled("layer", jnp.float32(0.5))
    )
    assert worst((value, natural(grads)), expected) <= TOLERANCE


@pytest.mark.parametrize("mesh", MESHES)
def test_forward_and_second_derivatives_equal_one_device(mesh: str) -> None:
    given = tiny_given(mesh)
    params, along = given["params"], jax.tree.map(np.cos, given["params"])

    def both(loss: Callable[[Any], jax.Array], params: Any, along: Any) -> Any:
        def slope(params: Any) -> jax.Array:
            return jax.jvp(loss, (params,), (along,))[1]

        return slope(params), jax.grad(slope)(params)

    ours = jax.jit(partial(both, lambda params: loss_of(pipeline_loss, given | {"params": params})))(params, along)
    plain = partial(both, lambda params: plain_loss(params, given["batch"], {}))(natural(params), natural(along))
    assert worst((ours[0], natural(ours[1])), plain) <= TOLERANCE


@pytest.mark.slow
def test_a_hessian_times_a_vector_in_numpy_equals_one_device() -> None:
    given = tiny_given("1x1x1")
    along = jax.tree.map(np.cos, given["params"])

    def product(loss: Callable[[Any], jax.Array]) -> Any:
        return jax.jit(lambda params: jax.jvp(jax.grad(loss), (params,), (along,))[1])(given["params"])

    ours = product(lambda params: loss_of(pipeline_loss, given | {"params": params}))
    assert worst(ours, product(lambda params: plain_loss(natural(params), given["batch"], {}))) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev])
def test_hessians_and_jacobians_equal_one_device(transform: Callable[..., Any]) -> None:
    given = tiny_given("2x1x2")
    loss = lambda params: loss_of(pipeline_loss, given | {"params": params})  # noqa: E731
    plain = lambda params: plain_loss(natural(params), given["batch"], {})  # noqa: E731
    for order in (transform, lambda f: jax.jacfwd(transform(f))):
        assert worst(jax.jit(order(loss))(given["params"]), jax.jit(order(plain))(given["params"])) <= TOLERANCE


@pytest.mark.slow
def test_a_batch_of_pipelines_equals_one_after_another() -> None:
    given = tiny_given("2x1x2")
    many = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), given["params"])
    step = jax.value_and_grad(lambda params: loss_of(pipeline_loss, given | {"params": params}))
    each = [jax.jit(step)(jax.tree.map(lambda leaf, i=i: leaf[i], many)) for i in range(2)]
    assert worst(jax.jit(jax.vmap(step))(many), jax.tree.map(lambda *leaves: np.stack(leaves), *each)) <= TOLERANCE


# Slow where it sums over devices, as XLA:CPU once aborted on such sums.
@pytest.mark.parametrize("mesh", ["1x1x2", pytest.param("2x2x2", marks=pytest.mark.slow)])
def test_second_derivatives_in_bfloat16_equal_one_device(mesh: str) -> None:
    given = tiny_given(mesh, dtype="bfloat16")
    fns = {
        "first": lambda shared, microbatch: microbatch["x"] * shared["scale"].astype("float32")[None],
        "layer": lambda weight, x, _: x + jnp.tanh(x @ weight.astype("float32")),
    }

    def second(loss: Callable[[Any], jax.Array], params: Any) -> Any:
        as_float = lambda tree: jax.tree.map(lambda leaf: leaf.astype("float32"), tree)  # noqa: E731
        steepness = lambda params: sum((leaf**2).sum() for leaf in jax.tree.leaves(as_float(jax.grad(loss)(params))))  # noqa: E731
        return as_float(jax.jit(jax.grad(steepness))(params))

    ours = second(lambda params: loss_of(pipeline_loss, given | {"params": params}, **fns), given["params"])
    plain = second(lambda params: plain_loss(params, given["batch"], fns), natural(given["params"]))
    # A bfloat16 has 8 bits: one rounding is off by 2^-9, and each of two microbatches on two data shards adds one.
    assert worst(natural(ours), plain) <= 4 * 2**-9


def test_a_second_derivative_with_unequal_stages_is_refused(golden: Golden) -> None:
    given, counts = tiny_given("1x1x2"), {"layers_per_stage": (2, 1), "num_layers": 3}
    stages = np.ones((1, 2, 2, 4, 4), np.float32)
    params = type(given["params"])(stages=stages, shared=given["params"].shared)
    loss = lambda params: loss_of(pipeline_loss, given | {"params": params}, **counts)  # noqa: E731
    slopes = lambda params: sum(leaf.sum() for leaf in jax.tree.leaves(jax.grad(loss)(params)))  # noqa: E731
    with pytest.raises(ScheduleError) as caught:
        jax.eval_shape(jax.grad(slopes), params)
    golden("errors/pipeline/derivative_second_of_unequal_stages.txt", text_of(caught))
