"""Compile the programs of an engine, prefill, decode and the counting of prompts, once for fixed shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..layers import ModelConfig
from ..layers.quantized import Weights
from ..meshes import MeshAxes, ShardingRules, mesh_sizes
from ..meshes.axes import DEFAULT_AXES
from ..meshes.processes.messages import require_one_program
from ..pipeline.model.trees import on_mesh
from .chunks import chunk_shapes
from .decode import decode
from .experts import with_room
from .params import stage_shapes
from .prefill import prefill
from .processes.place import with_placed_inputs
from .sampling.penalties import PromptPart, note_prompt
from .slots import SlotInputs, input_shapes, part_shapes
from .stacks import LayerLoop
from .stage import Stage, block_specs
from .state import ServeState, Sizes


@dataclass(frozen=True, kw_only=True)
class CompiledPrograms:
    """The compiled programs of an engine; the first two donate the state and return it, the last `state.seen`.

    prefill(params, state, slots, chunks, num_chunks) -> state, `Choice` of [P@pipe, data, I, ...]
    decode(params, state, slots, num_rounds) -> state, `Choice` of [P@pipe, rounds, B@data, ...]
    note_prompt(seen, part) -> seen, for a sequence that has a penalty, before its prefill
    """

    prefill: Any
    decode: Any
    note_prompt: Any


def compile_programs(
    config: ModelConfig,
    sizes: Sizes,
    *,
    mesh: Mesh,
    state: ServeState,
    layers: LayerLoop = "loop",
    axes: MeshAxes = DEFAULT_AXES,
    weights: Weights = "plain",
) -> CompiledPrograms:
    """Compile all programs for parameters of `stage_shapes` and a state of these shapes."""
    rules = ShardingRules.of(axes)
    own: dict[str, Any] = {"layers": layers, "axes": axes, "weights": weights}
    params = stage_shapes(config, mesh=mesh, **own)
    sharers = mesh_sizes(mesh, axes=axes).expert
    of_chunk, of_group = (with_room(config, num_tokens=sharers * count) for count in (sizes.chunk, sizes.group_size))
    prefills = decodes = Stage(of_group, mesh, **own)
    if of_chunk != of_group:
        prefills = Stage(of_chunk, mesh, **own)
    slots = input_shapes(sizes, vocab_size=config.vocab_size, mesh=mesh, rules=rules)
    chunks = chunk_shapes(sizes, mesh=mesh, rules=rules)
    pipe, data = on_mesh(rules.spec(("stage", "batch")), mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))

    def run_prefill(params: Any, state: ServeState, slots: SlotInputs, chunks: Any, num_chunks: jax.Array) -> Any:
        state, chosen = prefill(state, stage=prefills, params=params, slots=slots, chunks=chunks, num_chunks=num_chunks)
        return state, jax.tree.map(lambda leaf: leaf[None], chosen)

    def run_decode(params: Any, state: ServeState, slots: SlotInputs, num_rounds: jax.Array) -> Any:
        return decode(state, stage=decodes, sizes=sizes, params=params, slots=slots, num_rounds=num_rounds)

    return CompiledPrograms(
        prefill=compile_program(run_prefill, mesh, (params, state, slots, chunks, number), P(pipe, data)),
        decode=compile_program(run_decode, mesh, (params, state, slots, number), P(pipe, None, data)),
        note_prompt=_compile_note(state.seen, part_shapes(sizes, mesh=mesh, rules=rules), mesh, rules.axes("vocab")),
    )


def _compile_note(seen: Any, part: PromptPart, mesh: Mesh, axes: tuple[str, ...]) -> Any:
    specs = block_specs((seen, part), mesh)
    mapped = jax.shard_map(
        lambda seen, part: note_prompt(seen, part, axes=axes),
        mesh=mesh,
        in_specs=specs,
        out_specs=specs[0],
        axis_names=set(mesh.axis_names),
    )
    jitted = jax.jit(mapped, donate_argnums=0, out_shardings=seen.sharding)
    return _finish("counting of prompts", jitted.lower(seen, part), mesh, (seen, part))


def compile_program(run: Callable[..., Any], mesh: Mesh, shapes: tuple[Any, ...], tokens_spec: P) -> Any:
    """Compile run(params, state, ...) -> (state, chosen), which donates the state, for these shapes.

    All axes are manual, so that the partitioner adds no communication.
    """
    specs = block_specs(shapes, mesh)
    # The specs omit axes of one device, but results must have exactly the shardings that the next call expects.
    placed = jax.tree.map(lambda leaf: leaf.sharding, shapes[1])
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=(specs[1], tokens_spec), axis_names=set(mesh.axis_names)
    )
    # Every process must be able to read the tokens.
    chosen = NamedSharding(mesh, P() if mesh.is_multi_process else tokens_spec)
    jitted = jax.jit(mapped, donate_argnums=1, out_shardings=(placed, chosen))
    return _finish(run.__name__, jitted.lower(*shapes), mesh, shapes)


def _finish(what: str, lowered: Any, mesh: Mesh, shapes: tuple[Any, ...]) -> Any:
    """Compile; over several processes, the same program on all of them."""
    if not mesh.is_multi_process:
        return lowered.compile()
    require_one_program(what, lowered)
    return with_placed_inputs(lowered.compile(), shapes)
