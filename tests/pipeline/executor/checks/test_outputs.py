"""What layers and `last` return is checked by tracing: its kind, its names, and over which devices it differs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.meshes import TrellaxError
from trellax.pipeline import Output, PipelineParams, StageFns, pipeline_grads

from ...tiny import FNS, MICROBATCHES, WIDTH, Fns, plain_loss, tiny_given, worst

Golden = Callable[[str, str], None]

TOLERANCE = 2e-5  # sums in another order, in float32: see test_law.py


def _columns(weight: jax.Array, x: jax.Array, _: Any) -> jax.Array:
    """Return this device's part of a sum over the columns of a weight: whole only after a sum over tensor."""
    return jnp.tanh(x @ weight) @ weight.T


def _part(weight: jax.Array, x: jax.Array) -> jax.Array:
    return (x @ weight).sum()


def _with(make: Callable[[jax.Array, jax.Array], dict[str, Any]]) -> Fns:
    """A layer that passes x on, and returns what is made of its weight, split over tensor, and x."""
    return {"layer": lambda weight, x, _: Output(x=x, **make(weight, x))}


def _last(**parts: Any) -> Fns:
    return {"last": lambda shared, x, m: Output(loss=FNS["last"](shared, x, m), **parts)}


SPLIT = P(None, "tensor")
MISTAKES: dict[str, Fns] = {
    "a sum over tensor forgotten in x": {"layer": lambda weight, x, m: x + _columns(weight, x, m)},
    "a sum over tensor forgotten in the loss": _with(lambda w, x: {"loss": _part(w, x)}),
    "a sum over tensor forgotten in a metric": _with(lambda w, x: {"metrics": {"load": _part(w, x)}}),
    "a sum over tensor forgotten in stats": _with(lambda w, x: {"stats": {"load": (x @ w).sum(0)}}),
    "a rank of tensor in the loss of last": {
        "last": lambda shared, x, m: FNS["last"](shared, x, m) * jax.lax.axis_index("tensor")
    },
    "metrics of one name and two shapes": _with(lambda w, x: {"metrics": {"load": jnp.ones(3)}})
    | _last(metrics={"load": 1.0}),
    "metrics without names": _with(lambda w, x: {"metrics": [jnp.ones(3)]}),
    "a metric of many arrays": _with(lambda w, x: {"metrics": {"load": {"a": jnp.ones(3)}}}),
    "a metric named by a number": _with(lambda w, x: {"metrics": {3: x.sum()}}),
    "a complex metric": _with(lambda w, x: {"metrics": {"load": jnp.fft.fft(x).sum()}}),
    "text in stats": _with(lambda w, x: {"stats": {"load": "many"}}),
    "text in the loss": _with(lambda w, x: {"loss": "much"}),
    "a key in x": {"first": lambda shared, m: (m["x"], jax.random.key(0))},
    "stats of last": _last(stats={"load": 1.0}),
    "x of last": {"last": lambda shared, x, m: Output(x=x, loss=FNS["last"](shared, x, m))},
    "no loss of last": {"last": lambda shared, x, m: Output(metrics={"error": x.sum()})},
    "no x of a layer": {"layer": lambda weight, x, m: Output(loss=x.sum())},
    "a loss of many numbers in a layer": _with(lambda w, x: {"loss": x.sum(0)}),
    "keys without a key": {"layer": lambda weight, x, m, info: x * jax.random.uniform(info.keys()[0])},
}


def run(fns: Fns, given: dict[str, Any]) -> Any:
    summed = lambda weight, x, m: x + jax.lax.psum(_columns(weight, x, m), "tensor")  # noqa: E731
    functions: dict[str, Any] = FNS | {"layer": summed} | fns
    return pipeline_grads(StageFns(**functions, stage_specs=SPLIT), **given)


def test_results_that_would_be_lost_or_counted_wrongly_are_refused(golden: Golden) -> None:
    told, given = [], tiny_given("1x2x2")
    for name, fns in MISTAKES.items():
        with pytest.raises(TrellaxError) as caught:
            jax.eval_shape(lambda fns=fns: run(fns, given))
        told.append(f"# {name}\n{type(caught.value).__name__}: {caught.value}")
    golden("errors/pipeline/outputs.txt", "\n".join(told))


def test_a_metric_of_layers_and_last_is_one_sum() -> None:
    given = tiny_given("1x1x2")
    fns = _with(lambda w, x: {"metrics": {"calls": 1.0}}) | _last(metrics={"calls": 10.0})
    # Two layers and one end, in each of two microbatches.
    assert float(jax.jit(lambda: run(fns, given))().metrics["calls"]) == MICROBATCHES * (2 + 10)


def test_numbers_among_what_layers_pass_on_are_arrays_to_the_layers() -> None:
    """A Python number in the tree that `first` returns, on a mesh where nothing is marked."""
    given = tiny_given("1x1x1")
    fns: Fns = {
        "first": lambda shared, m: {"h": FNS["first"](shared, m), "factor": 2.0},
        "layer": lambda w, x, m: x | {"h": FNS["layer"](w, x["h"] * x["factor"], m)},
        "last": lambda shared, x, m: FNS["last"](shared, x["h"], m),
    }
    plain: Fns = {"layer": lambda w, x, m: FNS["layer"](w, x * 2.0, m)}
    params = PipelineParams(stages=np.asarray(given["params"].stages)[0, 0], shared=given["params"].shared)
    out = jax.jit(lambda: run(fns, given))()
    assert worst(out.loss, plain_loss(params, given["batch"], plain)) <= TOLERANCE


def test_kinds_of_layers_that_disagree_with_each_other_or_the_state_are_refused(golden: Golden) -> None:
    given, told = tiny_given("1x1x1"), []
    stages = given["params"].stages
    by_kind = {"dense": stages[:, :, :1], "gated": stages[:, :, 1:]}
    given["params"] = PipelineParams(stages=by_kind, shared=given["params"].shared)
    counted = lambda weight, x, m: Output(x=x, metrics={"load": jnp.ones(3)})  # noqa: E731
    summed = lambda weight, x, m: Output(x=x, metrics={"load": x.sum()})  # noqa: E731
    cases: dict[str, tuple[Any, Any]] = {
        "metrics of one name and two shapes": (summed, None),
        "state of one kind alone": (counted, {"dense": np.ones((1, 1, 1, WIDTH))}),
        "state of more layers than a kind has": (counted, {"dense": np.ones((1, 1, 2, WIDTH)), "gated": None}),
    }
    for name, (gated, state) in cases.items():
        functions: dict[str, Any] = FNS | {"layer": {"dense": counted, "gated": gated}}
        fns = StageFns(**functions, pattern=("dense", "gated"), num_layers=2)
        with pytest.raises(TrellaxError) as caught:
            jax.eval_shape(lambda fns=fns, state=state: pipeline_grads(fns, **given, state=state))
        told.append(f"# {name}\n{type(caught.value).__name__}: {caught.value}")
    golden("errors/pipeline/kinds.txt", "\n".join(told))
