"""How fast an engine answers: time to the first token, time for each further one, and what memory would allow.

Decoding reads all weights and all that is cached for every token, and computes little: the time that the memory of the
fullest device needs for that is the roofline (Pope et al. 2022, section 2.1). Printed by
`../commands/bench_decode.py`.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from ..layers import ModelConfig, bytes_per_device
from .engine import Engine
from .params import layers_of_stages, param_shapes, stage_shapes
from .requests import Request, Sequence


@dataclass(frozen=True, kw_only=True)
class DecodeTimes:
    """What a batch of equal requests took, all submitted at once.

    Args:
        first_token_s: median time from submission to a request's first token.
        per_token_s: median time between the tokens of a request after that.
        tokens_per_s: new tokens of all requests over the whole time.
        idle_share: share of ticks in which a stage had nothing to do, mean over stages.
        read_bytes: what the fullest device reads for a token of each sequence, weights and cache.
    """

    first_token_s: float
    per_token_s: float
    tokens_per_s: float
    idle_share: float
    read_bytes: float

    def roofline_share(self, memory_bytes_per_s: float) -> float:
        """Return the time that the fullest device's memory needs over the time that was taken."""
        return self.read_bytes / memory_bytes_per_s / self.per_token_s


def measure_decode(engine: Engine, *, batch: int, prompt: int, new: int) -> DecodeTimes:
    """Return the times of `batch` requests with `prompt` tokens each and `new` in answer, after one round to warm up.

    Raises:
        ServeError: they do not fit the cache.
    """
    vocab = engine.config.vocab_size
    requests = [
        Request(prompt=tuple((7 * i + 3 * t + 1) % vocab for t in range(prompt)), max_new_tokens=new)
        for i in range(batch)
    ]
    engine.generate(requests)
    heard: dict[int, list[float]] = {}

    def hear(sequence: Sequence, _token: int) -> None:
        heard.setdefault(sequence.id, []).append(time.perf_counter())

    before, heard_before, engine.on_token = engine.usage, engine.on_token, hear
    start_s = time.perf_counter()
    engine.generate(requests)
    total_s, engine.on_token = time.perf_counter() - start_s, heard_before
    after = engine.usage
    ticks = after.decode_ticks + after.prefill_ticks - before.decode_ticks - before.prefill_ticks
    return DecodeTimes(
        first_token_s=statistics.median(times[0] for times in heard.values()) - start_s,
        per_token_s=statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in heard.values()),
        tokens_per_s=sum(map(len, heard.values())) / total_s,
        idle_share=1 - float((after.busy - before.busy).mean()) / ticks,
        read_bytes=read_bytes(engine, batch=batch, context=prompt + new / 2),
    )


def read_bytes(engine: Engine, *, batch: int, context: float) -> float:
    """Return what the fullest device must read for one token of each of `batch` sequences of `context` tokens.

    Weights once for each group that is in flight, and the keys and values that are there, not those there is room for.
    """
    config, mesh = engine.config, engine.mesh
    params = stage_shapes(config, mesh=mesh)
    counts = layers_of_stages(config, num_ranks=mesh.shape["pipe"])
    layer = bytes_per_device(params["blocks"]) / max(counts)
    table = params["embed"]["table"] if config.embeddings == "tied" else params["head"]["table"]
    weights = [count * layer for count in counts]
    weights[-1] += bytes_per_device(table)
    rows = -(-batch // mesh.shape["data"])
    token = bytes_per_device(engine.shapes.cache.keys) * 2 / (max(counts) * engine.sizes.slots_per_shard)
    cache = [count * rows * context * token / engine.sizes.max_tokens for count in counts]
    groups = min(engine.sizes.groups, rows)
    return max(groups * own + cached for own, cached in zip(weights, cache, strict=True))


def draw_params(config: ModelConfig, mesh: Mesh) -> Any:
    """Return random parameters in natural order, as a reader would deliver them, every device drawing its part."""
    shapes = param_shapes(config, mesh=mesh)
    leaves, tree = jax.tree.flatten(shapes)

    def draw() -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return [0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]

    drawn = jax.jit(draw, out_shardings=[leaf.sharding for leaf in leaves])()
    return jax.tree.unflatten(tree, drawn)
