"""Log probabilities in the shapes of OpenAI's API: one for completions, another for chats.

A token is told by its text, and by the bytes of this text: tokens that are a part of a character are alike, as in vLLM.
"""

from collections.abc import Sequence
from typing import Any

from ...hub.text_stream import Tokenizer
from ..requests import TokenLogprobs


def text_logprobs(found: Sequence[TokenLogprobs], tokenizer: Tokenizer, *, offset: int) -> dict[str, Any]:
    """Return the `logprobs` of a completion.

    Args:
        offset: number of letters before the first of these tokens in the answer.
    """
    tokens = [tokenizer.decode([one.token]) for one in found]
    offsets = [offset + sum(map(len, tokens[:index])) for index in range(len(tokens))]
    # The chosen token is always among them, so there may be one more than was asked for.
    tops = [
        {tokenizer.decode([token]): value for token, value in one.top} | {text: one.logprob}
        for one, text in zip(found, tokens, strict=True)
    ]
    logprobs = [one.logprob for one in found]
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(found: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `logprobs` of a choice of a chat."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", errors="replace"))}

    content = [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(token, value) for token, value in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}
