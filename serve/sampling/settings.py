"""The settings by which sequences choose tokens and end: data, a row a sequence, so one program serves all requests."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Settings of B sequences; leaves are [B@data], `stops`, `bias_tokens` and `biases` are [B@data, E].

    Args:
        temperature: divisor of the logits before a draw; 0 takes the likeliest token.
        top_k: number of likeliest tokens to draw from; 0 for all.
        top_p: total probability of the likeliest tokens to draw from; 1 for all.
        min_p: least probability of a token to draw, as a share of that of the likeliest; 0 for all.
        repetition_penalty, frequency_penalty, presence_penalty: as in `penalties.py`; 1, 0 and 0 for none.
        bias_tokens, biases: tokens, padded with -1, and what is added to their logits.
        num_logprobs: number of likeliest tokens whose log probabilities are wanted with the chosen one's; -1 for none.
        is_constrained: whether the tokens that may be chosen are given, `SlotInputs.allowed`.
        seed: seed of the draws.
        limit: number of tokens, prompt and answer, at which the sequence ends.
        stops: tokens that end the sequence, padded with -1.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    frequency_penalty: Any
    presence_penalty: Any
    bias_tokens: Any
    biases: Any
    num_logprobs: Any
    is_constrained: Any
    seed: Any
    limit: Any
    stops: Any
