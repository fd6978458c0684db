"""Read kernels of experts that files hold in four bits, MXFP4, as tensors in bfloat16.

Every 32 weights in a row share a scale, a power of two (OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1):

    {name}_blocks  uint8 [E, rows, columns / 32, 16]    two weights a byte, the first in the low four bits
    {name}_scales  uint8 [E, rows, columns / 32]        E8M0: 2 ** (byte - 127); 255 is not a number
    {name}         bfloat16 [E, columns, rows]          what is read: weight x scale, without rounding

A weight is E2M1: a sign, two bits of exponent and one of mantissa. A device reads the bytes of its own weights, and of
the rest of their blocks. `tensor_files.py` opens the files, `read.py` reads them.
"""

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np

from .tensor_files import TensorFiles

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
"""The weight of each four bits; the highest is the sign."""

_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1)
"""The two weights of each byte [256, 2]."""

Slice = Callable[[tuple[slice, ...]], np.ndarray]


def widen_tensors(files: TensorFiles) -> TensorFiles:
    """Return the files with one tensor in place of blocks and scales; two that do not fit are a mistake."""
    shapes, dtypes, slices = dict(files.shapes), dict(files.dtypes), dict(files.slices)
    mistakes, lost = list(files.mistakes), {name.removesuffix(_BLOCKS) for name in files.lost}
    for blocks in [name for name in shapes if name.endswith(_BLOCKS)]:
        name = blocks.removesuffix(_BLOCKS)
        scales = name + _SCALES
        if problem := _find_problem(files, blocks, scales):
            mistakes.append(problem)
            lost.add(name)
        else:
            num_experts, rows, groups, _ = shapes[blocks]
            shapes[name], dtypes[name] = (num_experts, groups * _BLOCK, rows), "BF16"
            slices[name] = _make_slice(slices[blocks], slices[scales])
        for table in (shapes, dtypes, slices):
            for part in (blocks, scales):
                table.pop(part, None)
    return replace(files, shapes=shapes, dtypes=dtypes, slices=slices, mistakes=tuple(mistakes), lost=frozenset(lost))


def _find_problem(files: TensorFiles, blocks: str, scales: str) -> str:
    """Return a line if blocks are not [E, rows, n, 16] beside scales [E, rows, n], both bytes; else ""."""
    shape = files.shapes[blocks]
    if len(shape) != 4 or shape[3] != _BLOCK // 2:
        return f"{blocks} is {list(shape)}, not [experts, rows, columns / 32, 16]"
    if files.shapes.get(scales) != shape[:3]:
        given = f"is {list(files.shapes[scales])}" if scales in files.shapes else "is missing"
        return f"{scales} {given}, and {blocks} is {list(shape)}: scales are {list(shape[:3])}"
    wrong = [name for name in (blocks, scales) if files.dtypes[name] != "U8"]
    return f"{wrong[0]} is of type {files.dtypes[wrong[0]]}, not U8" if wrong else ""


def _make_slice(blocks: Slice, scales: Slice) -> Slice:
    """Return the function that reads a slice of the widened tensor, [E, columns, rows]."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        experts, columns, rows = index
        first, last = columns.start // _BLOCK, -(-columns.stop // _BLOCK)
        groups = slice(first, last)
        own = slice(columns.start - first * _BLOCK, columns.stop - first * _BLOCK, columns.step)
        whole = widen(blocks((experts, rows, groups, slice(0, _BLOCK // 2))), scales((experts, rows, groups)))
        return whole[..., own].swapaxes(-1, -2)

    return read


def widen(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return weights in bfloat16: blocks uint8 [E, R, n, 16], scales uint8 [E, R, n] -> [E, R, 32 n].

    >>> widen(np.full((1, 1, 1, 16), 0x21, np.uint8), np.full((1, 1, 1), 128, np.uint8))[0, 0, :4].tolist()
    [1.0, 2.0, 1.0, 2.0]
    """
    num_experts, rows, groups, _ = blocks.shape
    wide = np.empty((num_experts, rows, groups * _BLOCK), ml_dtypes.bfloat16)
    exponents = scales.astype(np.int32) - 127
    # Expert by expert: float32 of all of them would be twice the result.
    for expert, own in enumerate(blocks):
        pairs = _PAIRS[own].reshape(rows, groups, _BLOCK)
        with np.errstate(over="ignore"):
            scaled = np.ldexp(pairs, exponents[expert][..., None])
        scaled[scales[expert] == 255] = np.nan
        wide[expert] = scaled.reshape(rows, -1).astype(ml_dtypes.bfloat16)
    return wide
