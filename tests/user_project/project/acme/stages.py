"""A model of a user's as stage functions, on data of their own, with a schedule and rules of their own."""

from collections.abc import Iterator, Mapping
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from trellax.meshes import DEFAULT_RULES, MeshSpec, ShardingRules, build_mesh
from trellax.pipeline import LossAndGrads, PipelineParams, StageFns, pipeline_grads
from trellax.schedules import Schedule, build_schedule


def read(file: str, *, size: int) -> Iterator[dict[str, np.ndarray]]:
    numbers = np.load(file, mmap_mode="r")
    for first in range(0, len(numbers) - size, size):
        part = np.asarray(numbers[first : first + size], np.float32)
        yield {"x": part[None, :, :-1], "y": part[None, :, -1]}


def first(shared: Any, microbatch: Mapping[str, jax.Array]) -> jax.Array:
    return microbatch["x"] @ shared["into"]


def layer(params: Any, x: jax.Array, microbatch: Mapping[str, jax.Array]) -> jax.Array:
    return x + jnp.tanh(x @ params["w"])


def last(shared: Any, x: jax.Array, microbatch: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.square((x @ shared["out"])[..., 0] - microbatch["y"]).sum()


def step(params: PipelineParams, batch: dict[str, jax.Array]) -> jax.Array:
    mesh = build_mesh(MeshSpec(data=2, pipe=2))
    assert_type(mesh, Mesh)
    fns = StageFns(first=first, layer=layer, last=last, frozen=lambda name: name.endswith("into"))
    schedule = build_schedule("zb-h1", num_ranks=2, num_microbatches=4)
    assert_type(schedule, Schedule)
    out = pipeline_grads(fns, params=params, batch=batch, mesh=mesh, schedule=schedule)
    assert_type(out, LossAndGrads)
    return out.loss


def rules() -> ShardingRules:
    own = DEFAULT_RULES.replace(ffn=("tensor",))
    assert_type(own, ShardingRules)
    assert_type(own.spec(("batch", "ffn")), P)
    return own
