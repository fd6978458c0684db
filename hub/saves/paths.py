"""Name the leaves of a tree by their path, such as `params.stages.mlp.up.kernel`.

The names do not depend on the classes of the tree (those of optax, flax or trellax), so classes may change without
making old saves unreadable.
"""

from typing import Any

import jax


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their path, in the order of the tree.

    >>> leaves_by_path({"b": {"kernel": 2}, "a": [1]})
    {'a.0': 1, 'b.kernel': 2}
    """
    return {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_text(path: Any) -> str:
    """Return the path of a leaf, as `jax.tree_util` gives it, as text."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
