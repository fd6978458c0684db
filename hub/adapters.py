"""Take the adapters out of a tree of parameters, put them back, and merge them into the kernels that they adapt.

Parameters are a tree {"embed", "blocks", "head"}; beside blocks.*.kernel [L, in, out] lie lora_a [L, in, r] and lora_b
[L, r, out]. A merged model is the model without adapters (Hu et al. 2021, section 4.1):

    kernel + (alpha / r) lora_a @ lora_b

With magnitudes lora_m [L, out] its columns are scaled to these lengths (Liu et al. 2024, equation 5).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..layers import ModelConfig
from ..layers.lora.adapter import column_lengths
from ..layers.lora.check_config import ADAPTERS, ATTENTION_TARGETS, MAGNITUDE, TRAINED, lora_scale, lora_targets

_A, _B = ADAPTERS


def without_lora(config: ModelConfig) -> ModelConfig:
    """Return the config of the model once its adapters are merged."""
    return replace(config, lora_rank=0, lora_alpha=0.0, lora_targets=(), lora_magnitude="off", lora_base="plain")


def adapters_of(params: Any) -> Any:
    """Return the tree with the parameters of adapters alone; {} where there are none."""
    return _filter(params, lambda name: name in TRAINED)


def without_adapters(params: Any) -> Any:
    """Return the tree without the parameters of adapters."""
    return _filter(params, lambda name: name not in TRAINED)


def _filter(tree: Any, is_kept: Callable[[str], bool]) -> Any:
    if not isinstance(tree, dict):
        return tree
    inner = {name: _filter(own, is_kept) for name, own in tree.items() if isinstance(own, dict) or is_kept(name)}
    return {name: own for name, own in inner.items() if not isinstance(own, dict) or own}


def join_adapters(params: Any, adapters: Any) -> Any:
    """Return the tree of both, undoing `without_adapters`."""
    if not isinstance(params, dict):
        return params
    both = {name: join_adapters(own, adapters.get(name, {})) for name, own in params.items()}
    return both | {name: own for name, own in adapters.items() if name in TRAINED}


def with_lengths(params: Any) -> Any:
    """Return the parameters with the lengths of the kernels' columns as magnitudes, where there are some."""
    if not isinstance(params, dict):
        return params
    found = {name: with_lengths(own) for name, own in params.items()}
    if MAGNITUDE in found:
        found[MAGNITUDE] = jax.jit(column_lengths, out_shardings=found[MAGNITUDE].sharding)(found["kernel"])
    return found


def layers_with_adapters(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Return the place of each layer with an adapter in the tree of a block, by its name."""
    parts = {name: "attention" if name in ATTENTION_TARGETS else "mlp" for name in lora_targets(config)}
    return {name: (part, name) for name, part in parts.items()}


def adapter_shapes(config: ModelConfig, shapes: Any) -> Any:
    """Return the shapes of a model's adapters in float32, split as the kernels among `shapes` are."""
    found: dict[str, Any] = {}
    for part, name in layers_with_adapters(config).values():
        kernel = shapes["blocks"][part][name]["kernel"]
        layers, d_in, d_out = [*kernel.sharding.spec, None, None, None][:3]
        sizes, rank, mesh = kernel.shape, config.lora_rank, kernel.sharding.mesh
        a = _shape((sizes[0], sizes[1], rank), NamedSharding(mesh, PartitionSpec(layers, d_in, None)))
        b = _shape((sizes[0], rank, sizes[2]), NamedSharding(mesh, PartitionSpec(layers, None, d_out)))
        found.setdefault(part, {})[name] = {_A: a, _B: b}
        if config.lora_magnitude == "on":
            spec = PartitionSpec(layers, d_out)
            found[part][name][MAGNITUDE] = _shape((sizes[0], sizes[2]), NamedSharding(mesh, spec))
    return {"blocks": found}


def _shape(sizes: tuple[int, ...], sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)


def merge_adapters(params: Any, adapters: Any, *, config: ModelConfig) -> Any:
    """Return the parameters with adapters merged; kernels that have one are donated. Products are in float32."""
    blocks = dict(params["blocks"])
    for part, name in layers_with_adapters(config).values():
        layer, own = blocks[part][name], adapters["blocks"][part][name]
        given = (layer["kernel"], own[_A], own[_B], own.get(MAGNITUDE))
        kernel = _merge_on(layer["kernel"].sharding)(*given, lora_scale(config))
        blocks[part] = blocks[part] | {name: layer | {"kernel": kernel}}
    return params | {"blocks": blocks}


@lru_cache(maxsize=16)
def _merge_on(sharding: Any) -> Any:
    def merge(kernel: jax.Array, a: jax.Array, b: jax.Array, m: jax.Array | None, scale: jax.Array) -> jax.Array:
        product = jnp.einsum("ldr,lrf->ldf", a, b, precision="highest", preferred_element_type=jnp.float32)
        merged = kernel.astype(jnp.float32) + jnp.float32(scale) * product
        merged = merged if m is None else merged * (m / column_lengths(merged))[:, None]
        return merged.astype(kernel.dtype)

    return jax.jit(merge, out_shardings=sharding, donate_argnums=0)
