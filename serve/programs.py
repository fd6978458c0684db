"""The two programs of an engine, compiled once for shapes that never change: prefill and decode."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..layers import ModelConfig
from .decode import decode
from .params import Layers, stage_shapes
from .prefill import chunk_shapes, prefill
from .sampling import Choice
from .stage import Stage, block_specs
from .state import ServeState, Sizes, choice_shapes


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Compiled programs; both take the state as a donation and give it back.

    prefill(params, state, choice, chunks, num_chunks) -> state, first tokens [P@pipe, data, I, 2]
    decode(params, state, choice, num_rounds) -> state, tokens [P@pipe, rounds, B@data, 2]
    """

    prefill: Any
    decode: Any


def compile_programs(
    config: ModelConfig, sizes: Sizes, *, mesh: Mesh, state: ServeState, layers: Layers = "loop"
) -> Programs:
    """Return both programs for parameters as `stage_shapes` and a state of these shapes has them."""
    stage, params = Stage(config, mesh), stage_shapes(config, mesh=mesh, layers=layers)
    choice, chunks = choice_shapes(sizes, mesh=mesh), chunk_shapes(sizes, mesh=mesh)
    pipe, data = ("pipe" if mesh.shape["pipe"] > 1 else None), ("data" if mesh.shape["data"] > 1 else None)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))

    def run_prefill(params: Any, state: ServeState, choice: Choice, chunks: Any, num_chunks: jax.Array) -> Any:
        state, said = prefill(state, stage=stage, params=params, choice=choice, chunks=chunks, num_chunks=num_chunks)
        return state, said[None]

    def run_decode(params: Any, state: ServeState, choice: Choice, num_rounds: jax.Array) -> Any:
        return decode(state, stage=stage, sizes=sizes, params=params, choice=choice, num_rounds=num_rounds)

    return Programs(
        prefill=_compile(run_prefill, mesh, (params, state, choice, chunks, number), P(pipe, data)),
        decode=_compile(run_decode, mesh, (params, state, choice, number), P(pipe, None, data)),
    )


def _compile(run: Callable[..., Any], mesh: Mesh, shapes: tuple[Any, ...], said: P) -> Any:
    """Manual over all axes: the partitioner has nothing to decide, and what is sent is what the code says."""
    specs = block_specs(shapes, mesh)
    # The specs are without axes of one device, but the results must be placed exactly as the next call wants them.
    placed = jax.tree.map(lambda leaf: leaf.sharding, shapes[1])
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(specs[1], said), axis_names=set(mesh.axis_names))
    jitted = jax.jit(mapped, donate_argnums=1, out_shardings=(placed, NamedSharding(mesh, said)))
    return jitted.lower(*shapes).compile()
