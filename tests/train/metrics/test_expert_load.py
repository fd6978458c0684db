"""Uneven loads are told with their cost, from the peaks on record."""

from dataclasses import replace
from typing import Any

from trellax.layers import ModelConfig
from trellax.train.metrics.expert_load import explain_load

SIZES: dict[str, Any] = {"vocab_size": 256, "num_layers": 2, "hidden_size": 64, "num_heads": 4, "bias": "off"}
MODEL = ModelConfig(num_experts=8, experts_per_token=2, **SIZES)


def lines(*peaks: float, dropped: float = 0.0) -> list[dict[str, float]]:
    return [{"val_loss": 5.0}, *({"expert_peak": peak, "dropped": dropped} for peak in peaks)]


def test_loads_within_the_room_of_an_expert_need_no_word() -> None:
    assert explain_load(lines(1.1, 1.25), MODEL) == ""
    assert explain_load([{"loss": 5.0}], MODEL) == ""
    assert explain_load(lines(float("nan")), MODEL) == ""
    # The first steps of a run do not count.
    assert explain_load(lines(4.0, *[1.1] * 10), MODEL) == ""


def test_uneven_loads_are_told_with_the_rounds_they_take() -> None:
    told = explain_load(lines(2.4, 2.8), MODEL)
    assert "has 2.60 times the mean, and room for 1.25 (model.expert_capacity): it takes about 3 rounds" in told
    assert "set model.router_bias='on'" in told
    assert "model.expert_capacity=2.6." in told


def test_dropped_pairs_are_told_as_a_share() -> None:
    told = explain_load(lines(2.0, dropped=0.125), replace(MODEL, expert_overflow="drop", router_bias="on"))
    assert "12.5% of pairs of a token and an expert are dropped" in told
    assert "Fix: raise model.balance_loss;" in told
