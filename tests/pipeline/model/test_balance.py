"""Layers are balanced so that the longest stage is as short as possible, and no layer is lost."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.layers import ModelConfig, flops_per_token
from trellax.layers.experts.kinds import layer_kinds
from trellax.meshes import ScheduleError
from trellax.pipeline import balance_layers, resolve_layers, stage_costs
from trellax.pipeline.model.balance import balance_times, end_times, layer_times
from trellax.schedules import StageCost, build_schedule, simulate

EXTRA = st.one_of(st.just(0.0), st.floats(0, 15), st.integers(0, 12).map(float))

GPT2 = ModelConfig(vocab_size=50304, num_layers=12, hidden_size=768, num_heads=12, max_tokens=1024)


def model(num_layers: int) -> ModelConfig:
    return ModelConfig(vocab_size=256, num_layers=num_layers, hidden_size=32, num_heads=4)


def all_splits(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        yield tuple(end - start for start, end in pairwise((0, *cuts, num_layers)))


def longest(layers: tuple[int, ...], first_extra: float, last_extra: float) -> float:
    times = [float(count) for count in layers]
    times[0] += first_extra
    times[-1] += last_extra
    return max(times)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(stages=st.integers(1, 5), more=st.integers(0, 11), first=EXTRA, last=EXTRA)
def test_no_split_has_a_shorter_longest_stage(stages: int, more: int, first: float, last: float) -> None:
    num_layers = min(12, stages + more)
    ours = balance_layers(num_layers, num_stages=stages, first_extra=first, last_extra=last)
    assert (len(ours), sum(ours)) == (stages, num_layers)
    assert min(ours) >= 1
    best = min(longest(layers, first, last) for layers in all_splits(num_layers, stages))
    assert longest(ours, first, last) == pytest.approx(best, rel=1e-12)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    stages=st.integers(1, 4),
    counts=st.tuples(st.integers(0, 6), st.integers(1, 6)),
    ratio=st.floats(0.2, 5),
    first=EXTRA,
    last=EXTRA,
)
def test_no_split_of_unequal_layers_has_a_shorter_longest_stage(
    stages: int, counts: tuple[int, int], ratio: float, first: float, last: float
) -> None:
    times = [ratio] * counts[0] + [1.0] * counts[1]
    stages = min(stages, len(times))
    ours = balance_times(times, num_stages=stages, first_extra=first, last_extra=last)
    assert (len(ours), sum(ours)) == (stages, len(times))
    assert min(ours) >= 1

    def longest_of(layers: tuple[int, ...]) -> float:
        ends = list(accumulate(layers))
        own = [sum(times[end - count : end]) for end, count in zip(ends, layers, strict=True)]
        own[0] += first
        own[-1] += last
        return max(own)

    assert longest_of(ours) == pytest.approx(min(map(longest_of, all_splits(len(times), stages))), rel=1e-12)


def test_dense_layers_count_by_their_time() -> None:
    experts = replace(model(6), mlp="swiglu", bias="off", num_experts=8, experts_per_token=2, expert_size=64)
    wide = replace(experts, dense_layers=2, ffn_size=2048)
    times = layer_times(wide, num_tokens=16)
    flops = [flops_per_token(kind.config, num_tokens=16).forward - 2 * 256 * 32 for kind in layer_kinds(wide)]
    assert times == (flops[0] / flops[1], flops[0] / flops[1], 1.0, 1.0, 1.0, 1.0)
    layers = resolve_layers(wide, num_ranks=2, num_tokens=16)
    assert layers == (1, 5)
    costs = stage_costs(wide, layers_per_stage=layers, num_tokens=16)
    assert [cost.forward for cost in costs] == pytest.approx([times[0], times[1] + 4])


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "expected"),
    [(8, 4, (2, 2, 2, 2)), (8, 3, (2, 3, 3)), (7, 4, (1, 2, 2, 2)), (3, 3, (1, 1, 1)), (5, 1, (5,))],
)
def test_of_equal_stages_the_latest_gets_a_layer_more(
    num_layers: int, num_stages: int, expected: tuple[int, ...]
) -> None:
    assert balance_layers(num_layers, num_stages=num_stages) == expected


def test_head_takes_the_place_of_layers() -> None:
    assert balance_layers(14, num_stages=4, last_extra=2.0) == (4, 4, 4, 2)
    assert balance_layers(10, num_stages=3, first_extra=1.0, last_extra=1.0) == (3, 4, 3)
    assert balance_layers(4, num_stages=2, last_extra=50.0) == (3, 1)


def test_head_and_layers_are_counted_by_their_matmuls() -> None:
    ends = end_times(GPT2, num_tokens=1024, vocab="ends")
    layer = (flops_per_token(GPT2, num_tokens=1024).forward - 2 * 50304 * 768) / 12
    # By hand: 12 D D weights, 2 flops each, and half of 2 x 2 T D for the scores.
    assert layer == 2 * 12 * 768 * 768 + 2 * 1024 * 768
    assert ends.head == pytest.approx(6 * 50304 * 768 / layer, rel=1e-12)
    # Two rows of D float32 numbers forward and three backward, 200 flops a byte.
    assert ends.embedding == pytest.approx(2 * 768 * 4 * 200 / layer, rel=1e-12)
    assert ends.embedding_grad == pytest.approx(3 * 768 * 4 * 200 / layer, rel=1e-12)


def test_whole_vocabulary_adds_time_to_the_end_stages() -> None:
    ends = end_times(GPT2, num_tokens=1024, vocab="ends")
    first, middle, last = stage_costs(GPT2, layers_per_stage=(5, 5, 2), num_tokens=1024, vocab="ends")
    assert first == StageCost(forward=5 + ends.embedding, input_grad=5 + ends.embedding_grad, weight_grad=5)
    assert middle == StageCost(forward=5, input_grad=5, weight_grad=5)
    assert last == StageCost(forward=2 + ends.head, input_grad=2, weight_grad=2)


def test_split_vocabulary_adds_no_time_to_any_stage() -> None:
    costs = stage_costs(GPT2, layers_per_stage=(6, 6), num_tokens=1024, vocab="split")
    assert costs == (StageCost(forward=6, input_grad=6, weight_grad=6),) * 2


def test_recomputation_comes_before_the_input_gradient() -> None:
    sizes = {"layers_per_stage": (6, 6), "num_tokens": 1024}
    full, _ = stage_costs(GPT2, **sizes, remat="full")
    dots, _ = stage_costs(GPT2, **sizes, remat="dots")
    assert full == StageCost(forward=6, input_grad=12, weight_grad=6)
    assert dots == StageCost(forward=6, input_grad=6, weight_grad=6)


def test_auto_schedule_knows_that_recomputation_makes_halves_uneven() -> None:
    stages = stage_costs(GPT2, layers_per_stage=(3, 3, 3, 3), num_tokens=1024, remat="full")

    def time_of(name: str) -> float:
        schedule = build_schedule(name, num_ranks=4, num_microbatches=16, vocab="split", stages=stages)
        return simulate(schedule, stages=stages).makespan

    assert time_of("auto") <= time_of("1f1b") < time_of("zb-h1")


@settings(derandomize=True, deadline=None)
@given(num_layers=st.integers(4, 48), chunks=st.integers(1, 2), vocab=st.sampled_from(("split", "ends")))
def test_automatic_layers_have_the_shortest_longest_stage(num_layers: int, chunks: int, vocab: str) -> None:
    config, kind = model(num_layers), "ends" if vocab == "ends" else "split"
    sizes = {"num_ranks": 2, "num_chunks": chunks, "num_tokens": 64}
    layers = resolve_layers(config, **sizes, vocab=kind)

    def longest_of(layers: tuple[int, ...]) -> float:
        return max(cost.total for cost in stage_costs(config, layers_per_stage=layers, num_tokens=64, vocab=kind))

    best = min(longest_of(other) for other in all_splits(num_layers, 2 * chunks))
    assert longest_of(layers) == pytest.approx(best, rel=1e-12)


def test_whole_head_of_gpt2_leaves_its_stage_fewer_layers() -> None:
    split = resolve_layers(GPT2, num_ranks=4, num_tokens=1024, vocab="split")
    ends = resolve_layers(GPT2, num_ranks=4, num_tokens=1024, vocab="ends")
    assert (split, ends) == ((3, 3, 3, 3), (3, 4, 4, 1))


def test_given_layers_are_taken_as_they_are() -> None:
    config = model(10)
    assert resolve_layers(config, num_ranks=3, layers_per_stage=[3, 3, 4], num_tokens=64) == (3, 3, 4)
    given = (1, 2, 3, 4)
    assert resolve_layers(config, num_ranks=2, num_chunks=2, layers_per_stage=given, num_tokens=64) == given


MISTAKES: dict[str, tuple[int, int, int, tuple[int, ...] | None]] = {
    "too_deep": (3, 2, 2, None),
    "wrong_length": (8, 4, 1, (4, 4)),
    "empty_stage": (8, 2, 2, (3, 3, 0, 2)),
    "layers_lost": (30, 4, 1, (7, 7, 7, 7)),
    "layers_invented": (8, 2, 1, (4, 5)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_layers_that_do_not_add_up_are_refused(name: str, golden: Callable[[str, str], None]) -> None:
    num_layers, ranks, chunks, layers = MISTAKES[name]
    with pytest.raises(ScheduleError) as caught:
        resolve_layers(
            model(num_layers), num_ranks=ranks, num_chunks=chunks, layers_per_stage=layers or "auto", num_tokens=64
        )
    golden(f"errors/pipeline/balance_{name}.txt", f"ScheduleError: {caught.value}")


def test_fewer_layers_than_stages_cannot_be_balanced() -> None:
    with pytest.raises(ScheduleError, match="num_layers=2 cannot fill 3 stages"):
        balance_layers(2, num_stages=3)
