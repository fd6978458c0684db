"""Attention from latent vectors equals one device on any mesh, in any schedule, with every way of splitting tokens."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from trellax.layers import ModelConfig

from .law import broken, small_model

TOLERANCE = 2e-5  # as in test_law.py, for the same reason
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_tokens": 8, "rope_high_frequency_factor": 2.0}


def latents(*, queries: int = 16, layers: int = 4, **more: Any) -> ModelConfig:
    """Heads of 12 features, 4 of them rotated, with values of 6 features from 24 numbers a token."""
    sizes: dict[str, Any] = {"head_size": 12, "rope_head_size": 4, "value_head_size": 6, "latent_size": 24}
    return replace(small_model(style="llama"), num_layers=layers, **sizes, query_latent_size=queries, **more)


@dataclass(frozen=True)
class Case:
    mesh: str
    schedule: str = "1f1b"
    microbatches: int = 2
    sequence: Literal["on", "off"] = "off"
    shard: Literal["none", "step", "layer"] = "none"
    context: Literal["gather", "ulysses"] = "gather"
    remat: Literal["none", "full", "dots"] = "none"
    queries: int = 16

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())


CASES = (
    Case("2x2x2", sequence="on", shard="layer", remat="dots"),
    Case("1x2x2", "zb-h1", 3, queries=0),
    Case("context=2,tensor=2,pipe=2", sequence="on", context="gather"),
)
MORE_CASES = (
    Case("1x8x1"),
    Case("1x4x2", "gpipe", sequence="on", queries=0),
    Case("2x1x4", "interleaved-1f1b", 4),
    Case("2x2x2", "zb-v", 3, sequence="on", remat="full"),
    Case("1x2x4", "v-half", 4, remat="dots"),
    Case("context=2,tensor=2,pipe=2", context="ulysses"),
    Case("context=4,tensor=2", sequence="on", queries=0, context="ulysses"),
    Case("4x2x1", shard="step"),
)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_latents_equal_one_device(case: Case) -> None:
    step = {"mesh": case.mesh, "schedule": case.schedule, "sequence": case.sequence, "shard": case.shard}
    step |= {"context": case.context, "remat": case.remat, "bubbles": "nan"}
    num_chunks = 2 if case.schedule in ("zb-v", "v-half", "interleaved-1f1b") else 1
    sizes = {"num_microbatches": case.microbatches, "num_sequences": 8 * case.microbatches, "num_chunks": num_chunks}
    config = latents(queries=case.queries, layers=8 if num_chunks == 2 else 4)
    assert broken(config, tolerance=TOLERANCE, **step, **sizes) == {}


@pytest.mark.parametrize(
    "more",
    [
        {
            **YARN,
            "rope_mscale_all": 0.5,
            "dense_layers": 1,
            "num_experts": 8,
            "experts_per_token": 2,
            "expert_size": 64,
            "shared_size": 64,
        },
        pytest.param({"attention_window": 5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_latents_beside_other_choices_equal_one_device(more: dict[str, Any]) -> None:
    mesh = "expert=2,tensor=2,pipe=2" if "num_experts" in more else "2x2x2"
    step = {"mesh": mesh, "schedule": "1f1b", "num_microbatches": 2, "num_sequences": 16}
    assert broken(replace(latents(), **more), tolerance=TOLERANCE, sequence="on", **step) == {}
