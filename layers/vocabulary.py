"""Rows of zeros at the end of a vocabulary's tables, where the mesh does not divide the vocabulary.

257 words over four devices, which hold 72 rows each:

    device 0: words 0-71      device 1: 72-143      device 2: 144-215      device 3: 216-256, and 31 rows of zeros

A table is padded as it is cut for a mesh, and only there: saves and files hold the words alone, whatever the mesh was.
No result depends on the padding. The row of a padding id is NaN as that of any unknown one, and a padding logit is the
least float32, whose share in a softmax is 0; so padding has no gradient and stays 0 (Shoeybi et al. 2019, section 3,
pad GPT-2's 50,257 words to 51,200 for the same reason).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..meshes import ShardingRules
from ..meshes.device_axes import block_index, num_manual_blocks

TABLE = "table"
"""Name of the parameters [V, D]: the embedding's, and the head's where they are not tied."""

_OF_HEAD = ("lora_b", "lora_m")
"""Names of the parameters of the head's adapter that have a row for each word, [V, r] and [V]."""

LEAST_LOGIT = float(np.finfo(np.float32).min)
"""The logit of padding: finite, so that a device with nothing but padding has a finite maximum."""

_TILE = 8
"""A device's rows are a multiple of it where there is padding: 16-bit products of other widths are slower on GPUs."""


def stored_words(num_words: int, *, parts: int) -> int:
    """Return the rows of a table of so many words that is split into equal parts.

    >>> stored_words(256, parts=4), stored_words(257, parts=4), stored_words(257, parts=1)
    (256, 288, 257)
    """
    if num_words % parts == 0:
        return num_words
    return parts * _TILE * math.ceil(num_words / (parts * _TILE))


def resize_tables(tree: Any, num_rows: int) -> Any:
    """Return a tree {"embed", "head"} with tables of so many rows: zeros are added at the end, or padding is cut."""

    def resize(path: Any, leaf: jax.Array) -> jax.Array:
        if not is_table(path) or leaf.shape[0] == num_rows:
            return leaf
        missing = num_rows - leaf.shape[0]
        return jnp.pad(leaf, [(0, missing), *[(0, 0)] * (leaf.ndim - 1)]) if missing > 0 else leaf[:num_rows]

    return jax.tree_util.tree_map_with_path(resize, tree)


def pad_tables(ends: Any, *, rules: ShardingRules, mesh: Mesh) -> Any:
    """Return a tree {"embed", "head"} of arrays with tables as the devices of a mesh hold them, padded and split.

    Arrays may be shapes with shardings; what needs no padding is returned as it is.
    """
    table = ends["embed"]["table"]
    num_rows = stored_words(table.shape[0], parts=rules.num_parts("vocab", mesh.shape))
    if num_rows == table.shape[0]:
        return ends
    split = NamedSharding(mesh, rules.spec(("vocab", "embed")))
    shardings = jax.tree_util.tree_map_with_path(lambda path, x: split if is_table(path) else x.sharding, ends)
    resize = partial(resize_tables, num_rows=num_rows)
    if isinstance(table, jax.ShapeDtypeStruct):
        return jax.tree.map(lambda leaf, own: leaf.update(sharding=own), jax.eval_shape(resize, ends), shardings)
    return jax.jit(resize, out_shardings=shardings)(ends)


def is_table(path: Any) -> bool:
    """Return whether the path of a parameter of the embedding or the head is that of a table, or of rows beside it."""
    *_, parent, name = [None, *(getattr(node, "key", None) for node in path)]
    return name == TABLE or (parent == "head" and name in _OF_HEAD)


def natural_sharding(path: Any, dims: tuple[str, ...], leaf: Any, *, rules: ShardingRules, mesh: Mesh) -> NamedSharding:
    """Return the sharding of a parameter as files and saves hold it: tables have no padding.

    Raises:
        ShardingError: a dimension of another parameter does not split evenly.
    """
    if is_table(path):
        return whole_words_sharding(NamedSharding(mesh, rules.spec(dims)), leaf.shape)
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return rules.sharding(dims, shape=leaf.shape, mesh=mesh, name=name)


def whole_words_sharding(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a table without padding: its features are split where its words do not divide.

    table[V@tensor, D] -> table[V, D@tensor]. Axes that the features do not divide by either are left out, the innermost
    first.
    """
    words, features = (_axes_of(entry) for entry in (*sharding.spec, None, None)[:2])
    sizes = sharding.mesh.shape
    if shape[0] % math.prod(sizes[axis] for axis in words) == 0:
        return sharding
    if len(shape) == 1:
        return NamedSharding(sharding.mesh, PartitionSpec(), memory_kind=sharding.memory_kind)
    over = (*features, *words)
    while shape[1] % math.prod(sizes[axis] for axis in over):
        over = over[:-1]
    entry = over if len(over) > 1 else over[0] if over else None
    return NamedSharding(sharding.mesh, PartitionSpec(None, entry), memory_kind=sharding.memory_kind)


def hide_padding(logits_BTV: jax.Array, num_words: int, axes: tuple[str, ...]) -> jax.Array:
    """Return float32 logits with the least one for padding: logits[..., V@axes] of a vocabulary of `num_words`."""
    own = logits_BTV.shape[-1]
    if own * num_manual_blocks(axes) <= num_words:
        return logits_BTV
    word = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, logits_BTV.ndim - 1) + block_index(axes) * own
    return jnp.where(word < num_words, logits_BTV, LEAST_LOGIT)


def _axes_of(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
