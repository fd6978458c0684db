"""Hold frozen kernels in four bits once they are read, and round those that adapters are merged into likewise.

A file has kernels [L, in, out]; a model with `lora_base = "nf4"` wants values and scales in their place:

    blocks.mlp.up.kernel    ->    blocks.mlp.up.kernel uint8 [L, in/2, out], blocks.mlp.up.kernel_scale [L, in/64, out]
"""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..layers import ModelConfig
from ..layers.experts.kinds import layer_kinds
from ..layers.lora.linears import linears_of
from ..layers.lora.nf4 import block_dim, is_nf4, quantize_nf4, round_nf4, whole_shape
from ..layers.quantized import SCALE
from .saves.paths import leaves_by_path, path_text


class _Held(NamedTuple):
    """A kernel of four bits, in the place of a plain one."""

    values: jax.Array
    scale: jax.Array


class FrozenKernels:
    """The kernels of a model as files have them, and as the model holds them.

    >>> frozen = FrozenKernels(shapes)
    >>> params = frozen.unpack(load_params(folder, frozen.plain, each=frozen.hold))

    Args:
        shapes: a tree {"embed", "blocks", "head"} of `jax.ShapeDtypeStruct` with shardings, without adapters.
    """

    def __init__(self, shapes: dict[str, Any]) -> None:
        self.plain = _plain_shapes(shapes)
        """Shapes of plain kernels, float32, split as the values are; those of all other parameters as they are."""
        self._wanted = leaves_by_path(shapes)

    def hold(self, path: str, leaf: jax.Array) -> Any:
        """Return a kernel in four bits, whose plain one is deleted, or another parameter as it is."""
        values, scale = self._wanted[path], self._wanted.get(path.removesuffix("kernel") + SCALE)
        if scale is None or not is_nf4(values):
            return leaf
        held = _quantize_on(values.sharding, scale.sharding)(leaf, dim=block_dim(values, scale))
        # Its memory is free when the next one is read.
        jax.block_until_ready(held)
        leaf.delete()
        return _Held(*held)

    def unpack(self, params: Any) -> Any:
        """Return the tree with values and scales as parameters of their layers."""
        found: dict[str, Any] = {}
        for name, own in params.items():
            if isinstance(own, _Held):
                found |= {name: own.values, SCALE: own.scale}
            else:
                found[name] = self.unpack(own) if isinstance(own, dict) else own
        return found


class RoundedKernels:
    """The kernels that adapters are merged into: those of a base in four bits have the numbers that are left of them.

    Args:
        shapes: as of `FrozenKernels`, those of the merged model.
        config: the model with adapters, whose `lora_base` says how its kernels were held.
    """

    def __init__(self, shapes: dict[str, Any], config: ModelConfig) -> None:
        self._wanted = {} if config.lora_base == "plain" else _kernels_of(config, leaves_by_path(shapes))
        self.plain = jax.tree_util.tree_map_with_path(self._as_read, shapes)
        """Shapes to read: kernels in float32, from which they were quantized for training."""

    def hold(self, path: str, leaf: jax.Array) -> jax.Array:
        """Return a rounded kernel in the dtype that is wanted, or another parameter as it is."""
        if path not in self._wanted:
            return leaf
        dim, shape = self._wanted[path]
        rounded = _round_on(shape.sharding)(leaf, dim=dim, dtype=str(shape.dtype))
        jax.block_until_ready(rounded)
        leaf.delete()
        return rounded

    def _as_read(self, path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf.update(dtype=jnp.float32) if path_text(path) in self._wanted else leaf


def _kernels_of(config: ModelConfig, shapes: dict[str, Any]) -> dict[str, tuple[int, Any]]:
    """Return the dimension of blocks, and the shape, of each kernel that is frozen under adapters, by path."""
    found = {}
    for kind in layer_kinds(config):
        for one in linears_of(kind.config):
            path = ".".join(("blocks", *([kind.name] if kind.name else []), *one.place, "kernel"))
            # Of kernels that are split by rows, blocks lie along the last dimension.
            found[path] = (-1 if one.split == "rows" else -2, shapes[path])
    return found


def _plain_shapes(shapes: Any) -> Any:
    if not isinstance(shapes, dict):
        return shapes
    found = {name: _plain_shapes(own) for name, own in shapes.items()}
    if SCALE not in found or not is_nf4(found["kernel"]):
        return found
    values, scale = found["kernel"], found.pop(SCALE)
    whole = whole_shape(values, scale)
    return found | {"kernel": jax.ShapeDtypeStruct(whole, jnp.float32, sharding=values.sharding)}


@lru_cache(maxsize=16)
def _quantize_on(values: Any, scale: Any) -> Any:
    return jax.jit(quantize_nf4, static_argnames="dim", out_shardings=(values, scale))


@lru_cache(maxsize=16)
def _round_on(sharding: Any) -> Any:
    return jax.jit(round_nf4, static_argnames=("dim", "dtype"), out_shardings=sharding)
