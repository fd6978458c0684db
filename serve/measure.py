"""Measure the speed of an engine: time to the first token, time per further token, and the memory roofline.

Decoding reads all weights and the used cache for every token and computes little. The roofline is therefore the time
in which the fullest device reads them (Pope et al. 2022, section 2.1). `../commands/bench_decode.py` prints them.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from ..layers import ModelConfig
from ..meshes import MeshAxes
from ..meshes.axes import DEFAULT_AXES
from .engine import Engine
from .inspection.least import least_bytes
from .params import param_shapes
from .requests import Request, ServedSequence


@dataclass(frozen=True, kw_only=True)
class DecodeTimes:
    """Times of a batch of equal requests that are submitted at once.

    Args:
        first_token_s: median time from submission to a request's first token.
        per_token_s: median time between the tokens of a request after that.
        tokens_per_s: new tokens of all requests over the whole time.
        idle_share: share of ticks in which a stage was idle, mean over stages.
        read_bytes: bytes of weights and cache that the fullest device reads for one token of each sequence.
    """

    first_token_s: float
    per_token_s: float
    tokens_per_s: float
    idle_share: float
    read_bytes: float

    def roofline_share(self, memory_bytes_per_s: float) -> float:
        """Return the time to read `read_bytes` as a share of the measured time per token."""
        return self.read_bytes / memory_bytes_per_s / self.per_token_s


def measure_decode(engine: Engine, *, batch: int, prompt: int, new: int) -> DecodeTimes:
    """Time `batch` requests of `prompt` tokens with answers of `new` tokens (2 or more), after one warm-up batch.

    Raises:
        ServeError: the requests do not fit the cache.
    """
    vocab = engine.config.vocab_size
    requests = [
        Request(prompt=tuple((7 * i + 3 * t + 1) % vocab for t in range(prompt)), max_new_tokens=new)
        for i in range(batch)
    ]
    engine.generate(requests)
    token_times_s: dict[int, list[float]] = {}

    def record_time(sequence: ServedSequence, _token: int) -> None:
        token_times_s.setdefault(sequence.id, []).append(time.perf_counter())

    before, users_callback = engine.usage, engine.on_token
    engine.on_token = record_time
    start_s = time.perf_counter()
    engine.generate(requests)
    total_s = time.perf_counter() - start_s
    engine.on_token = users_callback
    after, all_times_s = engine.usage, list(token_times_s.values())
    ticks = after.decode_ticks + after.prefill_ticks - before.decode_ticks - before.prefill_ticks
    return DecodeTimes(
        first_token_s=statistics.median(times[0] for times in all_times_s) - start_s,
        per_token_s=statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in all_times_s),
        tokens_per_s=sum(map(len, all_times_s)) / total_s,
        idle_share=1 - float((after.busy - before.busy).mean()) / ticks,
        read_bytes=read_bytes(engine, batch=batch, context=prompt + new / 2),
    )


def read_bytes(engine: Engine, *, batch: int, context: float) -> float:
    """Return the bytes that the fullest device reads for one token of each of `batch` sequences of `context` tokens.

    They are the weights, once per group in flight, and the stored keys and values, without the unused cache.
    """
    rows = -(-batch // engine.spec.data)
    least = least_bytes(
        engine.config,
        engine.sizes,
        mesh=engine.mesh,
        axes=engine.axes,
        cache_dtype=engine.cache_dtype,
        weights=engine.weights,
        rows=rows,
        context=context,
    )
    groups = min(engine.sizes.groups, rows)
    return max(groups * own + cached for own, cached in zip(least.weights, least.cache, strict=True))


def draw_params(config: ModelConfig, mesh: Mesh, *, axes: MeshAxes = DEFAULT_AXES) -> Any:
    """Return random parameters in natural order, of which every device makes its part."""
    shapes = param_shapes(config, mesh=mesh, axes=axes)
    leaves, tree = jax.tree.flatten(shapes)

    def draw() -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return [0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]

    drawn = jax.jit(draw, out_shardings=[leaf.sharding for leaf in leaves])()
    return jax.tree.unflatten(tree, drawn)
