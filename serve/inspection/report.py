"""Compile the programs of an engine, for devices that need not exist, and report what they take on each device.

Decoding is counted by the tick: what a rank does for one token of each sequence of a group. Loops and branches that
depend on data do what requests of a stated length that decode greedily make them do. Read `tables.py` for what is
printed, `least.py` for the bytes that must be read.
"""

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ...layers import ModelConfig, bytes_per_device
from ...layers.attention.cache import CacheDtype
from ...layers.attention.cached import block_tokens
from ...layers.options.check_config import windows_of_layers
from ...layers.quantized import Weights
from ...meshes import MeshAxes, ProgramError, mesh_sizes
from ...meshes.axes import DEFAULT_AXES
from ...programs import Hardware
from ...programs.memory import total_bytes
from ..compiled_programs import CompiledPrograms, compile_programs
from ..decode import ticks_of_round
from ..params import stage_shapes
from ..stacks import LayerLoop, default_loop
from ..state import ServeState, Sizes, state_shapes
from .costs import Costs, ProgramReader
from .least import least_bytes


@dataclass(frozen=True, kw_only=True)
class ServeMemory:
    """Bytes on each device; `temporary` of the program that needs most, `capacity` None if unknown."""

    weights: int
    cache: int
    state: int
    temporary: int
    capacity: int | None

    @property
    def total(self) -> int:
        """Bytes of all purposes."""
        return self.weights + self.cache + self.state + self.temporary


class Compiled(NamedTuple):
    """The programs of an engine, the shapes of its state and parameters, and the seconds that compiling took."""

    programs: CompiledPrograms
    state: ServeState
    params: Any
    compile_s: float


@dataclass(frozen=True, kw_only=True)
class ServeReport:
    """The costs of an engine's programs on each device.

    context: tokens of each sequence in the cache; ticks: of a round, one token of every sequence.
    least_weights, least_cache: bytes that the busiest device must read in a tick.
    """

    mesh: Mesh = field(repr=False)
    sizes: Sizes
    context: int
    ticks: int
    memory: ServeMemory
    decode: Costs
    prefill: Costs
    least_weights: float
    least_cache: float
    compiled: Compiled = field(repr=False)

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.mesh.devices.size

    @property
    def target(self) -> str:
        """Kind and number of the devices."""
        return f"{self.mesh.devices.flat[0].device_kind}:{self.devices}"

    @property
    def rows(self) -> int:
        """Number of sequences of a group, which are decoded together."""
        return self.sizes.group_size

    @property
    def ratio(self) -> float:
        """Bytes that a tick of decoding moves over those that it must read."""
        return self.decode.total_bytes / (self.least_weights + self.least_cache)

    @property
    def token_s(self) -> float | None:
        """Seconds of a token of a sequence at peak rates, None if unknown."""
        return None if self.decode.time_s is None else self.decode.time_s * self.ticks


def inspect_serving(
    config: ModelConfig,
    sizes: Sizes,
    *,
    mesh: Mesh,
    context: int,
    axes: MeshAxes = DEFAULT_AXES,
    cache_dtype: CacheDtype | None = None,
    weights: Weights = "plain",
    layers: LayerLoop | None = None,
    hardware: Hardware | None = None,
    devices_per_node: int | None = None,
) -> ServeReport:
    """Compile an engine's programs from shapes alone, and return the report on them; no array is allocated.

    Args:
        context: tokens of each sequence that are in the cache while it is decoded.

    Raises:
        ProgramError: the compiler rejects a program.
    """
    formats: dict[str, Any] = {"cache_dtype": cache_dtype or config.dtype, "weights": weights}
    compiled = _compile(config, sizes, mesh=mesh, axes=axes, layers=layers or default_loop(mesh), **formats)
    reader = ProgramReader(mesh=mesh, hardware=hardware, devices_per_node=devices_per_node or mesh.devices.size)
    blocks = _blocks(config, sizes, context)
    decode, busiest = reader.read(compiled.programs.decode, blocks=blocks[0])
    where: dict[str, Any] = {"mesh": mesh, "axes": axes, "rows": sizes.group_size, "context": context}
    least, rank = least_bytes(config, sizes, **where, **formats), _rank_of(busiest, mesh, axes.pipe)
    return ServeReport(
        mesh=mesh,
        sizes=sizes,
        context=context,
        ticks=ticks_of_round(sizes, mesh_sizes(mesh, axes=axes).pipe),
        memory=_count_memory(compiled, hardware),
        decode=decode,
        prefill=reader.read(compiled.programs.prefill, blocks=blocks[1])[0],
        least_weights=least.weights[rank],
        least_cache=least.cache[rank],
        compiled=compiled,
    )


def _blocks(config: ModelConfig, sizes: Sizes, context: int) -> tuple[int, int]:
    """Return the blocks of the cache that a layer reads in a tick of decoding, and for the first chunk of a prompt."""
    windows = windows_of_layers(config)
    # Layers with and without a window are one branch or the other of one program, counted as without.
    seen = context if 0 in windows else min(context, max(windows) + 1)
    decode = block_tokens(num_rows=sizes.group_size, num_tokens=1, window=config.attention_window)
    chunk = block_tokens(num_rows=1, num_tokens=sizes.chunk, window=config.attention_window)
    return -(-seen // decode), -(-min(sizes.chunk, context) // chunk)


def _compile(
    config: ModelConfig, sizes: Sizes, *, cache_dtype: CacheDtype, weights: Weights, layers: LayerLoop, **own: Any
) -> Compiled:
    own["layers"] = layers
    state = state_shapes(config, sizes, cache_dtype=cache_dtype, **own)
    params = stage_shapes(config, weights=weights, **own)
    start_s = time.perf_counter()
    try:
        programs = compile_programs(config, sizes, state=state, weights=weights, **own)
    except jax.errors.JaxRuntimeError as error:
        raise ProgramError(
            f"XLA cannot compile the programs of the engine: {str(error).strip().splitlines()[0][:300]}",
            fix="try another mesh; please report the program if `serve` runs it.",
        ) from error
    return Compiled(programs, state, params, time.perf_counter() - start_s)


def _count_memory(compiled: Compiled, hardware: Hardware | None) -> ServeMemory:
    programs = compiled.programs.prefill, compiled.programs.decode
    totals = [total_bytes(program.memory_analysis()) for program in programs]
    weights, cache, whole = map(bytes_per_device, (compiled.params, compiled.state.cache, compiled.state))
    return ServeMemory(
        weights=weights,
        cache=cache,
        state=whole - cache,
        temporary=max(totals) - weights - whole,
        capacity=None if hardware is None else hardware.memory_bytes,
    )


def _rank_of(device: int, mesh: Mesh, pipe: str) -> int:
    """Return the position along `pipe` of a device by its number in the mesh."""
    return int(np.unravel_index(device, mesh.devices.shape)[mesh.axis_names.index(pipe)])
