"""Give experts room for the tokens of a call.

Training gives an expert room for a little more than its mean load, and what exceeds it takes further rounds. Here a
token's neighbours are other people's requests, and rows of slots that are not in use: they must not change its answer,
nor the number of rounds in which all weights of experts are read. Read `stage.py` next.
"""

from dataclasses import replace

from ..layers import ModelConfig

MOST_TOKENS = 256
"""The most tokens of a call for which every expert has room for all: a GPU reads the weights of an expert in the time
in which it multiplies them with 200 (H200) to 300 (H100) tokens, so that the empty rows cost nothing up to there."""


def with_room(config: ModelConfig, *, num_tokens: int) -> ModelConfig:
    """Return the config with which to run this many tokens at a time, those of all devices that share the experts.

    No token of a request is ever left out. With more than `MOST_TOKENS` experts have the room of the config, and tokens
    beyond it take further rounds. Then a token's experts are added in an order that depends on other tokens, and sums
    differ by rounding.
    """
    if not config.num_experts:
        return config
    room = config.num_experts / config.experts_per_token if num_tokens <= MOST_TOKENS else config.expert_capacity
    return replace(config, expert_overflow="rounds", expert_capacity=room)
