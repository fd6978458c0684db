"""The smallest model that a pipeline runs: two layers of width 4, for tests of what functions may do."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from trellax.meshes import MeshSpec, build_mesh
from trellax.pipeline import PipelineParams, StageFns, natural_order, pipeline_grads
from trellax.schedules import Schedule, build_schedule

NUM_LAYERS, WIDTH, MICROBATCHES, BATCH = 2, 4, 2, 8

Fns = dict[str, Callable[..., Any]]

FNS: Fns = {
    "first": lambda shared, microbatch: microbatch["x"] * shared["scale"][None],
    "layer": lambda weight, x, microbatch: x + jnp.tanh(x @ weight),
    "last": lambda shared, x, microbatch: ((x - microbatch["y"]) ** 2).sum() / (BATCH * WIDTH),
}


def tiny_mesh(text: str) -> Mesh:
    """Return the mesh written as data x tensor x pipe."""
    data, tensor, pipe = map(int, text.split("x"))
    spec = MeshSpec(data=data, tensor=tensor, pipe=pipe)
    return build_mesh(spec, devices=jax.devices()[: spec.num_devices])


def tiny_given(mesh: str, *, schedule: str = "1f1b", dtype: str = "float32") -> dict[str, Any]:
    """Return params, batch, mesh and schedule, as both functions of the pipeline take them."""
    where, rng = tiny_mesh(mesh), np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    weights = draw(NUM_LAYERS, WIDTH, WIDTH).reshape(1, where.shape["pipe"], -1, WIDTH, WIDTH)
    own: Schedule = build_schedule(schedule, num_ranks=where.shape["pipe"], num_microbatches=MICROBATCHES)
    shape = MICROBATCHES, BATCH // MICROBATCHES, WIDTH
    return {
        "params": jax.tree.map(
            lambda leaf: leaf.astype(dtype), PipelineParams(stages=weights, shared={"scale": 1 + draw(WIDTH)})
        ),
        "batch": {"x": draw(*shape), "y": draw(*shape)},
        "mesh": where,
        "schedule": own,
    }


def grads_of(fns: Fns, given: dict[str, Any], **more: Any) -> tuple[jax.Array, PipelineParams]:
    """Return the loss and the gradients in natural order of layers."""
    functions: dict[str, Any] = FNS | fns
    run = lambda params, batch: pipeline_grads(  # noqa: E731
        StageFns(**functions, **more), **given | {"params": params, "batch": batch}
    )
    out = jax.jit(run)(given["params"], given["batch"])
    return out.loss, PipelineParams(stages=natural_order(out.grads.stages), shared=out.grads.shared)


def plain_loss(params: PipelineParams, batch: Any, fns: Fns) -> jax.Array:
    """The loss by plain calls of the functions, one microbatch after another."""
    own, loss = FNS | fns, jnp.float32(0)
    for index in range(MICROBATCHES):
        microbatch = jax.tree.map(lambda leaf, index=index: leaf[index], batch)
        x = own["first"](params.shared, microbatch)
        for weight in params.stages:
            x = own["layer"](weight, x, microbatch)
        loss = loss + own["last"](params.shared, x, microbatch)
    return loss


def natural(params: PipelineParams) -> PipelineParams:
    """Return parameters with stages in natural order of layers."""
    return PipelineParams(stages=natural_order(params.stages), shared=params.shared)


def worst(actual: Any, expected: Any) -> float:
    """Return the largest error of any leaf, relative to the largest entry of that leaf."""
    error = lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())  # noqa: E731
    return max(jax.tree.leaves(jax.tree.map(error, actual, expected)))
