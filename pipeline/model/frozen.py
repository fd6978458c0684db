"""Parameters that are frozen: used by forward and backward, without gradients of their own.

`StageFns.frozen` says of each parameter by name whether it is. The executor has no gradient, sum or product for one:
None stands in its place in every tree of gradients.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


def trained_mask(frozen: Callable[[str], bool] | None, params: Any) -> Any:
    """Return a tree of bools like params: whether a parameter has a gradient, by its name, `stages.up.kernel` say."""

    def is_trained(path: Any, _leaf: Any) -> bool:
        return frozen is None or not frozen(jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(is_trained, params)


def keep_trained(tree: Tree, mask: Any) -> Tree:
    """Return the tree with None in place of what belongs to frozen parameters."""
    return jax.tree.map(lambda is_trained, own: own if is_trained else None, mask, tree)


def merge_trained(trained: Tree, whole: Tree) -> Tree:
    """Return `whole` with the leaves of `trained` that are not None in their places."""
    return jax.tree.map(lambda new, old: old if new is None else new, trained, whole, is_leaf=lambda x: x is None)
