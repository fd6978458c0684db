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
from ..layers.lora.linears import HEAD, Linear, adapted_of, has_adapted_head, head_linear

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
        lengths = column_lengths if "kernel" in found else _row_lengths
        kernel = found.get("kernel", found.get("table"))
        found[MAGNITUDE] = jax.jit(lengths, out_shardings=found[MAGNITUDE].sharding)(kernel)
    return found


def _row_lengths(table_VD: jax.Array) -> jax.Array:
    return column_lengths(table_VD.T)


@dataclass(frozen=True, kw_only=True)
class AdaptedKernel:
    """A kernel with an adapter, or those of all experts, in the tree {"embed", "blocks", "head"}.

    path: names of the nodes that lead to its parameters, ("blocks", "mlp", "up") say.
    linear: which linear layer it is.
    """

    path: tuple[str, ...]
    linear: Linear

    @property
    def is_head(self) -> bool:
        """Whether it is the output table [V, D], beside which B is [V, r]."""
        return self.linear.name == HEAD

    @property
    def kernel(self) -> str:
        """The name of the kernel among its parameters."""
        return "table" if self.is_head else "kernel"


def adapted_kernels(config: ModelConfig) -> tuple[AdaptedKernel, ...]:
    """Return the kernels of a model that have adapters; where layers are of two kinds, those of each."""
    of_blocks = tuple(
        AdaptedKernel(path=("blocks", *([kind.name] if kind.name else []), *one.place), linear=one)
        for kind in layer_kinds(config)
        for one in adapted_of(kind.config)
    )
    own = head_linear(config)
    return (*of_blocks, AdaptedKernel(path=(HEAD,), linear=own)) if has_adapted_head(config) else of_blocks


def adapter_shapes(config: ModelConfig, shapes: Any) -> Any:
    """Return the shapes of a model's adapters in float32, split as the kernels among `shapes` are."""
    found: dict[str, Any] = {}
    for own in adapted_kernels(config):
        kernel = node_at(shapes, own.path)[own.kernel]
        node = found
        for name in own.path:
            node = node.setdefault(name, {})
        node |= _adapter_of(own, kernel, rank=config.lora_rank)
        if config.lora_magnitude == "off":
            del node[MAGNITUDE]
    return found


def _adapter_of(own: AdaptedKernel, kernel: jax.ShapeDtypeStruct, *, rank: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the adapter and of the magnitudes of a kernel [..., in, out], or of the table [V, D]."""
    # Layers, and experts if there are some, are the leading dimensions.
    *lead, d_in, d_out = kernel.shape[::-1] if own.is_head else kernel.shape
    spec = [*kernel.sharding.spec, *[None] * len(kernel.shape)][: len(kernel.shape)]
    *first, row, column = spec[::-1] if own.is_head else spec
    b: tuple[Any, Any] = (*lead, rank, d_out), (*first, None, column)
    # The head's has a row for each word, as its table has.
    b = (b[0][::-1], b[1][::-1]) if own.is_head else b
    sizes: dict[str, Any] = {_A: (*lead, d_in, rank), _B: b[0], MAGNITUDE: (*lead, d_out)}
    specs: dict[str, Any] = {_A: (*first, row, None), _B: b[1], MAGNITUDE: (*first, column)}
    mesh = kernel.sharding.mesh
    return {name: _shape(size, NamedSharding(mesh, PartitionSpec(*specs[name]))) for name, size in sizes.items()}


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
        given = (layer[own.kernel], added[_A], added[_B], added.get(MAGNITUDE))
        merge = _merge_table_on if own.is_head else _merge_on
        kernel = merge(layer[own.kernel].sharding)(*given, lora_scale(config))
        params = _replace(params, (*own.path, own.kernel), kernel)
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


@lru_cache(maxsize=4)
def _merge_table_on(sharding: Any) -> Any:
    def merge(table: jax.Array, a: jax.Array, b: jax.Array, m: jax.Array | None, scale: jax.Array) -> jax.Array:
        product = jnp.einsum("dr,vr->dv", a, b, precision="highest", preferred_element_type=jnp.float32)
        return merged(table.T, jnp.float32(scale) * product, m).T.astype(table.dtype)

    return jax.jit(merge, out_shardings=sharding, donate_argnums=0)
