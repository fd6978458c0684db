"""Compare the two tables of a model that says they are one: its embedding and its output table.

config.json declares them tied by `tie_word_embeddings`; the files may hold an `lm_head.weight` all the same, trained
apart. As in transformers 5, the files count then. Read `read.py` next.
"""

from pathlib import Path

import numpy as np

from ..meshes import WeightsError
from .architectures.tensor_names import TensorNames
from .tensor_files import FLOATS, TensorFiles, open_tensor_files

_BLOCK_BYTES = 64 << 20


def has_own_head(folder: str | Path, tensors: TensorNames) -> bool:
    """Return whether the files hold an output table of the embedding's shape and of other values.

    Reads both tables where both are there. Files that cannot be read are left to the reader of the weights: then the
    answer is no.
    """
    try:
        files = open_tensor_files(folder)
    except WeightsError:
        return False
    table = tensors.places["embed.table"].name
    names = [name for name in (tensors.prefix + table, table) if name in files.shapes]
    if not names or tensors.head not in files.shapes:
        return False
    shapes = {files.shapes[tensors.head], files.shapes[names[0]]}
    are_readable = {files.dtypes[tensors.head], files.dtypes[names[0]]} <= set(FLOATS)
    # Tables of two shapes, or of other types, are refused later.
    if len(shapes) > 1 or len(shapes.pop()) != 2 or not are_readable:
        return False
    return not _are_equal(files, tensors.head, names[0])


def _are_equal(files: TensorFiles, one: str, other: str) -> bool:
    num_rows, num_columns = files.shapes[one]
    # Blocks of rows, since the tables of a large model fill gigabytes. Eight bytes are those of the widest type.
    size = max(1, _BLOCK_BYTES // (8 * max(num_columns, 1)))
    for start in range(0, num_rows, size):
        index = (slice(start, min(start + size, num_rows)), slice(0, num_columns))
        if not np.array_equal(files.read(one, index), files.read(other, index)):
            return False
    return True
