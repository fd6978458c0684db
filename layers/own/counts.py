"""Count parameters and flops of classes of the user's, for `../counts.py`.

Parameters are those of the modules' shapes. Flops are what the class says, or else those of all matrix products in its
jaxpr, masked scores of attention among them. Read `../counts.py` next.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flax import nnx

from ...meshes import DEFAULT_RULES, ModelError
from ...meshes.errors import shown
from ..block import make_block
from ..norms import make_norm
from .check_config import OWN_CLASSES
from .load import load_class
from .make import add_dims
from .trace import trace_products

OWN_COUNT = "flops_per_token"
"""Name of the static method by which a class counts: flops_per_token(config, *, num_tokens) -> int."""


@dataclass(frozen=True, kw_only=True)
class ParamSize:
    """The shape of a parameter, its dims, and whether it is a kernel, the weight of a product."""

    shape: tuple[int, ...]
    dims: tuple[Any, ...]
    is_kernel: bool


@lru_cache(maxsize=256)
def block_sizes(config: Any) -> tuple[ParamSize, ...]:
    """Return the parameters of one block, by its module's shapes."""
    return _sizes_of(nnx.eval_shape(lambda: make_block(config, rngs=nnx.Rngs(0))))


@lru_cache(maxsize=256)
def norm_params(config: Any) -> int:
    """Return the number of parameters of one norm of the user's."""
    return _count(_sizes_of(nnx.eval_shape(lambda: make_norm(config, rngs=nnx.Rngs(0)))))


def block_params(config: Any) -> int:
    """Return the number of parameters of one block."""
    return _count(block_sizes(config))


def device_sizes(config: Any, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the parameters of one block on one device of a mesh: of kernels alone, and all.

    Args:
        sizes: size of each mesh axis, those with one device may be left out.
    """
    rules, found = add_dims(DEFAULT_RULES, config), [0, 0]
    kv = math.prod(sizes.get(axis, 1) for axis in rules.axes("kv_heads"))
    rules = rules.replace(kv_heads=None) if config.num_kv_heads % kv else rules
    for own in block_sizes(config):
        axes = (axis for dim in own.dims for axis in rules.axes(dim))
        count = math.prod(own.shape) // math.prod(sizes.get(axis, 1) for axis in axes)
        found[1] += count
        found[0] += count if own.is_kernel else 0
    return found[0], found[1]


def split_features(config: Any) -> int:
    """Return the number that tensor must divide for the parameters of a block to split, but for key/value heads."""
    rules = add_dims(DEFAULT_RULES, config)
    pairs = (pair for own in block_sizes(config) for pair in zip(own.shape, own.dims, strict=True))
    return math.gcd(*(size for size, dim in pairs if dim != "kv_heads" and "tensor" in rules.axes(dim)))


def tell_counts(config: Any) -> str:
    """Return what the numbers of a model with classes of the user's rest on, "" for one without."""
    told = []
    for key in OWN_CLASSES:
        if path := getattr(config, key):
            is_given = hasattr(load_class(path, key=key), OWN_COUNT)
            by = f"by its {OWN_COUNT}" if is_given else "by the matrix products in its jaxpr, masked scores too"
            told.append(f"{path} counts {by}" if key != "norm_class" else f"{path} counts no flops")
    if not told:
        return ""
    return f"{'; '.join(told)}. Its parameters are those of its shapes; the time of other work in it is not known."


def own_flops(config: Any, *, num_tokens: int) -> int:
    """Return the flops of the user's classes in one layer's forward of one token, of norms none.

    Raises:
        ModelError: a class does not count, and its jaxpr does not tell how often it runs its products.
    """
    return sum(
        _flops_of(config, key, num_tokens) for key in OWN_CLASSES if key != "norm_class" and getattr(config, key)
    )


def _flops_of(config: Any, key: str, num_tokens: int) -> int:
    cls = load_class(getattr(config, key), key=key)
    if (count := getattr(cls, OWN_COUNT, None)) is not None:
        flops = count(config, num_tokens=num_tokens)
        if type(flops) is not int or flops < 0:
            raise ModelError(
                f"{cls.__name__}.{OWN_COUNT} returns {shown(flops)}, which is no number of flops.",
                fix="return a whole number, the flops of a forward of one token in a sequence of num_tokens.",
            )
        return flops
    traced = trace_products(config, key, num_tokens=num_tokens)
    if traced.uncounted:
        raise ModelError(
            f"model.{key}: {cls.__name__} has the primitive {', '.join(sorted(traced.uncounted))}, whose products "
            "cannot be counted from its jaxpr.",
            fix=f"give the class a static method {OWN_COUNT}(config, *, num_tokens) that returns the flops of a "
            "forward of one token.",
        )
    return sum(own.flops for own in traced.products) // num_tokens


def _sizes_of(module: Any) -> tuple[ParamSize, ...]:
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return tuple(
        ParamSize(shape=leaf.shape, dims=leaf.get_metadata("out_sharding"), is_kernel=path[-1] == "kernel")
        for path, leaf in flat
    )


def _count(sizes: tuple[ParamSize, ...]) -> int:
    return sum(math.prod(own.shape) for own in sizes)
