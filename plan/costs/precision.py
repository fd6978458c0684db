"""Precisions below 16 bits, which nothing here has a price for: whatever shows such a price says so.

Published steps in these precisions are predicted as bfloat16, which is 47% too slow for fp8 (28 rows of
dgxc_benchmarking; -6% for 4 of llm_foundry), 90% for mxfp8 and 115% for nvfp4 (megatron_bridge).
"""

import re
from collections.abc import Mapping
from typing import Any

from ...layers import ModelConfig

PRICED_AS = "bfloat16"
"""What products of these precisions are priced as."""

FP8_STEP_ERROR = 0.47
"""Predicted over measured, minus 1, of the largest source of fp8 training steps."""

_NARROW = re.compile(r"(nv|mx)?(?:fp|float)([48])(?!\d)")


def unpriced_matmuls(model: ModelConfig) -> str:
    """Return the precision of a model's products that is priced as another, "" where there is none.

    >>> unpriced_matmuls(ModelConfig(..., matmuls="fp8"))
    'fp8'
    """
    return "" if model.matmuls == "plain" else model.matmuls


def unpriced_precision(inputs: Mapping[str, Any]) -> str:
    """Return what a published row computes in where that is priced as 16 bits: "fp8", "mxfp8", "nvfp4"; else ""."""
    found = _NARROW.search(str(inputs.get("precision", "")).lower())
    return f"{found[1] or ''}fp{found[2]}" if found else ""
