"""The number formats of matrix products with weights: their peak, the bytes of their factors, and what a cast costs.

Only products of layers with weights use the format. The core of attention, norms, router, embedding, head, sums of
gradients and the optimizer stay in 16 and 32 bits. A factor is cast from 16 bits before its product, and where products
read both factors along their inner dimension (cuBLAS on Hopper) or scale blocks along it (OCP MX 1.0, section 5), once
more in the layout of the backward's product. Read `layer_time.py` next.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FormatName = Literal["plain", "fp8-delayed", "fp8-current", "fp8-block", "mxfp8", "nvfp4"]


@dataclass(frozen=True, kw_only=True)
class ProductFormat:
    """A number format: `dtype` names its peak, `item_bytes` are those of one number with its share of the scales.

    `scans` counts the passes over a tensor before its cast, to find its largest value.
    """

    dtype: Literal["", "float8", "float4"]
    item_bytes: float
    scans: int = 0

    @property
    def is_narrow(self) -> bool:
        """Whether factors are cast at all."""
        return bool(self.dtype)

    def cast_bytes(self, wide: int, *, layouts: int) -> float:
        """Return the memory traffic of casting one number of `wide` bytes, stored in one layout or two."""
        return (self.scans + 1) * wide + layouts * self.item_bytes if self.is_narrow else 0.0


FORMATS: Mapping[FormatName, ProductFormat] = {
    "plain": ProductFormat(dtype="", item_bytes=2.0),
    # One scale for a tensor: that of earlier steps, or of its own largest value, which takes a pass to find.
    "fp8-delayed": ProductFormat(dtype="float8", item_bytes=1.0),
    "fp8-current": ProductFormat(dtype="float8", item_bytes=1.0, scans=1),
    # A float32 scale for 128 numbers; one byte for 32; one byte for 16 besides the tensor's own.
    "fp8-block": ProductFormat(dtype="float8", item_bytes=1.0 + 4 / 128),
    "mxfp8": ProductFormat(dtype="float8", item_bytes=1.0 + 1 / 32),
    "nvfp4": ProductFormat(dtype="float4", item_bytes=0.5 + 1 / 16, scans=1),
}
"""Every format by name."""
