"""Functions, mesh and arguments are checked from shapes alone, and every error names a fix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from trellax.meshes import MeshSpec, TrellaxError, build_mesh
from trellax.pipeline import Output, PipelineParams, StageFns, pipeline_grads
from trellax.schedules import build_schedule

FNS: dict[str, Any] = {
    "first": lambda shared, microbatch: microbatch["x"],
    "layer": lambda params, x, microbatch: jnp.tanh(x @ params["w"]),
    "last": lambda shared, x, microbatch: (x**2).sum(),
}

MISTAKES: dict[str, dict[str, Callable[..., Any]]] = {
    "first_returns_integers": {"first": lambda shared, microbatch: microbatch["x"].astype(int)},
    "prepare_is_not_linear": {"prepare": lambda params: {"w": jnp.tanh(params["w"])}},
    "first_returns_an_output": {"first": lambda shared, microbatch: Output(x=microbatch["x"])},
    "layer_changes_the_dtype": {"layer": lambda params, x, microbatch: x.astype(jnp.bfloat16)},
    "layer_changes_the_shape": {"layer": lambda params, x, microbatch: x[:, :4]},
    "layer_returns_a_pair": {"layer": lambda params, x, microbatch: (x, x)},
    "last_returns_an_array": {"last": lambda shared, x, microbatch: x.sum(-1)},
    "last_returns_bfloat16": {"last": lambda shared, x, microbatch: x.sum().astype(jnp.bfloat16)},
    "first_together_is_not_summed": {"first": lambda shared, microbatch: microbatch["x"] + jax.lax.axis_index("pipe")},
    "last_together_is_not_summed": {"last": lambda shared, x, microbatch: (x + jax.lax.axis_index("pipe")).sum()},
}


def run(fns: dict[str, Callable[..., Any]], mesh: Mesh, *, stages: Any = None, **more: Any) -> Any:
    functions: dict[str, Any] = fns | more
    own = stages or {"w": jnp.ones((1, 2, 2, 8, 8))}
    shared = {"table": jnp.ones((8, 8))}
    return call(mesh=mesh, fns=StageFns(**functions), params=PipelineParams(stages=own, shared=shared))


def call(**given: Any) -> Any:
    arguments: dict[str, Any] = {
        "fns": StageFns(**FNS),
        "params": PipelineParams(stages={"w": jnp.ones((1, 2, 2, 8, 8))}, shared={}),
        "batch": {"x": jnp.ones((4, 8, 8))},
        "mesh": build_mesh(MeshSpec(data=4, pipe=2)),
        "schedule": build_schedule("1f1b", num_ranks=2, num_microbatches=4),
    }
    arguments |= given
    return pipeline_grads(arguments.pop("fns"), **arguments)


@pytest.mark.parametrize("name", MISTAKES)
def test_functions_that_do_not_fit_each_other_are_refused(name: str, golden: Callable[[str, str], None]) -> None:
    more = {"shared_specs": {"table": P("pipe")}} if "together" in name else {}
    with pytest.raises(TrellaxError) as caught:
        run(FNS | MISTAKES[name], build_mesh(MeshSpec(data=4, pipe=2)), **more)
    golden(f"errors/pipeline/fns_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


@pytest.mark.parametrize(("name", "counts"), [("too_few", (2,)), ("too_large", (1, 3)), ("empty", (2, 0))])
def test_counts_that_do_not_fit_the_parameters_are_refused(
    name: str, counts: tuple[int, ...], golden: Callable[[str, str], None]
) -> None:
    with pytest.raises(TrellaxError) as caught:
        run(FNS, build_mesh(MeshSpec(data=4, pipe=2)), layers_per_stage=counts)
    golden(f"errors/pipeline/counts_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


def _shared(leaf: Any, **more: Any) -> dict[str, Any]:
    """Arguments with one shared parameter."""
    stages = {"w": jnp.ones((1, 2, 2, 8, 8))}
    params = PipelineParams(stages=stages, shared={"own": leaf})
    return {"params": params} | ({"fns": StageFns(**FNS, **more)} if more else {})


ROUNDABOUT: dict[str, Callable[[], dict[str, Any]]] = {
    "functions in a tuple": lambda: {"fns": tuple(FNS.values())},
    "a function that is none": lambda: {"fns": StageFns(**FNS | {"last": "loss"})},
    "parameters in a dict": lambda: {"params": {"stages": {"w": jnp.ones((1, 2, 2, 8, 8))}, "shared": {}}},
    "a mesh in text": lambda: {"mesh": "data=4,pipe=2"},
    "a schedule in text": lambda: {"schedule": "1f1b"},
    "bubbles of another kind": lambda: {"bubbles": "nans"},
    "a Python number": lambda: _shared(0.5),
    "complex numbers": lambda: _shared(np.ones(3, np.complex64)),
    "specs of another tree": lambda: _shared(np.ones(4), shared_specs={"other": P()}),
    "specs over data and pipe": lambda: _shared(np.ones(8), shared_specs={"own": P(("data", "pipe"))}),
    "specs over data twice": lambda: {"fns": StageFns(**FNS, stage_specs=P(("data", "tensor"), None))},
    "stage specs over pipe": lambda: {"fns": StageFns(**FNS, stage_specs={"w": P("pipe")})},
    "stage specs of more dimensions": lambda: {"fns": StageFns(**FNS, stage_specs=P(None, None, "tensor"))},
    "stage specs of a name nearby": lambda: {"fns": StageFns(**FNS, stage_specs=P(None, "tenso"))},
    "stage specs over an axis twice": lambda: {"fns": StageFns(**FNS, stage_specs=P("tensor", "tensor"))},
    "stage specs that do not divide": lambda: {
        "fns": StageFns(**FNS, stage_specs=P(None, "tensor")),
        "params": PipelineParams(stages={"w": jnp.ones((1, 2, 2, 8, 7))}, shared={}),
        "mesh": build_mesh(MeshSpec(data=2, tensor=2, pipe=2)),
    },
    "state of all layers in a row": lambda: {"state": {"bias": np.ones((4, 8), np.float32)}},
    "state of numbers": lambda: {"state": {"bias": 1.0}},
    "a seed in place of a key": lambda: {"key": 7},
    "two keys in place of one": lambda: {"key": jax.random.split(jax.random.key(0), 2)},
    "floats in place of a key": lambda: {"key": np.zeros(2, np.float32)},
    "specs in text": lambda: _shared(np.ones(4), shared_specs={"own": "pipe"}),
    "specs of more dimensions": lambda: _shared(np.ones(4), shared_specs={"own": P(None, "pipe")}),
    "specs that do not divide": lambda: _shared(np.ones(5), shared_specs={"own": P("pipe")}),
    "a mesh with an axis more": lambda: {"mesh": _mesh_of_three()},
    "four layers, three of which would run": lambda: {"fns": StageFns(**FNS, layers_per_stage=(2, 1))},
    "three of four layers": lambda: {"fns": StageFns(**FNS, layers_per_stage=(2, 1), num_layers=4)},
    "five layers in four places": lambda: {"fns": StageFns(**FNS, num_layers=5)},
    "layers in text": lambda: {"fns": StageFns(**FNS | {"layers_per_stage": "2,2"})},
    "half a layer": lambda: {"fns": StageFns(**FNS | {"layers_per_stage": (2, 1.5)})},
    "prepare given integers": lambda: {
        "fns": StageFns(**FNS, prepare=lambda params: params),
        "params": PipelineParams(stages={"w": jnp.ones((1, 2, 2, 8, 8), int)}, shared={}),
    },
}


def _mesh_of_three() -> Mesh:
    return jax.make_mesh((2, 2, 2), ("pipe", "data", "batch"), axis_types=(AxisType.Auto,) * 3)


def test_arguments_of_another_kind_are_refused_in_a_sentence(golden: Callable[[str, str], None]) -> None:
    told = []
    for name, make in ROUNDABOUT.items():
        with pytest.raises(TrellaxError) as caught:
            call(**make())
        told.append(f"# {name}\n{type(caught.value).__name__}: {caught.value}")
    golden("errors/pipeline/arguments.txt", "\n".join(told))


def test_a_further_axis_of_one_device_is_ignored() -> None:
    mesh = jax.make_mesh((2, 4, 1), ("pipe", "data", "batch"), axis_types=(AxisType.Auto,) * 3)
    assert jax.eval_shape(lambda: call(mesh=mesh)).loss.shape == ()


@pytest.mark.parametrize("pipe", [1, 2])
def test_none_in_place_of_a_parameter_has_none_for_a_gradient(pipe: int) -> None:
    stages = {"w": jnp.ones((1, pipe, 2, 8, 8)), "bias": None}
    given = {
        "params": PipelineParams(stages=stages, shared={"bias": None}),
        "mesh": build_mesh(MeshSpec(data=8 // pipe, pipe=pipe)),
        "schedule": build_schedule("1f1b", num_ranks=pipe, num_microbatches=4),
    }
    grads = jax.eval_shape(lambda: call(**given)).grads
    assert jax.tree.structure(grads) == jax.tree.structure(given["params"])


def test_constants_that_prepare_returns_need_no_gradient() -> None:
    fns = StageFns(**FNS, prepare=lambda params: params | {"mask": jnp.ones(3)})
    assert jax.eval_shape(lambda: call(fns=fns)).grads.stages["w"].shape == (1, 2, 2, 8, 8)


@pytest.mark.parametrize(("name", "axes"), [("other_axes", ("stage", "dp")), ("explicit_axes", ("pipe", "data"))])
def test_mesh_of_unknown_or_explicit_axes_is_refused(
    name: str, axes: tuple[str, str], golden: Callable[[str, str], None]
) -> None:
    with pytest.raises(TrellaxError) as caught:
        run(FNS, jax.make_mesh((2, 4), axes))
    golden(f"errors/pipeline/mesh_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("unequal_layers", {"w": (1, 2, 2, 8, 8), "v": (1, 2, 3)}),
        ("no_layer_dimension", {"w": (1, 2)}),
        ("no_layers", {"w": (1, 2, 0, 8, 8)}),
    ],
)
def test_stage_parameters_that_would_lose_a_layer_are_refused(
    name: str, shapes: dict[str, tuple[int, ...]], golden: Callable[[str, str], None]
) -> None:
    stages = {leaf: jnp.ones(shape) for leaf, shape in shapes.items()}
    with pytest.raises(TrellaxError) as caught:
        run(FNS, build_mesh(MeshSpec(data=4, pipe=2)), stages=stages)
    golden(f"errors/pipeline/stages_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")
