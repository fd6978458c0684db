"""Compare the embedding with the output table of a model whose config.json says that they are tied.

The files may nevertheless hold an `lm_head.weight` that was trained separately. As in transformers 5, the model is
untied then. Read `read.py` next.
"""

from pathlib import Path

import numpy as np

from ..meshes import WeightsError
from .architectures.tensor_names import TensorNames
from .tensor_files import FLOATS, TensorFiles, open_tensor_files

_BLOCK_BYTES = 64 << 20


def has_own_head(folder: str | Path, tensors: TensorNames) -> bool:
    """Return whether the files hold an output table with the shape of the embedding and other values.

    Reads both tables if both are there. Returns False if files cannot be read: the reader of the weights reports them.
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
    # Two shapes, or another dtype, are errors that the reader of the weights reports.
    if len(shapes) > 1 or len(shapes.pop()) != 2 or not are_readable:
        return False
    return not _are_equal(files, tensors.head, names[0])


def _are_equal(files: TensorFiles, one: str, other: str) -> bool:
    num_rows, num_columns = files.shapes[one]
    # In blocks of rows, since the tables of a large model take gigabytes. The widest dtype has 8 bytes.
    size = max(1, _BLOCK_BYTES // (8 * max(num_columns, 1)))
    for start in range(0, num_rows, size):
        index = (slice(start, min(start + size, num_rows)), slice(0, num_columns))
        if not np.array_equal(files.read(one, index), files.read(other, index)):
            return False
    return True
