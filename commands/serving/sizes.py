"""Check the engine that `describe --serve` and `inspect --serve` report on, and return its sizes."""

import argparse
from dataclasses import dataclass

from ...configs.run_config import RunConfig
from ...layers import ModelConfig
from ...layers.attention.cache import CacheDtype
from ...layers.quantized import Weights
from ...meshes import MeshSpec
from ...serve import Sizes, check_model
from ..engine import check_formats

_CHUNK = 64
_CHUNKS_PER_STEP, _ROUNDS = 16, 8


@dataclass(frozen=True, kw_only=True)
class Served:
    """An engine that serves the model of a config, of which nothing is made."""

    config: ModelConfig
    spec: MeshSpec
    sizes: Sizes
    weights: Weights
    cache_dtype: CacheDtype


def served_by(config: RunConfig, spec: MeshSpec, args: argparse.Namespace) -> Served:
    """Return the engine of a config on a mesh whose sizes are all known, by the options of the command line.

    Raises:
        TrellaxError: model, mesh and sizes do not fit.
    """
    check_formats(argparse.Namespace(weights=args.weights or "plain", cache_dtype=args.cache_dtype))
    parts = spec.data * spec.pipe
    max_tokens = args.max_tokens or config.model.max_tokens
    check_model(config.model, spec.sizes, max_tokens=max_tokens, axes=spec.roles)
    sizes = Sizes(
        slots=args.slots or parts,
        max_tokens=max_tokens,
        groups=spec.pipe,
        num_shards=spec.data,
        chunk=args.chunk or _CHUNK,
        items=_CHUNKS_PER_STEP,
        rounds=_ROUNDS,
    )
    return Served(
        config=config.model,
        spec=spec,
        sizes=sizes,
        weights=args.weights or "plain",
        cache_dtype=args.cache_dtype or config.model.dtype,
    )
