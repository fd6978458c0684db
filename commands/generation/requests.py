"""Make requests of the engine from the arguments of `trellax generate`."""

import argparse
from collections.abc import Sequence

from ...hub.model_folder import ModelSource
from ...serve import Constraint, Request
from .answer_text import stop_tokens


def stops_of(stops: Sequence[str], source: ModelSource) -> tuple[int, ...]:
    """Return the tokens that end an answer: stop strings of one token, and the ends of the model."""
    return tuple(dict.fromkeys([*stop_tokens(stops, source.tokenizer), *source.end_ids]))


def make_request(
    prompt: Sequence[int],
    args: argparse.Namespace,
    *,
    source: ModelSource,
    stops: Sequence[str],
    index: int,
    max_new_tokens: int,
    constraint: Constraint | None = None,
) -> Request:
    """Return the request for prompt `index`, token ids, with the settings of the arguments."""
    return Request(
        prompt=tuple(prompt),
        max_new_tokens=max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        logit_bias=args.logit_bias,
        logprobs=args.logprobs,
        seed=args.seed + index,
        stop=stops_of(stops, source),
        constraint=constraint,
    )
