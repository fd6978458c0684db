"""Refuse attention of the user's that sees nothing of the tokens on other context devices."""

from typing import Any

from flax import nnx

from ...meshes import DEFAULT_RULES, ModelError
from ..attention.attention import Attention
from ..latent.attention import LatentAttention
from .make import make_own


def check_over_context(config: Any, *, context: int) -> None:
    """Raise unless a block or attention of the user's reaches the tokens of all context devices.

    It does so by a layer of ours inside it, or by itself where its class says `over_context = True`.

    Raises:
        ModelError: several devices share a sequence, and the class has no such layer.
    """
    key = "block" if config.block else "attention_class"
    path = getattr(config, key)
    if context == 1 or not path:
        return
    module = nnx.eval_shape(lambda: make_own(config, key, rngs=nnx.Rngs(0), rules=DEFAULT_RULES))
    layers = (node for _, node in nnx.iter_graph(module))
    if getattr(module, "over_context", False) or any(isinstance(one, Attention | LatentAttention) for one in layers):
        return
    raise ModelError(
        f"model.{key}={path!r} with mesh.context={context}: a device has 1/{context} of each sequence, and "
        f"{type(module).__name__} has no Attention of trellax, which gathers what the others have.",
        fix="attend by trellax.layers.Attention, or set mesh.context=1; a class that sends tokens over context itself "
        "says over_context = True.",
    )
