"""The loss with a z-loss on any mesh and schedule: loss, gradients and norm of the plain formula under `jax.grad`."""

from dataclasses import replace
from typing import Any

import jax
import pytest
from trellax.layers import ModelConfig
from trellax.pipeline.model.losses import Z_LOSS, make_next_token_loss

from .law import answer_of, beyond, errors_of, one_device, pipeline_step, small_model
from .packed import documents_one_by_one, packed_batch

pytestmark = pytest.mark.slow

TOLERANCE = 2e-5
"""As in test_law.py."""

C = 0.05
"""Large, so that a wrong factor would be seen: the z-loss is a twentieth of the loss and more."""

NUM_SEQUENCES = 24

TIED = small_model(style="gpt", attention="mha", embeddings="tied")
UNTIED = small_model(style="llama", attention="gqa", embeddings="untied")
CAPPED = replace(UNTIED, logit_softcap=3.0, logit_scale=2.0)
EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "expert_size": 32, "balance_loss": 0.1}

CASES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "one device, tied": (TIED, {"mesh": "1x1x1", "schedule": "gpipe"}),
    "1f1b, untied": (UNTIED, {"mesh": "2x2x2", "schedule": "1f1b", "vocab": "split", "sequence": "on"}),
    "1f1b, tied": (TIED, {"mesh": "1x2x4", "schedule": "1f1b", "vocab": "split", "remat": "dots"}),
    "ends, tied": (TIED, {"mesh": "1x4x2", "schedule": "1f1b", "shard": "layer"}),
    "data, untied": (UNTIED, {"mesh": "8x1x1", "schedule": "gpipe", "shard": "step"}),
    "interleaved, tied": (TIED, {"mesh": "2x2x2", "schedule": "interleaved-1f1b", "num_chunks": 2}),
    "zero bubble, untied": (UNTIED, {"mesh": "2x2x2", "schedule": "zb-h1", "vocab": "split"}),
    "zero bubble, ends": (UNTIED, {"mesh": "1x4x2", "schedule": "zb-h1", "sequence": "on"}),
    "capped": (CAPPED, {"mesh": "2x2x2", "schedule": "1f1b", "vocab": "split"}),
    "padded": (replace(UNTIED, vocab_size=257), {"mesh": "2x2x2", "schedule": "1f1b", "vocab": "split"}),
    "context": (UNTIED, {"mesh": "data=2,context=2,pipe=2", "schedule": "1f1b", "vocab": "split"}),
    "experts": (replace(UNTIED, **EXPERTS), {"mesh": "expert=2,tensor=2,pipe=2", "schedule": "1f1b", "vocab": "split"}),
}


def with_z_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Equation of PaLM, section 5, from all logits."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    own = jax.numpy.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (weights * (log_z - own + C * log_z**2)).sum()


def z_loss_of(config: ModelConfig) -> float:
    """Return the part of the loss on one device that the z-loss is."""
    without = one_device(config, NUM_SEQUENCES).loss
    return one_device(config, NUM_SEQUENCES, loss_of_logits=with_z_loss).loss - without


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metric_are_those_of_the_formula(case: str) -> None:
    config, how = CASES[case]
    sizes = {"num_microbatches": 3, "num_sequences": NUM_SEQUENCES}
    step = pipeline_step(config, loss=make_next_token_loss(C), **sizes, **how)
    expected = one_device(config, NUM_SEQUENCES, loss_of_logits=with_z_loss)
    assert beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE) == {}
    metric = float(step.run(step.params, step.batch)[0].metrics[Z_LOSS])
    assert metric == pytest.approx(z_loss_of(config), rel=1e-4)
    assert metric > 0.03 * expected.loss


@pytest.mark.parametrize("mesh", ["2x2x2", "context=2,tensor=2,pipe=2"])
def test_packed_documents_have_the_z_loss_of_each_by_itself(mesh: str) -> None:
    sizes = {"num_microbatches": 2, "num_sequences": 8}
    how: dict[str, Any] = {"mesh": mesh, "schedule": "1f1b", "vocab": "split", "batch": packed_batch(8)}
    step = pipeline_step(UNTIED, loss=make_next_token_loss(C), **sizes, **how)
    expected = documents_one_by_one(UNTIED, 8, loss_of_logits=with_z_loss)
    assert beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE) == {}
