"""A printable table of sharded arrays: name, shape with mesh axes, bytes in total and per device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding

from .columns import align


@dataclass(frozen=True, kw_only=True)
class ShardingRow:
    """One array: path, shape with mesh axes (`[128, 512@tensor]`), bytes in total and on one device."""

    name: str
    shape: str
    total_bytes: int
    device_bytes: int


@dataclass(frozen=True, kw_only=True)
class ShardingTable:
    """The rows of a tree of arrays; `str()` draws them above their totals."""

    rows: tuple[ShardingRow, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all arrays, replicas not counted."""
        return sum(row.total_bytes for row in self.rows)

    @property
    def device_bytes(self) -> int:
        """Bytes on each device."""
        return sum(row.device_bytes for row in self.rows)

    def __str__(self) -> str:
        return self.draw()

    def draw(self, *, width: int | None = None) -> str:
        """Return the table as text; beyond `width` without the total bytes, and beyond that with two lines a row."""
        lines = [("parameter", "shape with axes", "bytes", "per device")]
        lines += [(r.name, r.shape, f"{r.total_bytes:,}", f"{r.device_bytes:,}") for r in self.rows]
        lines += [("total", "", f"{self.total_bytes:,}", f"{self.device_bytes:,}")]
        text, left_out = _align(lines), ""
        if width is not None and len(text[0]) > width:
            text = _align([(name, shape, held) for name, shape, _, held in lines])
            left_out = "\nleft out for want of columns: bytes of whole arrays"
        if width is not None and len(text[0]) > width:
            below = _align([(f"  {shape}", held) for _, shape, _, held in lines])
            text = [f"{line[0]}\n{rest}" for line, rest in zip(lines, below, strict=True)]
        rule = "-" * max(map(len, text[0].splitlines()))
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]]) + left_out


def sharding_table(tree: Any) -> ShardingTable:
    """Return the table of a tree of arrays, or of `ShapeDtypeStruct`s with shardings."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ShardingTable(rows=tuple(_row(jax.tree_util.keystr(p, simple=True, separator="."), x) for p, x in leaves))


def _align(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Align columns: texts to the left, the numbers in the last columns to the right."""
    # A whole table ends with bytes in total and per device, a shortened one with those per device alone.
    num_numbers = 2 if len(lines[0]) == 4 else 1
    return align(lines, left=len(lines[0]) - num_numbers).splitlines()


def _row(name: str, x: jax.Array | jax.ShapeDtypeStruct) -> ShardingRow:
    sharding = x.sharding
    item_bytes = x.dtype.itemsize
    total = math.prod(x.shape) * item_bytes
    if not isinstance(sharding, NamedSharding):
        return ShardingRow(name=name, shape=str(list(x.shape)), total_bytes=total, device_bytes=total)
    axes = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    dims = [f"{n}@{_axis_text(axis)}" if axis else f"{n}" for n, axis in zip(x.shape, axes, strict=True)]
    held = math.prod(sharding.shard_shape(x.shape)) * item_bytes
    return ShardingRow(name=name, shape=f"[{', '.join(dims)}]", total_bytes=total, device_bytes=held)


def _axis_text(axis: str | tuple[str, ...]) -> str:
    return axis if isinstance(axis, str) else "+".join(axis)
