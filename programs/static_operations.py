"""Compute XLA's operations on small arrays with numpy, for all devices at once.

`static_values.py` evaluates programs with them.

A value is [devices, ...], with a first dimension of 1 if all devices have the same value. An operation returns None if
its result is unknown.
"""

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .hlo import Array, Instruction

DTYPES = {"pred": "bool", "f32": "float32", "f64": "float64"} | {
    f"{sign}{bits}": f"{'u' if sign == 'u' else ''}int{bits}" for sign in "su" for bits in (8, 16, 32, 64)
}
"""Supported element types: HLO's name -> numpy's name."""

NumpyOperation = Callable[..., np.ndarray | None]


def compute(instruction: Instruction, type_: Array, *operands: np.ndarray) -> np.ndarray | None:
    """Return the value of an instruction, given those of its operands; None if its opcode is not supported."""
    operation = _OPERATIONS.get(instruction.opcode)
    return None if operation is None else operation(instruction, type_, *operands)


def _read_constant(instruction: Instruction, type_: Array) -> np.ndarray | None:
    # A large constant may be abbreviated as `{...}`; `report.hlo_text` asks XLA to print it whole.
    words = re.findall(r"[^\s{},]+", re.sub(r"/\*.*?\*/", "", instruction.payload))
    if len(words) != type_.num_elements or "..." in words:
        return None
    read: Any = (lambda word: word in {"true", "1"}) if type_.dtype == "pred" else float
    if type_.dtype[0] in "su":
        read = int
    return np.array([read(word) for word in words], DTYPES[type_.dtype]).reshape(1, *type_.dims)


def _iota(instruction: Instruction, type_: Array) -> np.ndarray | None:
    (axis,) = instruction.numbers("iota_dimension") or (0,)
    shape = [size if place == axis else 1 for place, size in enumerate(type_.dims)]
    counts = np.arange(type_.dims[axis]).astype(DTYPES[type_.dtype]).reshape(shape)
    return np.broadcast_to(counts, type_.dims)[None]


def _broadcast(instruction: Instruction, type_: Array, x: np.ndarray) -> np.ndarray | None:
    # `dimensions={1}`: dimension 0 of x becomes dimension 1 of the result; x is repeated along all others.
    into = instruction.numbers("dimensions")
    shape = [type_.dims[place] if place in into else 1 for place in range(len(type_.dims))]
    return np.broadcast_to(x.reshape(len(x), *shape), (len(x), *type_.dims))


def _reshape(_: Instruction, type_: Array, x: np.ndarray) -> np.ndarray | None:
    return x.reshape(len(x), *type_.dims)


def _bitcast(_: Instruction, type_: Array, x: np.ndarray) -> np.ndarray | None:
    # A bitcast between layouts may permute dimensions; one between vectors cannot.
    is_plain = type_.is_row_major or sum(size > 1 for size in type_.dims) < 2
    return x.reshape(len(x), *type_.dims) if is_plain and x.dtype == DTYPES[type_.dtype] else None


def _slice(instruction: Instruction, _: Array, x: np.ndarray) -> np.ndarray | None:
    found = re.search(r"\bslice=\{([^}]*)\}", instruction.attributes)
    parts = re.findall(r"\[([\d:]+)\]", found[1]) if found else []
    return x[(slice(None), *(slice(*map(int, part.split(":"))) for part in parts))]


def _dynamic_slice(instruction: Instruction, _: Array, x: np.ndarray, *starts: np.ndarray) -> np.ndarray | None:
    sizes = instruction.numbers("dynamic_slice_sizes")
    # Devices may slice at different places: gather with one index array per dimension, [devices, ...].
    rows = max(len(x), *map(len, starts)) if starts else len(x)
    x = np.broadcast_to(x, (rows, *x.shape[1:]))
    places: list[np.ndarray] = [np.arange(rows).reshape(-1, *[1] * len(sizes))]
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        # As in XLA, a slice that would reach past the end is moved back until it fits.
        first = np.clip(start.reshape(-1).astype(np.int64), 0, x.shape[axis + 1] - size)
        offsets = np.broadcast_to(first, (rows,))[:, None] + np.arange(size)
        places.append(offsets.reshape(rows, *[size if a == axis else 1 for a in range(len(sizes))]))
    return x[tuple(places)]


def _transpose(instruction: Instruction, _: Array, x: np.ndarray) -> np.ndarray | None:
    return x.transpose(0, *(place + 1 for place in instruction.numbers("dimensions")))


def _concatenate(instruction: Instruction, _: Array, *parts: np.ndarray) -> np.ndarray | None:
    rows = max(map(len, parts))
    (axis,) = instruction.numbers("dimensions")
    return np.concatenate([np.broadcast_to(part, (rows, *part.shape[1:])) for part in parts], axis=axis + 1)


def _convert(_: Instruction, type_: Array, x: np.ndarray) -> np.ndarray | None:
    return x.astype(DTYPES[type_.dtype])


def _compare(instruction: Instruction, _: Array, x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    found = re.search(r"\bdirection=([A-Z]{2})", instruction.attributes)
    return getattr(operator, found[1].lower())(*_align(x, y)) if found else None


def _select(_: Instruction, __: Array, where: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    return np.where(*_align(where, x, y))


def _clamp(_: Instruction, __: Array, low: np.ndarray, x: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    low, x, high = _align(low, x, high)
    return np.minimum(np.maximum(x, low), high)


def _align(*values: np.ndarray) -> list[np.ndarray]:
    """Give scalars as many dimensions as the arrays beside them, as `clamp` and `select` allow."""
    rank = max(value.ndim for value in values)
    return [value.reshape(len(value), *[1] * (rank - value.ndim), *value.shape[1:]) for value in values]


def _apply(function: Callable[..., Any]) -> NumpyOperation:
    """Return an operation that applies a numpy function elementwise, with the result in the instruction's type."""

    def operation(_: Instruction, type_: Array, *values: np.ndarray) -> np.ndarray | None:
        return np.asarray(function(*values)).astype(DTYPES[type_.dtype], copy=False)

    return operation


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Divide, towards zero for integers as XLA does; the result of a division by zero is arbitrary."""
    safe = np.where(y == 0, 1, y)
    if np.issubdtype(x.dtype, np.integer):
        return (np.sign(x) * np.sign(safe)).astype(x.dtype) * (np.abs(x) // np.abs(safe)).astype(x.dtype)
    return x / safe


def _remainder(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.fmod(x, np.where(y == 0, 1, y))


def _shift_right_logical(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # numpy repeats the sign bit of signed numbers, so their bits are shifted as unsigned; `_apply` casts back.
    unsigned = np.dtype(f"uint{8 * x.dtype.itemsize}")
    return np.right_shift(x.astype(unsigned), y.astype(unsigned))


_OPERATIONS: dict[str, NumpyOperation] = {
    "constant": _read_constant,
    "iota": _iota,
    "broadcast": _broadcast,
    "reshape": _reshape,
    "bitcast": _bitcast,
    "slice": _slice,
    "dynamic-slice": _dynamic_slice,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "convert": _convert,
    "compare": _compare,
    "select": _select,
    "clamp": _clamp,
    "add": _apply(np.add),
    "subtract": _apply(np.subtract),
    "multiply": _apply(np.multiply),
    "divide": _apply(_divide),
    "remainder": _apply(_remainder),
    "maximum": _apply(np.maximum),
    "minimum": _apply(np.minimum),
    "negate": _apply(np.negative),
    "abs": _apply(np.abs),
    "sign": _apply(np.sign),
    "and": _apply(np.bitwise_and),
    "or": _apply(np.bitwise_or),
    "xor": _apply(np.bitwise_xor),
    "not": _apply(np.invert),
    "shift-left": _apply(np.left_shift),
    "shift-right-arithmetic": _apply(np.right_shift),
    "shift-right-logical": _apply(_shift_right_logical),
}
