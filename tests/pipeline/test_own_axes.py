"""The law on meshes whose axes have names of their own, and on meshes with several axes of one role.

Reference and tolerance are those of `test_law.py`: only the names and the number of axes differ.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.meshes import Axis, MeshAxes, MeshError, MeshSpec, build_mesh
from trellax.pipeline import PipelineParams, StageFns, pipeline_grads, split_transformer, stages_from_layers
from trellax.schedules import build_schedule

from .law import answer_of, beyond, broken, errors_of, one_device, pipeline_step, small_model

TOLERANCE = 2e-5

OWN_NAMES = "dp=2:batch,tp=2:tensor,pp=2:pipe"
TWO_BATCH_AXES = "replica=2:batch,data=2,pipe=2"
TWO_BATCH_AXES_ALONE = "replica=2:batch,dp=2:batch,tp=2:tensor"
TWO_TENSOR_AXES = "outer=2:tensor,inner=2:tensor,pp=2:pipe"

CASES: dict[str, dict[str, Any]] = {
    "own-1f1b": {"mesh": OWN_NAMES, "schedule": "1f1b", "num_microbatches": 3},
    "own-zb-h1-split": {"mesh": OWN_NAMES, "schedule": "zb-h1", "num_microbatches": 8, "vocab": "split"},
    "own-interleaved": {"mesh": OWN_NAMES, "schedule": "interleaved-1f1b", "num_microbatches": 2, "num_chunks": 2},
    "two-batch-gpipe": {"mesh": TWO_BATCH_AXES, "schedule": "gpipe", "num_microbatches": 2},
    "two-batch-1f1b-split": {"mesh": TWO_BATCH_AXES, "schedule": "1f1b", "num_microbatches": 3, "vocab": "split"},
    "two-batch-zb-h1": {"mesh": TWO_BATCH_AXES, "schedule": "zb-h1", "num_microbatches": 2, "remat": "dots"},
    "two-batch-one-stage": {"mesh": TWO_BATCH_AXES_ALONE, "schedule": "1f1b", "num_microbatches": 2},
    "two-tensor-1f1b-split": {"mesh": TWO_TENSOR_AXES, "schedule": "1f1b", "num_microbatches": 3, "vocab": "split"},
    "two-tensor-zb-h1": {"mesh": TWO_TENSOR_AXES, "schedule": "zb-h1", "num_microbatches": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_norm_equal_one_device(name: str) -> None:
    # Grouped-query heads with untied tables, as each of the axes splits something of its own there.
    config = small_model(style="llama", attention="gqa", embeddings="untied")
    num_sequences = 24 if CASES[name]["num_microbatches"] == 3 else 16
    step = pipeline_step(config, num_sequences=num_sequences, **CASES[name])
    assert beyond(errors_of(answer_of(step), one_device(config, num_sequences)), tolerance=TOLERANCE) == {}


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])
def test_own_stage_functions_sum_over_the_axes_that_they_name(schedule: str) -> None:
    spec = MeshSpec.of(dp=Axis(2, role="batch"), tp=Axis(2, role="tensor"), pp=Axis(2, role="pipe"))
    rng = np.random.default_rng(0)
    ups_LDF, downs_LFD = (rng.standard_normal(shape).astype(np.float32) / 4 for shape in ((4, 8, 16), (4, 16, 8)))
    batch = {name: rng.standard_normal((4, 4, 8)).astype(np.float32) for name in ("x", "y")}

    def layer(params: Any, x: jax.Array, _: Any) -> jax.Array:
        return x + jax.lax.psum(jnp.tanh(x @ params["up"]) @ params["down"], "tp")

    def last(_: Any, x: jax.Array, microbatch: Any) -> jax.Array:
        return ((x - microbatch["y"]) ** 2).sum() / 64

    def whole(layers: Any) -> jax.Array:
        x = batch["x"]
        for up, down in zip(layers["up"], layers["down"], strict=True):
            x = x + jnp.tanh(x @ up) @ down
        return ((x - batch["y"]) ** 2).sum() / 64

    layers = {"up": jnp.asarray(ups_LDF), "down": jnp.asarray(downs_LFD)}
    fns = StageFns(
        first=lambda _, microbatch: microbatch["x"],
        layer=layer,
        last=last,
        axes=spec.roles,
        stage_specs={"up": P(None, "tp"), "down": P("tp")},
    )
    out = jax.jit(
        lambda params: pipeline_grads(
            fns,
            params=params,
            batch=batch,
            mesh=build_mesh(spec),
            schedule=build_schedule(schedule, num_ranks=2, num_microbatches=4),
        )
    )(PipelineParams(stages=stages_from_layers(layers, num_ranks=2), shared={}))
    loss, grads = jax.value_and_grad(whole)(layers)
    np.testing.assert_allclose(out.loss, loss, rtol=TOLERANCE)
    for name, grad in grads.items():
        actual = np.asarray(out.grads.stages[name]).reshape(grad.shape)
        np.testing.assert_allclose(actual, grad, rtol=TOLERANCE, atol=TOLERANCE * float(jnp.abs(grad).max()))


def test_order_of_a_spec_is_that_of_the_devices() -> None:
    spec = MeshSpec.parse("pp=2:pipe,tp=2:tensor,dp=2:batch")
    assert build_mesh(spec).axis_names == spec.roles.names == ("pp", "dp", "tp")


def test_transformer_is_not_cut_for_axes_without_a_role() -> None:
    mesh = build_mesh(MeshSpec.parse(OWN_NAMES))
    with pytest.raises(MeshError, match="mesh axis pp=2 has no role"):
        split_transformer(small_model(), mesh=mesh)


def test_devices_of_the_role_shard_equal_one_device() -> None:
    step = {"mesh": "own=2:shard,dp=2:batch,pp=2:pipe", "schedule": "1f1b", "num_microbatches": 2}
    assert broken(small_model(), tolerance=2e-5, num_sequences=16, shard="layer", **step) == {}


def test_roles_can_be_given_without_a_spec() -> None:
    axes = MeshAxes.of(stages="pipe", replica="batch", data="batch", model="tensor")
    assert (axes.pipe, axes.batch, axes.tensor) == ("stages", ("replica", "data"), ("model",))
