"""Dropout (Srivastava et al. 2014) whose masks do not depend on mesh, schedule or number of microbatches."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from ..meshes import ModelError, ShardingRules
from ..meshes.arguments import check_number
from ..meshes.device_axes import num_manual_blocks
from .collectives import own_tokens
from .context.places import own_part


def dropout(
    x: jax.Array, *, rate: float, keys: jax.Array, tokens: Sequence[str] = (), context: Sequence[str] = ()
) -> jax.Array:
    """Set each number of x to zero with probability `rate`, and scale the others by 1 / (1 - rate).

    x[B@data, ...], keys[B@data] -> y[B@data, ...] in the dtype of x; no communication. The mask of a sequence is drawn
    from its own key, so it is the same wherever the sequence lies: `info.keys()` in a pipeline's layer gives such keys.
    There the backward draws the mask again, and nothing is kept for it.

    Where tokens are split, x[B@data, T@(context, tokens), D], each device draws the mask of all and uses its own.

    >>> dropout(jnp.ones((2, 4)), rate=0.0, keys=jax.random.split(jax.random.key(0), 2)).sum()
    Array(8., dtype=float32)

    Args:
        tokens: the mesh axes over which tokens are split between layers, `rules.token_axes`.
        context: those over which whole sequences are split, in the order of their ranks, `rules.axes("tokens")`.

    Raises:
        ModelError: `rate` is not a number from 0 up to 1, or there is not one key for each sequence.
    """
    check_number("rate", rate, error=ModelError)
    if rate >= 1:
        raise ModelError(f"rate={rate} would drop everything.", fix="use a rate from 0 up to 1, 0.1 say.")
    # Keys of jax.random.PRNGKey are rows of integers, [B, 2].
    if (keys.shape if _is_typed(keys) else keys.shape[:-1]) != x.shape[:1]:
        raise ModelError(
            f"x has {x.shape[0]} sequences and keys has shape {keys.shape}.",
            fix="give one key for each sequence: info.keys(), or jax.random.split(key, len(x)).",
        )
    if not rate:
        return x
    parts = num_manual_blocks(tokens) * num_manual_blocks(context)
    shape = x.shape[1:] if parts == 1 else (x.shape[1] * parts, *x.shape[2:])
    is_kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(threefry_keys(keys))
    is_kept = own_tokens(own_part(is_kept, context, dim=1), tokens)
    return jnp.where(is_kept, x / (1 - rate), jnp.zeros_like(x))


def threefry_keys(keys: jax.Array) -> jax.Array:
    """Return keys of threefry for keys of rbg, and other keys as they are.

    Under `jax.vmap`, rbg draws the numbers of all keys from the first: they would depend on who shares a microbatch.
    """
    words = jax.random.key_data(keys) if _is_typed(keys) else keys
    # A key of rbg is four words, two keys of threefry.
    return jax.random.wrap_key_data(words[..., :2], impl="threefry2x32") if words.shape[-1:] == (4,) else keys


def _is_typed(keys: jax.Array) -> bool:
    return jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BranchNoise:
    """What training drops of a layer's branches, the terms that a block adds to x.

    keys: a random key for each sequence, [B], of this layer.
    dropout: share of the numbers of a branch that are set to zero.
    left_out: share of sequences for which a branch is left out, [], in this layer.
    """

    keys: jax.Array
    dropout: float = field(metadata={"static": True})
    left_out: jax.Array

    def drop(self, y_BTD: jax.Array, *, branch: int, rules: ShardingRules) -> jax.Array:
        """Return a branch y[B@data, T, D] with what is dropped as zeros, and the rest scaled to the same mean.

        Stochastic depth (Huang et al. 2016, section 3) leaves the branch of a whole sequence out.

        Args:
            branch: its number in the block, each of which draws other numbers.
        """
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(threefry_keys(self.keys), branch)
        of_depth, of_numbers = jax.vmap(jax.random.split, out_axes=1)(keys)
        context = rules.axes("tokens")
        y_BTD = dropout(y_BTD, rate=self.dropout, keys=of_numbers, tokens=rules.token_axes, context=context)
        is_kept_B = jax.vmap(jax.random.bernoulli, in_axes=(0, None))(of_depth, 1 - self.left_out)
        scale_B = jnp.where(is_kept_B, 1 / (1 - self.left_out), 0.0).astype(y_BTD.dtype)
        return y_BTD * scale_B[:, None, None]
