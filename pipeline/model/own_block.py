"""The layer function of a block of the user's, a class that `model.block` names.

    block(x_BTD) -> y_BTD or Output       it may ask, by name, for places, microbatch and info

Read `protocol.py` for `info` and `Output`, `../../layers/own/load.py` for the class.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

import jax

from ...layers.context.places import Places
from ...layers.own.call import call_block
from ...layers.own.load import asked_of, load_class
from ...meshes import ModelError
from .joined_block import JoinedBlock
from .protocol import LayerInfo, Output
from .stage import StageFns

LAYER_LOSS = "layer_loss"
"""The metric that has the sum of the parts of the loss that layers add."""


def own_layer(path: str, block: JoinedBlock) -> Callable[..., Output]:
    """Return the function of a layer that is a block of the user's class "module:Class".

    Raises:
        ModelError: while it is traced, if x changes its shape, or the block cannot tell documents apart that share a
            sequence.
    """
    asked = asked_of(load_class(path, key="block"))

    def run(params: Any, x_BTD: jax.Array, microbatch: Any, info: LayerInfo | None) -> Output:
        if _has_documents(microbatch) and not {"places", "microbatch"} & set(asked):
            raise ModelError(
                f"model.block={path!r} is not told where documents begin, and data.packing='on' puts several into a "
                "sequence.",
                fix="write places=None into the parameters of its call, and give it to Attention; or packing='off'.",
            )
        offered = {"places": places_of(microbatch), "microbatch": microbatch, "info": info}
        out = call_block(block.merge(params), x_BTD, **offered)
        _check_output(out, path)
        return out if out.loss is None else replace(out, metrics={**out.metrics, LAYER_LOSS: out.loss})

    def layer(params: Any, x_BTD: jax.Array, microbatch: Any) -> Output:
        return run(params, x_BTD, microbatch, None)

    def layer_with_info(params: Any, x_BTD: jax.Array, microbatch: Any, info: LayerInfo) -> Output:
        return run(params, x_BTD, microbatch, info)

    return layer_with_info if "info" in asked else layer


def without_layer_losses(fns: StageFns) -> StageFns:
    """Return the functions of a model whose layers add nothing to the loss, for validation."""
    layer: Any = fns.layer

    @wraps(layer)
    def run(*args: Any, **options: Any) -> Output:
        return replace(layer(*args, **options), loss=None)

    return replace(fns, layer=run)


def _check_output(out: Output, path: str) -> None:
    if out.stats is not None:
        raise ModelError(
            f"model.block={path!r} returns stats, from which a state of layers is updated, and training keeps none.",
            fix="return metrics, or write a step of your own with pipeline_grads(state=...).",
        )
    for name, value in out.metrics.items():
        if jax.numpy.shape(value):
            raise ModelError(
                f"model.block={path!r} returns the metric {name!r} with the shape {jax.numpy.shape(value)}; the log "
                "has numbers.",
                fix="sum it to one number, a part of a sum over layers, microbatches and data shards.",
            )


def places_of(microbatch: Mapping[str, jax.Array] | None) -> Places | None:
    """Return where the tokens stand, in sequences of several documents."""
    if not _has_documents(microbatch):
        return None
    assert microbatch is not None
    return Places(positions=microbatch["positions"], segments=microbatch["segments"])


def _has_documents(microbatch: Mapping[str, jax.Array] | None) -> bool:
    return bool(microbatch) and "segments" in microbatch
