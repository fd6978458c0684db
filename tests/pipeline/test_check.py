"""A user's functions and mesh are checked from shapes alone, with a way out in every error."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from trellax.meshes import MeshSpec, TrellaxError, build_mesh
from trellax.pipeline import PipelineParams, StageFns, build_schedule, pipeline_grads

FNS: dict[str, Callable[..., Any]] = {
    "first": lambda shared, microbatch: microbatch["x"],
    "layer": lambda params, x, microbatch: jnp.tanh(x @ params["w"]),
    "last": lambda shared, x, microbatch: (x**2).sum(),
}

MISTAKES: dict[str, dict[str, Callable[..., Any]]] = {
    "first_returns_a_dict": {"first": lambda shared, microbatch: microbatch},
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
    return pipeline_grads(
        StageFns(**functions),
        params=PipelineParams(stages=stages or {"w": jnp.ones((1, 2, 2, 8, 8))}, shared={}),
        batch={"x": jnp.ones((4, 8, 8))},
        mesh=mesh,
        schedule=build_schedule("1f1b", num_ranks=2, num_microbatches=4),
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_functions_that_do_not_fit_each_other_are_refused(name: str, golden: Callable[[str, str], None]) -> None:
    more = {"shared_specs": P()} if "together" in name else {}
    with pytest.raises(TrellaxError) as caught:
        run(FNS | MISTAKES[name], build_mesh(MeshSpec(data=4, pipe=2)), **more)
    golden(f"errors/fns_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


@pytest.mark.parametrize(("name", "counts"), [("too_few", (2,)), ("too_large", (1, 3)), ("empty", (2, 0))])
def test_counts_that_do_not_fit_the_parameters_are_refused(
    name: str, counts: tuple[int, ...], golden: Callable[[str, str], None]
) -> None:
    with pytest.raises(TrellaxError) as caught:
        run(FNS, build_mesh(MeshSpec(data=4, pipe=2)), layers_per_stage=counts)
    golden(f"errors/counts_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


@pytest.mark.parametrize(("name", "axes"), [("other_axes", ("stage", "dp")), ("explicit_axes", ("pipe", "data"))])
def test_mesh_that_is_not_ours_is_refused(name: str, axes: tuple[str, str], golden: Callable[[str, str], None]) -> None:
    with pytest.raises(TrellaxError) as caught:
        run(FNS, jax.make_mesh((2, 4), axes))
    golden(f"errors/mesh_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


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
    golden(f"errors/stages_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")
