"""Take the adapters out of a tree of parameters, put them back, and merge them into the kernels that they adapt.

Parameters are a tree {"embed", "blocks", "head"}; beside blocks.*.kernel [L, in, out] lie lora_a [L, in, r] and lora_b
[L, r, out]; those of experts are [L, E, ...]. A merged model is the model without adapters (Hu et al. 2021, section
4.1):

    kernel + (alpha / r) lora_a @ lora_b

With magnitudes lora_m [L, out] its columns are scaled to these lengths (Liu et al. 2024, equation 5).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..layers import ModelConfig
from ..layers.experts.kinds import layer_kinds
from ..layers.lora.adapter import column_lengths, merged
from ..layers.lora.check_config import ADAPTERS, MAGNITUDE, TRAINED, lora_scale
from ..layers.lora.linears import Linear, adapted_of

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


@dataclass(frozen=True, kw_only=True)
class AdaptedKernel:
    """A kernel with an adapter, or those of all experts, in the tree {"embed", "blocks", "head"}.

    path: names of the nodes that lead to its parameters, ("blocks", "mlp", "up") say.
    linear: which linear layer it is.
    """

    path: tuple[str, ...]
    linear: Linear


def adapted_kernels(config: ModelConfig) -> tuple[AdaptedKernel, ...]:
    """Return the kernels of a model that have adapters; where layers are of two kinds, those of each."""
    return tuple(
        AdaptedKernel(path=("blocks", *([kind.name] if kind.name else []), *one.place), linear=one)
        for kind in layer_kinds(config)
        for one in adapted_of(kind.config)
    )


def adapter_shapes(config: ModelConfig, shapes: Any) -> Any:
    """Return the shapes of a model's adapters in float32, split as the kernels among `shapes` are."""
    found: dict[str, Any] = {}
    for own in adapted_kernels(config):
        kernel = node_at(shapes, own.path)["kernel"]
        # Layers, and experts if there are some, are the leading dimensions.
        (*lead, d_in, d_out), mesh = kernel.shape, kernel.sharding.mesh
        *first, row, column = [*kernel.sharding.spec, *[None] * len(kernel.shape)][: len(kernel.shape)]
        sizes = {_A: (*lead, d_in, config.lora_rank), _B: (*lead, config.lora_rank, d_out)}
        specs = {_A: PartitionSpec(*first, row, None), _B: PartitionSpec(*first, None, column)}
        if config.lora_magnitude == "on":
            sizes[MAGNITUDE], specs[MAGNITUDE] = (*lead, d_out), PartitionSpec(*first, column)
        node = found
        for name in own.path:
            node = node.setdefault(name, {})
        node |= {name: _shape(size, NamedSharding(mesh, specs[name])) for name, size in sizes.items()}
    return found


def node_at(tree: Any, path: tuple[str, ...]) -> Any:
    """Return a node of a tree of parameters, by the names that lead to it."""
    for name in path:
        tree = tree[name]
    return tree


def _shape(sizes: tuple[int, ...], sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)


def merge_adapters(params: Any, adapters: Any, *, config: ModelConfig) -> Any:
    """Return the parameters with adapters merged; kernels that have one are donated. Products are in float32."""
    for own in adapted_kernels(config):
        layer, added = node_at(params, own.path), node_at(adapters, own.path)
        given = (layer["kernel"], added[_A], added[_B], added.get(MAGNITUDE))
        kernel = _merge_on(layer["kernel"].sharding)(*given, lora_scale(config))
        params = _replace(params, (*own.path, "kernel"), kernel)
    return params


def _replace(tree: Any, path: tuple[str, ...], leaf: jax.Array) -> Any:
    """Return a tree with another leaf in the place to which names lead; the tree itself stays as it is."""
    return tree | {path[0]: _replace(tree[path[0]], path[1:], leaf)} if path else leaf


@lru_cache(maxsize=16)
def _merge_on(sharding: Any) -> Any:
    def merge(kernel: jax.Array, a: jax.Array, b: jax.Array, m: jax.Array | None, scale: jax.Array) -> jax.Array:
        product = jnp.einsum("...dr,...rf->...df", a, b, precision="highest", preferred_element_type=jnp.float32)
        return merged(kernel, jnp.float32(scale) * product, m).astype(kernel.dtype)

    return jax.jit(merge, out_shardings=sharding, donate_argnums=0)
