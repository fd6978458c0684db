"""Apply `StageFns.prepare` to all layers once a step, and map gradients back through its transpose.

    parameters, float32  --prepare-->  matrices in bfloat16, say  --> every layer of every microbatch
    gradients, float32   <-transpose-  gradients of those matrices

A transpose exists for linear functions alone, so `prepare` is checked to be linear.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Var

from ...meshes import ScheduleError
from ...meshes.device_axes import mark_varying
from .backward.equations import depending_on
from .backward.float32_grads import without_rounding
from .backward.open_calls import open_calls
from .backward.traced_vjp import split_floats
from .buffers import empty_buffer, type_like
from .functions import Functions


def prepare_layers(functions: Functions, stages: dict[str, Any]) -> dict[str, Any]:
    """Return the prepared parameters of one rank's layers, by kind, leaves [C, k, ...] -> [C, k, ...]."""
    # Over chunks and layers at once; a layer of padding is prepared too, and never run.
    prepares = functions.prepares
    return {
        kind: own if (prepare := prepares[kind]) is None else jax.vmap(jax.vmap(prepare))(own)
        for kind, own in stages.items()
    }


def check_prepare(functions: Functions, stages: dict[str, Any], trained: dict[str, Any]) -> None:
    """Raise unless `StageFns.prepare` is linear in floating-point parameters; for use inside `shard_map`.

    Leaves of stages are [C, k, ...]; nothing is computed. An error of `prepare` itself is passed on.

    Args:
        trained: a tree of bools like stages: frozen parameters may be integers.

    Raises:
        ScheduleError: it is not linear, or a trained parameter is an integer array.
    """
    for kind, prepare in functions.prepares.items():
        if prepare is not None:
            _check_linear(prepare, stages[kind], trained[kind], (*functions.axes, *functions.token_axes))


def _check_linear(prepare: Callable[[Any], Any], stages: Any, trained: Any, axes: tuple[str, ...]) -> None:
    has_integers = False
    pairs = zip(jax.tree_util.tree_leaves_with_path(stages), jax.tree.leaves(trained), strict=True)
    for (path, leaf), is_trained in pairs:
        is_integer = not jax.dtypes.issubdtype(leaf.dtype, jax.numpy.floating)
        has_integers |= is_integer
        if is_integer and is_trained:
            raise ScheduleError(
                f"prepare is given params.stages{jax.tree_util.keystr(path)}, which is {leaf.dtype}: gradients come "
                "back through its transpose, and integers have none.",
                fix="leave prepare out, or give the layer its integers by the batch.",
            )
    one_layer = jax.tree.map(lambda leaf: mark_varying(leaf[0, 0], axes), stages)
    made = jax.eval_shape(prepare, one_layer)

    def back() -> Any:
        if has_integers:
            after = trained_after(prepare, one_layer, trained)
            grads = [empty_buffer(like) for like, own in zip(*map(jax.tree.leaves, (made, after)), strict=True) if own]
            return transpose_trained(prepare, one_layer, trained)(grads)
        return transpose(prepare, one_layer)(jax.tree.map(empty_buffer, made))

    try:
        jax.eval_shape(back)
    except Exception as error:
        raise ScheduleError(
            f"prepare is not linear in the parameters: jax finds no transpose of it ({type(error).__name__}), and "
            "gradients come back through that.",
            fix="keep casts, reshapes and sums in prepare, and move the rest into layer.",
        ) from error


def transpose(prepare: Any, own: Any) -> Any:
    """Return a function from gradients of one layer's prepared parameters to gradients of its parameters."""
    # For a linear function the transpose is the whole backward, and it needs no residuals: nothing is kept for it.
    back = jax.linear_transpose(prepare, own)
    return lambda grads: back(grads)[0]


def transpose_wide(prepare: Any, own: Any) -> Any:
    """Return `transpose` of prepare without casts to smaller types: gradients of prepared parameters in float32."""
    wide = without_rounding(prepare, own)
    types = jax.eval_shape(wide, own)
    back = transpose(wide, own)

    def run(grads: Any) -> Any:
        return back(jax.tree.map(lambda grad, like: grad.astype(like.dtype), grads, types))

    return run


def trained_after(prepare: Callable[[Any], Any], own: Any, trained: Any) -> Any:
    """Return which of the prepared parameters have gradients, those made of one that is true in the tree `trained`."""
    closed, made = jax.make_jaxpr(prepare, return_shape=True)(own)
    jaxpr = open_calls(closed, (own,), barriers="drop").jaxpr
    pairs = zip(jaxpr.invars, jax.tree.leaves(trained), strict=True)
    found = depending_on(jaxpr.eqns, [v for v, is_trained in pairs if is_trained])
    return jax.tree.unflatten(jax.tree.structure(made), [isinstance(v, Var) and v in found for v in jaxpr.outvars])


def transpose_trained(prepare: Callable[[Any], Any], own: Any, trained: Any) -> Any:
    """Return `transpose_wide` of what prepare makes of the trained parameters; None for gradients of the others."""
    after = True if trained is None else trained_after(prepare, own, trained)
    # Constants that prepare adds have no gradient either.
    if trained is None or all(jax.tree.leaves((trained, after))):
        return transpose_wide(prepare, own)
    # Prepare is linear, so what it adds of frozen parameters has no part in gradients.
    frozen = jax.tree.map(lambda leaf: empty_buffer(type_like(leaf)), own)
    floats, _ = split_floats(own, trained)
    _, merge = split_floats(frozen, trained)
    back = transpose_wide(lambda floats: split_floats(prepare(merge(floats)), after)[0], floats)
    return lambda grads: merge(back(jax.tree.leaves(grads)), others="none")
