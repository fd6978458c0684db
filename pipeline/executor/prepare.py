"""`StageFns.prepare`: what layers are given instead of their parameters, and the way back for gradients.

Gradients of the parameters come back through the transpose of `prepare`, so it is checked to have one.
"""

from typing import Any

import jax

from ...meshes import ScheduleError
from ..model.stage import StageFns
from .buffers import vary


def prepare_layers(fns: StageFns, stages: Any) -> Any:
    """Return what the layers of one rank are given instead of their parameters, leaves [C, k, ...] both."""
    if fns.prepare is None:
        return stages
    # What does not depend on the parameters is marked as differing between devices, as its gradient will be.
    return jax.tree.map(vary, jax.vmap(jax.vmap(fns.prepare))(stages))


def check_prepare(fns: StageFns, stages: Any) -> None:
    """Raise unless `fns.prepare` is linear in parameters that are floats; for use inside `shard_map`.

    Leaves of stages are [C, k, ...]; nothing is computed. What `prepare` itself raises is passed on.

    Raises:
        ScheduleError: it is not linear, or is given integers.
    """
    prepare = fns.prepare
    if prepare is None:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(stages):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.numpy.floating):
            raise ScheduleError(
                f"prepare is given params.stages{jax.tree_util.keystr(path)}, which is {leaf.dtype}: gradients come "
                "back through its transpose, and integers have none.",
                fix="leave prepare out, or give the layer its integers by the batch.",
            )
    made = jax.eval_shape(lambda: prepare(_one_layer(stages)))

    def back() -> Any:
        zeros = jax.tree.map(lambda leaf: vary(jax.numpy.zeros(leaf.shape, leaf.dtype)), made)
        return transpose(prepare, _one_layer(stages))(zeros)

    try:
        jax.eval_shape(back)
    except Exception as error:
        raise ScheduleError(
            f"prepare is not linear in the parameters: jax finds no transpose of it ({type(error).__name__}), and "
            "gradients come back through that.",
            fix="keep casts, reshapes and sums in prepare, and move the rest into layer.",
        ) from error


def transpose(prepare: Any, own: Any) -> Any:
    """Return the way back from gradients of what `prepare` makes of one layer's parameters to those of these."""

    def make(own: Any) -> Any:
        return jax.tree.map(vary, prepare(own))

    back = jax.linear_transpose(make, own)
    return lambda grads: back(grads)[0]


def _one_layer(stages: Any) -> Any:
    return jax.tree.map(lambda leaf: vary(leaf[0, 0]), stages)
