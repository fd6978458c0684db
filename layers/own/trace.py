"""Trace a class of the user's as one device runs it, to list its products and what its backward keeps.

Nothing is computed: shapes alone go through the module, inside `shard_map` over a mesh without devices. Read
`counts.py` next.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Var
from jax.sharding import PartitionSpec

from ...meshes import MeshSpec, abstract_mesh
from ..block import Block, Remat, make_block, rematerialize
from ..transformer import model_rules
from .call import call_block
from .make import make_own
from .products import Traced, list_products
from .protocol import LayerInfo

Sequence = Literal["off", "on"]

_TENSOR = "tensor"
_COPIES = ("reshape", "pvary")
"""Primitives whose result is the same array in another shape, or marked as varying over more axes."""


@lru_cache(maxsize=512)
def trace_products(config: Any, key: str, *, num_tokens: int, tensor: int = 1, sequence: Sequence = "off") -> Traced:
    """Return the products of one class in the forward of one sequence, on one of `tensor` devices.

    Args:
        key: the field of the config that names the class, one of `OWN_CLASSES`; "" for the whole block.
        sequence: whether tokens are split over tensor between layers.
    """

    def make(rngs: nnx.Rngs, rules: Any) -> Any:
        return make_own(config, key, rngs=rngs, rules=rules) if key else make_block(config, rngs=rngs, rules=rules)

    jaxpr = _trace(config, make, lambda run: run, num_tokens=num_tokens, tensor=tensor, sequence=sequence)
    return list_products(jaxpr.jaxpr, _of_x(jaxpr))


@lru_cache(maxsize=512)
def kept_bytes(config: Any, *, num_tokens: int, tensor: int, sequence: Sequence, remat: Remat) -> int:
    """Return the bytes that the backward of a whole block keeps of one sequence, on one of `tensor` devices.

    They are arrays that depend on x, each counted once, in whatever shapes it is read.
    """

    def make(rngs: nnx.Rngs, rules: Any) -> Any:
        return make_block(config, rngs=rngs, rules=rules)

    def backward_of(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, x: jax.tree.leaves(jax.vjp(rematerialize(run, remat), params, x)[1])

    jaxpr = _trace(config, make, backward_of, num_tokens=num_tokens, tensor=tensor, sequence=sequence)
    depends = list_products(jaxpr.jaxpr, _of_x(jaxpr)).depends
    sources = {eqn.outvars[0]: eqn.invars[0] for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name in _COPIES}

    def source_of(var: Any) -> Any:
        return source_of(sources[var]) if var in sources else var

    outs = (var for var, own in zip(jaxpr.jaxpr.outvars, depends, strict=True) if own and isinstance(var, Var))
    kept = {source_of(var) for var in outs}
    return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in kept)


def _of_x(jaxpr: ClosedJaxpr) -> list[bool]:
    """Return which inputs depend on x: the last one, behind the parameters."""
    return [*[False] * (len(jaxpr.jaxpr.invars) - 1), True]


def _trace(
    config: Any,
    make: Callable[[nnx.Rngs, Any], Any],
    change: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    num_tokens: int,
    tensor: int,
    sequence: Sequence,
) -> ClosedJaxpr:
    """Return the jaxpr of `change(run)`, a function of parameters and x, on one device's blocks of both."""
    mesh = abstract_mesh(MeshSpec(tensor=tensor))
    rules = model_rules(config, mesh.shape)
    rules = rules.split_stream() if sequence == "on" else rules
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0), rules)), nnx.Param)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(state))
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _cast(path, leaf, config), nnx.to_pure_dict(state))
    x = jax.ShapeDtypeStruct((1, num_tokens, config.hidden_size), config.dtype)
    found: list[ClosedJaxpr] = []

    def run(params: Any, x: jax.Array) -> Any:
        return _call(nnx.merge(graph, params), x, num_tokens=num_tokens)

    def region(params: Any, x: jax.Array) -> jax.Array:
        found.append(jax.make_jaxpr(change(run))(params, x))
        return jnp.zeros(())

    split = PartitionSpec(None, _TENSOR) if sequence == "on" and tensor > 1 else PartitionSpec()
    own = jax.tree.map(lambda spec: _over_tensor(spec, tensor), specs, is_leaf=lambda n: isinstance(n, PartitionSpec))
    jax.eval_shape(jax.shard_map(region, mesh=mesh, in_specs=(own, split), out_specs=PartitionSpec()), params, x)
    return found[0]


def _call(module: Any, x: jax.Array, *, num_tokens: int) -> Any:
    if isinstance(module, Block):
        return module.run(x)[0]
    ids, weights = jnp.zeros((1, num_tokens), jnp.int32), jnp.zeros((1, num_tokens), jnp.float32)
    microbatch = {"tokens": ids, "targets": ids, "weights": weights}
    one = jnp.zeros((), jnp.int32)
    info = LayerInfo(index=one, stage=one, microbatch=one, sequences=one[None], key=jax.random.key(0))
    out = call_block(module, x, places=None, microbatch=microbatch, info=info)
    return out.x if out.loss is None else (out.x, out.loss)


def _cast(path: Any, leaf: jax.ShapeDtypeStruct, config: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of a parameter as a step uses it: kernels in the compute dtype."""
    return leaf.update(dtype=config.dtype) if getattr(path[-1], "key", None) == "kernel" else leaf


def _over_tensor(spec: PartitionSpec, tensor: int) -> PartitionSpec:
    """Return a spec with the axis tensor alone, if that has several devices."""
    names = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    return PartitionSpec(*(_TENSOR if tensor > 1 and _TENSOR in own else None for own in names))
