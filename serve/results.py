"""What an engine tells of its work: completions, usage, and the tokens that devices have chosen."""

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import numpy as np

from ..meshes import ServeError
from .requests import FinishReason, RequestScheduler, ServedSequence, TokenLogprobs
from .sampling.choose import Choice

Place = tuple[int, ...]
"""The place of a token among all that a call has chosen."""

_REASONS: dict[int, FinishReason] = {1: "stop", 2: "length", 3: "error"}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to a request: its new tokens, without a stop token, and the reason for its end.

    `logprobs` has an entry for each token if the request wants them.
    """

    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Work so far: ticks of decoding and of prefill, and prompt tokens that were read, and shared and so not read.

    `guessed_tokens` and `accepted_tokens` are those that speculation has guessed, and those of them that were right.
    `busy`, [P, data], counts the ticks in which each rank had work.
    """

    decode_ticks: int
    prefill_ticks: int
    read_tokens: int
    shared_tokens: int
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    busy: np.ndarray

    @property
    def idle_share(self) -> float:
        """Share of ticks in which a stage was idle, mean over stages, with filling and draining of the pipeline."""
        ticks = self.decode_ticks + self.prefill_ticks
        return 1 - float(self.busy.mean()) / ticks if ticks else 0.0

    @property
    def accepted_share(self) -> float:
        """Share of guessed tokens that were right; 0 if none were guessed."""
        return self.accepted_tokens / self.guessed_tokens if self.guessed_tokens else 0.0


def complete(sequence: ServedSequence) -> Completion:
    """Return the completion of an ended sequence."""
    return Completion(
        tokens=tuple(sequence.tokens),
        finish_reason=sequence.finish_reason or "length",
        logprobs=tuple(sequence.logprobs),
    )


def on_host(chosen: Choice) -> Choice:
    """Return what the last rank has chosen."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[-1], chosen)


def record_tokens(
    scheduler: RequestScheduler, places: Iterable[tuple[ServedSequence, Place]], chosen: Choice
) -> tuple[list[ServedSequence], list[ServedSequence]]:
    """Add chosen tokens to their sequences; return the sequences of these tokens, in order, and those that ended."""
    added, ended = [], []
    for sequence, place in places:
        reason = int(chosen.reason[place])
        # Cancelled, or ended by its constraint: the devices end it later.
        if sequence.finish_reason is not None:
            if reason:
                scheduler.finish(sequence, sequence.finish_reason)
            continue
        # A stop token is not part of the answer; the last token within the limit is.
        if _REASONS.get(reason) not in ("stop", "error"):
            _add_token(sequence, chosen, place)
            added.append(sequence)
        if reason:
            scheduler.finish(sequence, _REASONS[reason])
            ended.append(sequence)
    return added, ended


def not_finite(sequence: ServedSequence) -> ServeError:
    """Return the error of a sequence whose logits are not finite."""
    return ServeError(
        f"after {len(sequence.tokens)} tokens of the answer to request {sequence.id} logits are NaN or infinite, so no "
        "token is the likeliest: a weight is not finite, or the type to compute in overflows.",
        fix="check where the weights come from, or serve them in float32.",
    )


def _add_token(sequence: ServedSequence, chosen: Choice, place: Place) -> None:
    token, found, count = int(chosen.token[place]), chosen.logprobs, sequence.request.logprobs
    sequence.tokens.append(token)
    if count is not None:
        top = zip(found.top_tokens[place][:count].tolist(), found.top[place][:count].tolist(), strict=True)
        sequence.logprobs.append(TokenLogprobs(token=token, logprob=float(found.chosen[place]), top=tuple(top)))
