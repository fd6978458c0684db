"""Choose how many layers each stage gets so that the longest stage is as short as possible, and compute stage costs.

Time is counted in layers, of a model whose first layers are dense in layers with experts. The first and the last
stage have more to do:

    10 layers, 4 stages, a head that takes as long as 2.5 layers
    (2, 2, 3, 3)  ->  times 2  2  3  5.5     equal layers: every tick waits for the last stage
    (3, 3, 3, 1)  ->  times 3  3  3  3.5     balanced

Read `split.py` next.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from ...layers import ModelConfig, Remat, flops_per_token, param_counts
from ...layers.experts.kinds import layer_kinds
from ...meshes import ScheduleError
from ...meshes.arguments import check_choice, check_count, check_number
from ...schedules import StageCost, Vocab
from ...schedules.check import check_sizes
from ...schedules.vocab import check_vocab
from .stack import check_layers
from .stage import check_counts

LayersPerStage = Literal["auto"] | Sequence[int]
"""Number of layers of every stage, first to last, or "auto" for balanced ones."""

_FLOPS_PER_BYTE = 200
"""Flops that take as long as moving one byte, see `end_times`."""
_ITEM_BYTES = 4
_PASSES = 3
"""Forward, input gradient and weight gradient of a layer take equally long."""


@dataclass(frozen=True, kw_only=True)
class EndTimes:
    """Time of the embedding and the head, in units of one layer's forward.

    embedding, embedding_grad: added to the forward and the backward of the first stage.
    head: the head with loss and backward, added to the forward of the last stage, where the executor runs all three.
    """

    embedding: float
    embedding_grad: float
    head: float


def decode_layers(config: ModelConfig, *, num_stages: int) -> tuple[int, ...]:
    """Return the number of layers of each stage of a server that spreads the bytes read per token evenly.

    Decoding is bound by memory: layers and head take the time of reading their weights.

    Raises:
        ScheduleError: there are fewer layers than stages.
    """
    kinds = layer_kinds(config)
    blocks = [param_counts(kind.config).block for kind in kinds]
    times = [own / blocks[-1] for kind, own in zip(kinds, blocks, strict=True) for _ in range(kind.num_layers)]
    head = config.vocab_size * config.hidden_size / blocks[-1]
    return balance_times(times, num_stages=num_stages, last_extra=head if num_stages > 1 else 0.0)


def balance_layers(
    num_layers: int, *, num_stages: int, first_extra: float = 0.0, last_extra: float = 0.0
) -> tuple[int, ...]:
    """Return the number of layers of each stage, at least one, that minimises the time of the longest stage.

    Of two equally long stages the later gets the next layer, since earlier stages hold more microbatches in flight.

    >>> balance_layers(10, num_stages=4)
    (2, 2, 3, 3)
    >>> balance_layers(10, num_stages=4, last_extra=2.5)
    (3, 3, 3, 1)

    Args:
        first_extra, last_extra: time that the first and the last stage need besides their layers, in layers.

    Raises:
        ScheduleError: there are fewer layers than stages.
    """
    check_count("num_layers", num_layers, error=ScheduleError)
    check_count("num_stages", num_stages, error=ScheduleError)
    check_number("first_extra", first_extra, error=ScheduleError)
    check_number("last_extra", last_extra, error=ScheduleError)
    _check_depth(num_layers, num_stages=num_stages, what=f"{num_stages} stages")
    extras = _extras(num_stages, first_extra, last_extra)
    layers = [1] * num_stages
    # Layers are equal, so giving each to the stage that is shortest so far is optimal.
    shortest = [(1 + extra, -stage) for stage, extra in enumerate(extras)]
    heapq.heapify(shortest)
    for _ in range(num_layers - num_stages):
        stage = -shortest[0][1]
        layers[stage] += 1
        heapq.heapreplace(shortest, (layers[stage] + extras[stage], -stage))
    return tuple(layers)


def _extras(num_stages: int, first_extra: float, last_extra: float) -> list[float]:
    extras = [0.0] * num_stages
    extras[0] += first_extra
    extras[-1] += last_extra
    return extras


def balance_times(
    times: Sequence[float], *, num_stages: int, first_extra: float = 0.0, last_extra: float = 0.0
) -> tuple[int, ...]:
    """Return what `balance_layers` returns for layers that take these times, in the order of the model.

    Later stages are filled first, since earlier ones hold more microbatches in flight.

    >>> balance_times([0.5, 0.5, 1, 1, 1], num_stages=2)
    (3, 2)
    """
    if len(set(times)) == 1:
        ends = {"first_extra": first_extra / times[0], "last_extra": last_extra / times[0]}
        return balance_layers(len(times), num_stages=num_stages, **ends)
    extras = _extras(num_stages, first_extra, last_extra)
    # The time of the longest stage is found by halving; twice the sum of all has room for rounding.
    low, high = 0.0, 2 * (sum(times) + sum(extras))
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _fill(times, extras, middle) else (middle, high)
    filled = _fill(times, extras, high)
    assert filled is not None
    return filled


def _fill(times: Sequence[float], extras: Sequence[float], limit: float) -> tuple[int, ...] | None:
    """Return the layers of stages that take no longer than `limit`, the last filled first; None if there are none."""
    left, counts = len(times), []
    for stage in reversed(range(len(extras))):
        count, own = 0, extras[stage]
        # Every earlier stage has at least one layer.
        while left > stage and own + times[left - 1] <= limit:
            left, count, own = left - 1, count + 1, own + times[left - 1]
        if not count:
            return None
        counts.append(count)
    return tuple(reversed(counts)) if not left else None


def resolve_layers(
    config: ModelConfig,
    *,
    num_ranks: int,
    num_chunks: int = 1,
    layers_per_stage: LayersPerStage = "auto",
    num_tokens: int,
    vocab: Vocab = "split",
) -> tuple[int, ...]:
    """Return the number of layers of every stage: the given ones after a check of their sum, or balanced for "auto".

    Args:
        num_tokens: tokens of a sequence; attention makes layers of long sequences slower, compared with the head.

    Raises:
        ScheduleError: there are fewer layers than stages, or the list has another length, an entry below 1 or another
            sum: no layer is ever dropped.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=1, num_chunks=num_chunks)
    check_count("num_tokens", num_tokens, error=ScheduleError)
    check_vocab(vocab)
    num_stages = num_ranks * num_chunks
    ranks = f"{num_ranks} ranks" if num_chunks == 1 else f"{num_ranks} ranks x {num_chunks} chunks"
    _check_depth(config.num_layers, num_stages=num_stages, what=f"{ranks} = {num_stages} stages")
    if layers_per_stage != "auto":
        return check_layers(
            config.num_layers, num_ranks=num_ranks, num_chunks=num_chunks, layers_per_stage=layers_per_stage
        )
    ends = end_times(config, num_tokens=num_tokens, vocab=vocab)
    # The extras are times in forwards, and a layer costs three of them in a step.
    return balance_times(
        layer_times(config, num_tokens=num_tokens),
        num_stages=num_stages,
        first_extra=(ends.embedding + ends.embedding_grad) / _PASSES,
        last_extra=ends.head / _PASSES,
    )


def stage_costs(
    config: ModelConfig,
    *,
    layers_per_stage: Sequence[int],
    num_tokens: int,
    vocab: Vocab = "split",
    remat: Remat = "none",
) -> tuple[StageCost, ...]:
    """Return the time of every stage for one microbatch, in units of the last layer's forward.

    The input gradient and the weight gradient of a layer each take as long as its forward. With remat="full" the
    forward is computed again before the input gradient; other choices recompute next to nothing. With vocab="split"
    embedding and head belong to no stage: all ranks share them.

    Raises:
        ScheduleError: a count is not positive, or a word is not one of the choices.
    """
    check_choice("remat", remat, get_args(Remat), error=ScheduleError)
    check_counts(layers_per_stage)
    ends = end_times(config, num_tokens=num_tokens, vocab=vocab)
    again = 1.0 if remat == "full" else 0.0
    last, until = len(layers_per_stage) - 1, list(accumulate(layers_per_stage))
    times = layer_times(config, num_tokens=num_tokens)
    layers = [sum(times[end - count : end]) for end, count in zip(until, layers_per_stage, strict=True)]
    return tuple(
        StageCost(
            forward=own + (ends.embedding if stage == 0 else 0) + (ends.head if stage == last else 0),
            input_grad=(1 + again) * own + (ends.embedding_grad if stage == 0 else 0),
            weight_grad=own,
        )
        for stage, own in enumerate(layers)
    )


def layer_times(config: ModelConfig, *, num_tokens: int) -> tuple[float, ...]:
    """Return the time of every layer in units of the last one's, by the flops of a token."""
    kinds = layer_kinds(config)
    flops = [_layer_flops(kind.config, num_tokens=num_tokens) for kind in kinds]
    return tuple(own / flops[-1] for kind, own in zip(kinds, flops, strict=True) for _ in range(kind.num_layers))


def end_times(config: ModelConfig, *, num_tokens: int, vocab: Vocab = "split") -> EndTimes:
    """Return the time that embedding and head add to the end stages; zero with vocab="split".

    Layers and head are priced by their matmuls. For one token the head takes 2 V D flops forward and 4 V D backward; a
    layer's flops include the attention scores that the causal mask lets through. The embedding moves rows of D float32
    numbers: it reads one and writes one in the forward, and reads two and writes one in the backward. One byte counts
    as 200 flops, close to the ratio of an H200 (989 TFLOP/s in bfloat16 over 4.8 TB/s).
    """
    check_count("num_tokens", num_tokens, error=ScheduleError)
    check_vocab(vocab)
    if vocab == "split":
        return EndTimes(embedding=0.0, embedding_grad=0.0, head=0.0)
    # Flops of the head for one token; its input gradient and its weight gradient take as many again.
    projection = 2 * config.vocab_size * config.hidden_size
    layer = _layer_flops(layer_kinds(config)[-1].config, num_tokens=num_tokens)
    # The embedding computes nothing, so its bytes are converted to the flops that take as long.
    row = config.hidden_size * _ITEM_BYTES * _FLOPS_PER_BYTE
    return EndTimes(embedding=2 * row / layer, embedding_grad=3 * row / layer, head=3 * projection / layer)


def _layer_flops(config: ModelConfig, *, num_tokens: int) -> float:
    """Return the flops of one layer's forward for one token, without masked attention scores."""
    # The head's product is part of the model's flops, and priced apart.
    flops = flops_per_token(config, num_tokens=num_tokens)
    return (flops.forward - 2 * config.vocab_size * config.hidden_size) / config.num_layers


def _check_depth(num_layers: int, *, num_stages: int, what: str) -> None:
    if num_layers < num_stages:
        raise ScheduleError(
            f"num_layers={num_layers} cannot fill {what}: a stage has at least one layer.",
            fix=f"use {num_layers} stages or fewer, or set num_layers={num_stages} or more.",
        )
