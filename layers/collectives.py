"""The verbs by which layers communicate, inside `shard_map`, under `jax.jit` and on one device alike.

An axis of the mesh is met in one of three ways. The verbs find out which; no layer asks.

    manual       inside `shard_map`: x is this device's block, and a verb is a collective of `jax.lax`
    automatic    under `jax.jit`: x is the whole array, the compiler adds what must be sent, a verb returns x
    absent       no mesh in context, or an axis of size 1: a verb returns x

Inside `shard_map` an array's type says over which axes its value differs: each device of `tensor` has another
f32[8]{V:tensor}, and all have the same f32[8]. The verbs change that type, and autodiff knows what each owes backward.
x[B, T, D] of a region split over 4 tensor ranks, and a vocabulary of V words, v on each rank:

                     forward                                                backward
    enter_split      x[B,T,D] -> x[B,T,D]{V:tensor}      free               dx{V:tensor} -> dx    all-reduce
    sum_blocks       y[B,T,D]{V:tensor} -> y[B,T,D]      all-reduce         dy -> dy{V:tensor}    free
    own_columns      w[D,F] -> w[D,F/4]{V:tensor}        free               dw[D,F/4] -> dw[D,F]  all-reduce
    max_blocks       s[B,T]{V:tensor} -> s[B,T]          all-reduce         none
    gather_blocks    s[B,v]{V:tensor} -> s[B,V]          all-gather         ds[B,V] -> ds[B,v]    free
    gather_tokens    x[B,t,D] -> x[B,T,D], {V:tensor}    all-gather         dx[B,T,D] -> [B,t,D]  reduce-scatter
    scatter_tokens   y[B,T,D] -> y[B,t,D], {V:tensor}    reduce-scatter     dy[B,t,D] -> [B,T,D]  all-gather
    own_tokens       x[B,T,D] -> x[B,t,D]{V:tensor}      free               dx[B,t,D] -> [B,T,D]  all-reduce
    gather_weight    w[d,F] -> w[D,F], {V:data}          all-gather         dw[D,F] -> dw[d,F]    reduce-scatter

The first two are f and g of Shoeybi et al. 2019, section 3, each the other's transpose. Where tokens are split between
layers, `enter_gathered` (`gather_tokens`, with a kernel) and `scatter_tokens` take their places (Korthikanti et al.
2022, section 4.2.2); `leave_split` is whichever the rules ask for. `run_in_blocks` runs a function of such verbs under
`jax.jit` too, where the compiler by itself would sum or gather too much.

Read `linear.py` next.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from ..meshes import ShardingError, ShardingRules
from ..meshes.device_axes import end_together, manual_axes, mark_varying, num_blocks, sum_like, varying_axes
from ..meshes.divisibility import check_divides

ArrayTree = TypeVar("ArrayTree")

BLOCK_SUMS = "block_sums"
"""Checkpoint name of the results of `sum_blocks`: rematerialization keeps them, so the backward does not sum again."""


_ADDED = "the sum would be as many times too large"
_REPEATED = "it would be repeated as many times"


def enter_split(x: jax.Array, kernel: jax.Array, axes: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Enter a region in which each device of `axes` multiplies the same x with its own columns of a kernel.

    x[..., D], kernel[D, F@axes]{V:axes} -> x[..., D]{V:axes}, kernel. Free; its transpose sums dx{V:axes} -> dx, one
    all-reduce, which XLA runs beside the product that makes the kernel's gradient (see `hide_reduction`).

    Raises:
        ShardingError: the kernel is the same on all devices of an axis: each would compute the whole product.
    """
    _check_differs(kernel, manual_axes(axes), what="enter_split", then="every device would compute the same product")
    return hide_reduction(x, kernel, manual_axes(axes)) if num_blocks(axes) > 1 else (x, kernel)


def enter_gathered(x_BTD: jax.Array, kernel: jax.Array, axes: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Enter a split region from activations whose tokens are split: `gather_tokens` of x, and the kernel.

    As with `enter_split`, XLA runs the reduce-scatter of dx beside the product that makes the kernel's gradient.

    Raises:
        ShardingError: as of `gather_tokens`.
    """
    _check_differs(x_BTD, manual_axes(axes), what="enter_gathered", then=_REPEATED)
    return _gather_beside(x_BTD, kernel, manual_axes(axes)) if manual_axes(axes) else (x_BTD, kernel)


def sum_blocks(y: ArrayTree, axes: Sequence[str]) -> ArrayTree:
    """Leave a split region: sum over the devices of `axes` what each has made of its own block.

    y{V:axes} -> y, an array or a tree of them: one all-reduce, in the dtype of y. Its transpose, dy -> dy{V:axes}, is
    free.

    Raises:
        ShardingError: y is the same on all devices of an axis: the sum would be as many times too large.
    """
    manual = manual_axes(axes)
    for leaf in jax.tree.leaves(y):
        _check_differs(leaf, manual, what="sum_blocks", then=_ADDED)
    return checkpoint_name(jax.lax.psum(y, manual), BLOCK_SUMS) if manual else y


def _check_differs(x: jax.Array, axes: tuple[str, ...], *, what: str, then: str) -> None:
    if missing := [axis for axis in axes if axis not in varying_axes(x)]:
        if not varying_axes(jax.lax.axis_index(missing[0])):
            raise ShardingError(
                f"{what} over {' and '.join(missing)} inside shard_map(check_vma=False), where no array's type says "
                "over which axes it differs: gradients would be wrong.",
                fix="leave check_vma out; it is True by default.",
            )
        raise ShardingError(
            f"{what} over {' and '.join(missing)} of a {x.dtype}{list(x.shape)} that is the same on all "
            f"{num_blocks(missing)} devices: {then}.",
            fix="split it over that axis, a weight by StageFns(stage_specs=...) in a pipeline, or leave the verb out.",
        )


def leave_split(y_BTD: jax.Array, axes: Sequence[str], *, tokens: Sequence[str] = ()) -> jax.Array:
    """Leave a split region: y[B, T, D]{V:axes} -> y[B, T, D], or y[B, T@tokens, D]{V:tokens}.

    Where tokens are split between layers each device keeps the sum of its own, one reduce-scatter over those axes; over
    other axes only that slice is summed. Where they are not this is `sum_activations`.

    Args:
        tokens: the axes over which tokens are split between layers; along one that is not among `axes` y is whole.

    Raises:
        ShardingError: as of `scatter_tokens`, and of `sum_blocks`.
    """
    if not manual_axes(tokens):
        return sum_activations(y_BTD, axes)
    others = [axis for axis in axes if axis not in tokens]
    if set(tokens) <= set(axes):
        y_BTD = scatter_tokens(y_BTD, tokens)
    else:
        # Along a token axis that did not split the product y is the same on all devices: each keeps its own tokens.
        for axis in tokens:
            y_BTD = scatter_tokens(y_BTD, (axis,)) if axis in axes else own_tokens(y_BTD, (axis,))
    return checkpoint_name(y_BTD, BLOCK_SUMS) if num_blocks(others) == 1 else sum_blocks(y_BTD, others)


def sum_activations(y_BTD: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Sum y[B, T, D] as `sum_blocks` does; over several axes, all but the last send only a slice for each device.

    Over (pipe, tensor) with 4 tensor ranks: a reduce-scatter over tensor, an all-reduce of a quarter of y over pipe, an
    all-gather over tensor. One all-reduce over both would send the whole y over pipe from each tensor rank.
    """
    manual = manual_axes(axes)
    is_sliced = len(manual) > 1 and split_dim(y_BTD.shape, manual[-1]) is not None
    return _sum_in_slices(y_BTD, manual) if is_sliced else sum_blocks(y_BTD, axes)


# By autodiff the backward would cut the gradient into slices and gather them again.
@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_in_slices(y_BTD: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    (*outer, inner), dim = axes, split_dim(y_BTD.shape, axes[-1])
    assert dim is not None
    part = jax.lax.psum_scatter(y_BTD, inner, scatter_dimension=dim, tiled=True)
    return gather_slices(jax.lax.psum(part, tuple(outer)), inner, dim=dim)


_sum_in_slices.defvjp(
    lambda y_BTD, axes: (_sum_in_slices(y_BTD, axes), None), lambda axes, _, grad: (mark_varying(grad, axes),)
)


def split_dim(shape: Sequence[int], axes: str | tuple[str, ...]) -> int | None:
    """Return the first dimension that splits evenly over manual axes; None if there is none."""
    parts = jax.lax.axis_size(axes)
    return next((dim for dim, size in enumerate(shape) if size and size % parts == 0), None)


def gather_slices(part: jax.Array, axes: str | tuple[str, ...], *, dim: int) -> jax.Array:
    """Return the whole array of which each device of manual axes has a slice: part{V:axes} -> y, an all-gather."""
    return jax.lax.all_gather(part, axes, axis=dim, tiled=True, to="invarying")


def gather_blocks(x: jax.Array, axes: Sequence[str], *, dim: int) -> jax.Array:
    """Return the whole array of which each device of `axes` has a block: x[V@axes]{V:axes} -> x[V], an all-gather."""
    manual = manual_axes(axes)
    _check_differs(x, manual, what="gather_blocks", then=_REPEATED)
    return gather_slices(x, manual, dim=dim) if manual else x


def gather_tokens(x_BTD: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Enter a split region from activations whose tokens are split: x[B, T@axes, D]{V:axes} -> x[B, T, D]{V:axes}.

    One all-gather. Its transpose sums dx of all devices and leaves each its own tokens: one reduce-scatter.

    Raises:
        ShardingError: x is the same on all devices of an axis: each of its tokens would be there several times.
    """
    _check_differs(x_BTD, manual_axes(axes), what="gather_tokens", then=_REPEATED)
    return gather_weight(x_BTD, axes, dim=1)


def scatter_tokens(y_BTD: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Leave a split region for activations whose tokens are split: y[B, T, D]{V:axes} -> y[B, T@axes, D]{V:axes}.

    Each device's partial sums are added, and each keeps its own tokens: one reduce-scatter, in the dtype of y. Its
    transpose is one all-gather of dy.

    Raises:
        ShardingError: T is not a multiple of the number of devices, or y is the same on all devices of an axis.
    """
    manual = manual_axes(axes)
    if not manual:
        return y_BTD
    _check_differs(y_BTD, manual, what="scatter_tokens", then=_ADDED)
    _tokens_of_device(y_BTD.shape[1], manual)
    return jax.lax.psum_scatter(y_BTD, manual, scatter_dimension=1, tiled=True)


def own_tokens(x_BTD: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Return this device's own tokens of an array that is whole on all devices: x[B, T, D] -> x[B, T@axes, D]{V:axes}.

    Free; its transpose sums the gradient of x over the devices, an all-reduce.

    Raises:
        ShardingError: T is not a multiple of the number of devices.
    """
    manual = manual_axes(axes)
    if not manual:
        return x_BTD
    size = _tokens_of_device(x_BTD.shape[1], manual)
    x_BTD = mark_varying(x_BTD, manual)
    return jax.lax.dynamic_slice_in_dim(x_BTD, jax.lax.axis_index(manual) * size, size, axis=1)


def _tokens_of_device(num_tokens: int, axes: tuple[str, ...]) -> int:
    """Return the number of tokens of each device of manual axes."""
    parts, fix = num_blocks(axes), 'pad the sequences, or set mesh.sequence="off".'
    check_divides("tokens", num_tokens, over=" x ".join(axes), parts=parts, error=ShardingError, fix=fix)
    return num_tokens // parts


def gather_weight(w: jax.Array, axes: Sequence[str], *, dim: int) -> jax.Array:
    """Return the whole weight of which each device of `axes` keeps a block along `dim`: w{V:axes} -> w{V:axes}.

    One all-gather, in the dtype of w: cast before it. Its transpose sums dw and leaves each device its own block: one
    reduce-scatter.

    Raises:
        ShardingError: w is the same on all devices of an axis: it is whole already.
    """
    manual = manual_axes(axes)
    _check_differs(w, manual, what="gather_weight", then=_REPEATED)
    return jax.lax.all_gather(w, manual, axis=dim, tiled=True) if manual else w


def run_in_blocks(fn: Callable[..., Any], *, rules: ShardingRules, in_dims: Any, out_dims: Any) -> Callable[..., Any]:
    """Return fn run on each device's own blocks, for what the compiler would split badly by itself.

    Under `jax.jit` that is one `shard_map` over all axes of the mesh, and the verbs in fn are collectives; inside
    `shard_map`, and without a mesh, it is fn. A result is summed over axes along which it varies and that its
    dimensions do not name: a loss over data.

    Args:
        in_dims: the logical dimensions of each argument, ("batch", "tokens").
        out_dims: those of the result, or of each array of a tree of results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(mesh.axis_types) != {AxisType.Auto}:
        return fn

    def spec(dims: Sequence[str | None]) -> PartitionSpec:
        return PartitionSpec(*(tuple(axis for axis in rules.axes(dim) if num_blocks((axis,)) > 1) for dim in dims))

    def block(*args: Any) -> Any:
        def close(dims: Sequence[str | None], y: jax.Array) -> jax.Array:
            missing = varying_axes(y, without=[axis for dim in dims for axis in rules.axes(dim)])
            return jax.lax.psum(y, missing) if missing else y

        return jax.tree.map(close, out_dims, fn(*args), is_leaf=_is_dims)

    in_specs, out_specs = (jax.tree.map(spec, dims, is_leaf=_is_dims) for dims in (in_dims, out_dims))
    return jax.shard_map(block, in_specs=in_specs, out_specs=out_specs)


def _is_dims(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(dim, str | None) for dim in node)


def max_blocks(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Return the largest value over the devices of `axes`: x{V:axes} -> x, one all-reduce. It has no gradient."""
    manual = manual_axes(axes)
    return jax.lax.pmax(x, manual) if manual else x


def own_columns(weight: jax.Array, axes: Sequence[str], *, unit: int) -> jax.Array:
    """Return the columns that this device uses of a weight that is whole on all devices.

    weight[..., F] -> [..., F@axes]{V:axes}. Free; its transpose sums the weight's gradient, an all-reduce.
    With fewer units of columns (heads) than devices, several devices use the same unit:

        2 heads, 4 devices:    device 0: head 0    1: head 0    2: head 1    3: head 1

    Raises:
        ShardingError: neither number is a multiple of the other: some columns would not be used, or some twice.
    """
    manual = manual_axes(axes)
    if not manual:
        return weight
    num_units, parts = weight.shape[-1] // unit, jax.lax.axis_size(manual)
    if not num_units or (num_units % parts and parts % num_units):
        raise ShardingError(
            f"own_columns of {num_units} units of {unit} columns over {' x '.join(manual)}={parts}: neither is a "
            "multiple of the other, and devices would use unlike numbers of columns.",
            fix=f"use a multiple of {parts} units, or a number that divides {parts}.",
        )
    size = max(num_units // parts, 1) * unit
    first = jax.lax.axis_index(manual) * num_units // parts * unit
    return jax.lax.dynamic_slice_in_dim(mark_varying(weight, manual), first, size, axis=weight.ndim - 1)


_Pair = tuple[jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def hide_reduction(x: jax.Array, kernel: jax.Array, axes: tuple[str, ...]) -> _Pair:
    """Return x marked as varying over manual axes, and a column-split kernel; XLA overlaps their gradients."""
    return mark_varying(x, axes), kernel


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather_beside(x: jax.Array, kernel: jax.Array, axes: tuple[str, ...]) -> _Pair:
    """Return x of all tokens, and a column-split kernel; XLA overlaps their gradients."""
    return gather_weight(x, axes, dim=1), kernel


# The sum of dx and the product that makes dkernel do not depend on each other. A barrier on both results makes XLA
# schedule the product between the start and the end of the sum, as Megatron-LM's layers do by hand. Without it, the
# product is scheduled elsewhere and the sum is exposed.
def _end_together(grads: _Pair, primals: _Pair) -> _Pair:
    return end_together(*map(sum_like, grads, primals))


def _gather_backward(axes: tuple[str, ...], primals: _Pair, grads: _Pair) -> _Pair:
    dx = jax.lax.psum_scatter(grads[0], axes, scatter_dimension=1, tiled=True)
    return _end_together((dx, grads[1]), primals)


# The forward is not a call of the function, whose results would all seem to depend on x: the kernel would become a
# residual.
hide_reduction.defvjp(
    lambda x, kernel, axes: ((mark_varying(x, axes), kernel), (x, kernel)),
    lambda _, primals, grads: _end_together(grads, primals),
)
_gather_beside.defvjp(lambda x, kernel, axes: ((gather_weight(x, axes, dim=1), kernel), (x, kernel)), _gather_backward)
