"""The factor of rotated features and of scores under YaRN and LongRoPE.

Peng et al. 2023, arXiv:2309.00071, section 3.3, and Ding et al. 2024, arXiv:2402.13753.
Plain numbers: command lines that only read a model's config import this without numpy.
"""

import math
from typing import Any


def rope_magnitude(config: Any) -> float:
    """Return the factor of rotated features: above 1 where scores of long sequences spread too thin.

    It is `rope_attention_factor`, or else 0.1 ln(rope_factor) + 1 under YaRN (section 3.3), and the root of
    1 + ln(rope_factor) / ln(rope_original_tokens) under LongRoPE (Ding et al. 2024, arXiv:2402.13753).
    """
    if config.rope_scaling not in ("yarn", "longrope"):
        return 1.0
    if config.rope_scaling == "longrope" and not config.rope_attention_factor:
        factor = config.rope_factor
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(config.rope_original_tokens))
    return config.rope_attention_factor or yarn_scale(config.rope_factor, 1.0)


def yarn_scale(factor: float, mscale: float) -> float:
    """Return 0.1 x mscale x ln(factor) + 1; 1 for a factor of 1 or less."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
