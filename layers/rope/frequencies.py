"""The angular frequency of each pair of features, under each kind of scaling to longer sequences.

A pair turns `rope_original_tokens` x frequency / 2 pi times in the sequences that the model was first trained on. Pairs
that turn often are kept, pairs that turn less than once are slowed down by `rope_factor`:

    linear    all pairs are slowed down                             Chen et al. 2023, section 3.2
    llama3    in between, in proportion to a pair's turns           Llama 3.1's release
    yarn      in between, in proportion to a pair's number          Peng et al. 2023, arXiv:2309.00071, section 3.2

    dynamic   none: only a sequence longer than rope_original_tokens would slow them down, and those are refused

    longrope  every pair by a factor of its own, of two sets: one   Ding et al. 2024, arXiv:2402.13753, section 3
              for sequences of rope_original_tokens, one for longer

Everything is in float64 until the end. Read `rotary.py` next.
"""

import math
from typing import Any

import numpy as np


def rope_frequencies(config: Any, *, num_tokens: int = 1) -> np.ndarray:
    """Return the frequency of each pair in radians per position, float32[R/2], for R = `config.rotated_size`.

    That of pair i is theta**(-2i/R) before scaling.

    Args:
        num_tokens: the length of the sequence, by which longrope chooses.
    """
    size = config.rotated_size
    own_h = config.rope_theta ** -(np.arange(0, size, 2) / size)
    if config.rope_scaling == "longrope":
        is_long = num_tokens > config.rope_original_tokens
        factors = config.rope_long_factors if is_long else config.rope_short_factors
        return (own_h / np.array(factors)).astype(np.float32)
    slow_h = own_h if config.rope_scaling == "dynamic" else own_h / config.rope_factor
    keep_h = {"llama3": _kept_by_turns, "yarn": _kept_by_number}.get(config.rope_scaling)
    if keep_h is None:
        return slow_h.astype(np.float32)
    share_h = keep_h(config, own_h)
    return (share_h * own_h + (1 - share_h) * slow_h).astype(np.float32)


def _kept_by_turns(config: Any, own_h: np.ndarray) -> np.ndarray:
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    turns_h = config.rope_original_tokens * own_h / (2 * np.pi)
    return np.clip((turns_h - low) / (high - low), 0, 1)


def _kept_by_number(config: Any, own_h: np.ndarray) -> np.ndarray:
    """Return 1 for pairs before the one with the high factor's turns, 0 behind that with the low one's, and a ramp.

    The two are whole numbers of pairs unless `rope_truncate` is "off", as in gpt-oss.
    """
    size = config.rotated_size

    def number(turns: float) -> float:
        ratio = config.rope_original_tokens / (turns * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(config.rope_theta))

    first, last = number(config.rope_high_frequency_factor), number(config.rope_low_frequency_factor)
    if config.rope_truncate == "on":
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    # As in transformers: a ramp from a pair to itself would divide by 0.
    last += 0.001 if first == last else 0
    return 1 - np.clip((np.arange(len(own_h)) - first) / (last - first), 0, 1)
