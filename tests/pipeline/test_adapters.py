"""Adapters of experts, of attention from latent vectors and of layers of two kinds have the gradients of one device.

Those of dense layers are in test_frozen.py.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from trellax.layers import ModelConfig

from .law import answer_of, beyond, errors_of, pipeline_step, small_model
from .test_dense_layers import mixed
from .test_experts import TOLERANCE, experts
from .test_frozen import frozen_answer
from .test_latents import latents

LORA: dict[str, Any] = {"num_layers": 4, "lora_rank": 3, "lora_alpha": 6.0}
DORA: dict[str, Any] = LORA | {"lora_magnitude": "on"}
NF4: dict[str, Any] = LORA | {"lora_base": "nf4"}
FEW: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "expert_size": 32}

MODELS: dict[str, ModelConfig] = {
    "experts": replace(experts(), **LORA),
    "further rounds": replace(experts(capacity=0.4), **LORA),
    "experts alone": replace(experts(capacity=0.4), **LORA, lora_targets=("experts.up", "experts.down")),
    "experts with magnitudes": replace(experts(capacity=0.4), **DORA),
    "experts in four bits": replace(experts(capacity=0.4), **NF4),
    "biases": replace(experts(bias="on", capacity=0.4), **DORA, lora_targets=("mlp.*",)),
    "latents": replace(latents(**FEW), **LORA, lora_targets=("attention.*", "experts.gate")),
    "latents with magnitudes": replace(latents(queries=0, **FEW), **DORA, lora_targets=("attention.*",)),
    "latents in four bits": replace(latents(**FEW), **NF4),
    "head": replace(small_model(style="llama", embeddings="untied"), **LORA, lora_targets=("up", "head")),
    "head alone": replace(small_model(style="llama", embeddings="untied"), **DORA, lora_targets=("head",)),
    "two kinds": replace(mixed(dense=1), **LORA),
    "one of two kinds": replace(mixed(dense=1), **DORA, lora_targets=("mlp.down", "shared.*")),
}

CASES: tuple[dict[str, Any], ...] = (
    {"mesh": "expert=2,tensor=2,pipe=2", "schedule": "1f1b", "sequence": "on"},
    {"mesh": "data=2,expert=2,pipe=2", "schedule": "zb-h1", "shard": "layer", "remat": "dots"},
    {"mesh": "data=2,expert=2,tensor=2", "schedule": "gpipe", "sequence": "on", "shard": "step", "remat": "full"},
    {"mesh": "2x2x2", "schedule": "1f1b", "sequence": "on", "shard": "layer", "vocab": "split"},
    {"mesh": "context=2,tensor=2,pipe=2", "schedule": "1f1b", "sequence": "on", "remat": "dots"},
    {"mesh": "1x1x1", "schedule": "gpipe"},
)

WITHOUT_EXPERTS = {
    "expert=2,tensor=2,pipe=2": "2x2x2",
    "data=2,expert=2,pipe=2": "4x1x2",
    "data=2,expert=2,tensor=2": "4x2x1",
}
"""Meshes for models that have no experts to split."""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_adapters_have_the_gradients_of_one_device(case: dict[str, Any], name: str) -> None:
    if not MODELS[name].num_experts:
        case = case | {"mesh": WITHOUT_EXPERTS.get(case["mesh"], case["mesh"])}
    assert broken_gradients(MODELS[name], case) == {}


def broken_gradients(config: ModelConfig, case: dict[str, Any]) -> dict[str, float]:
    """Return the errors of loss, gradients and norm that are too large, of a step on a mesh."""
    step = pipeline_step(config, num_microbatches=2, num_sequences=16, **case)
    assert step.model.fns.frozen is not None
    expected = frozen_answer(config, 16, step.model.fns.frozen)
    leaves = jax.tree_util.tree_leaves_with_path(expected.grads)
    assert leaves
    assert all(path[-1].key.startswith("lora") and np.any(leaf) for path, leaf in leaves)
    return beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE)
