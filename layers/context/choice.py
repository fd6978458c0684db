"""Choose how context ranks attend to each other's tokens: gather keys and values, or exchange tokens for heads.

Numbers that a device sends for a layer of T tokens, N query and K key/value heads of H features on a tensor rank, over
c ranks, in units of T H (c - 1) / c:

                 forward             backward            for N = 32, K = 8:    c = 2    c = 4    c = 8
    gather       2 K                 4 K                                          48       48       48
    gather-once  2 K                 2 K                                          32       32       32
    ulysses      2 (N + K) / c       2 (N + K) / c                                80       40       20
      remat      2 (N + K) / c       4 (N + K) / c                               120       60       30

"gather" gathers again in the backward, so that a layer keeps the keys of its own tokens alone; "gather-once" keeps
those of all tokens, 2 K H T numbers of each microbatch in flight in place of 2 K H T / c. So "auto" does not choose it;
the planner does where memory allows. Heads must divide to be exchanged; where a layer is rematerialized, its backward
exchanges them again.
"""

from typing import Literal, get_args

from ...meshes import ModelError
from ...meshes.arguments import check_choice
from ..config import ModelConfig

Way = Literal["gather", "gather-once", "ulysses"]
"""How context ranks attend to each other's tokens."""

ContextAttention = Literal["auto", "gather", "gather-once", "ulysses"]
"""The same as it is asked for; "auto" is what sends less of a gather and an exchange."""


def choose_context_attention(
    config: ModelConfig, *, tensor: int, context: int, remat: str, asked: ContextAttention = "auto"
) -> Way:
    """Return how attention is computed over `context` ranks, of a model split over `tensor`.

    >>> config = ModelConfig(vocab_size=256, num_layers=2, hidden_size=64, num_heads=8)
    >>> [choose_context_attention(config, tensor=1, context=2, remat=remat) for remat in ("none", "dots")]
    ['ulysses', 'gather']

    Args:
        remat: what the layers recompute, which decides how often heads are exchanged.

    Raises:
        ModelError: heads are to be exchanged and do not divide, or `asked` is not one of the choices.
    """
    check_choice("context_attention", asked, get_args(ContextAttention), error=ModelError)
    heads, kv_heads = config.num_heads // tensor, max(1, config.num_kv_heads // tensor)
    divides = heads % context == kv_heads % context == 0
    if asked == "ulysses" and context > 1 and not divides:
        raise ModelError(
            f"context_attention='ulysses' exchanges heads over context={context}, and each of tensor={tensor} ranks "
            f"has {heads} query and {kv_heads} key/value heads.",
            fix=f"use a context size that divides {kv_heads}, or context_attention='gather'.",
        )
    if asked != "auto":
        return asked
    gathered, exchanged = gathered_numbers(kv_heads), exchanged_numbers(heads, kv_heads, context=context, remat=remat)
    return "ulysses" if divides and sum(exchanged) < sum(gathered) else "gather"


def gathered_numbers(kv_heads: int) -> tuple[float, float]:
    """Return what a gather sends forward and backward, in the units of this file."""
    return 2 * kv_heads, 4 * kv_heads


def kept_ranks(how: ContextAttention, *, context: int, remat: str) -> int:
    """Return the context ranks whose keys and values a layer keeps for its backward: its own alone, or all of them.

    >>> kept_ranks("gather-once", context=4, remat="dots"), kept_ranks("gather", context=4, remat="dots")
    (4, 1)
    """
    return context if how == "gather-once" and remat != "full" else 1


def exchanged_numbers(heads: int, kv_heads: int, *, context: int, remat: str) -> tuple[float, float]:
    """Return what an exchange sends forward and backward, in the units of this file."""
    once = 2 * (heads + kv_heads) / context
    return once, once * exchanges_of_backward(remat)


def exchanges_of_backward(remat: str) -> int:
    """Return how often a backward exchanges heads: for the gradients, and once more where the forward is repeated."""
    return 1 if remat == "none" else 2
