"""Name the precisions below 16 bit, which the cost model has no times for and prices as bfloat16 with a warning.

Against published steps such predictions are 47% too slow for fp8 (28 rows of dgxc_benchmarking; -6% for 4 of
llm_foundry), 90% for mxfp8 and 115% for nvfp4 (megatron_bridge).
"""

from ...layers import ModelConfig

PRICED_AS = "bfloat16"
"""The precision whose times are used instead."""

FP8_STEP_ERROR = 0.47
"""Predicted over measured time, minus 1, of the largest source of fp8 training steps."""


def unpriced_matmuls(model: ModelConfig) -> str:
    """Return the precision of a model's matrix products if it is predicted as another, else "".

    >>> unpriced_matmuls(ModelConfig(..., matmuls="fp8"))
    'fp8'
    """
    return "" if model.matmuls == "plain" else model.matmuls
