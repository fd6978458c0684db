"""The loss of preferences on any mesh and schedule: loss, gradients, norm and metrics of the plain formula."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.layers import ModelConfig, Transformer
from trellax.pipeline.model.losses import make_preference_loss

from .law import (
    Answer,
    answer_of,
    beyond,
    errors_of,
    global_norm,
    masked_batch,
    natural_params,
    pipeline_step,
    small_model,
)
from .test_frozen import keep_trained

TOLERANCE = 2e-5
"""As in test_law.py."""

MODEL = small_model(style="llama", attention="gqa", embeddings="untied")
BETA = 0.3
NUM_ROWS = 16

CASES: dict[str, dict[str, Any]] = {
    "one device": {"mesh": "1x1x1", "schedule": "gpipe"},
    "1f1b": {"mesh": "2x2x2", "schedule": "1f1b", "vocab": "split", "sequence": "on"},
    "1f1b, ends": {"mesh": "1x4x2", "schedule": "1f1b", "shard": "layer"},
    "interleaved": {"mesh": "2x2x2", "schedule": "interleaved-1f1b", "num_chunks": 2, "remat": "dots"},
    "interleaved, split": {"mesh": "1x4x2", "schedule": "interleaved-1f1b", "num_chunks": 2, "vocab": "split"},
    "zero bubble": {"mesh": "2x2x2", "schedule": "zb-h1", "vocab": "split"},
    "zero bubble, ends": {"mesh": "1x4x2", "schedule": "zb-h1", "sequence": "on"},
}


def pairs() -> dict[str, np.ndarray]:
    """Pairs of rows [N, T], of which the last pair does not count, with answers of different lengths."""
    batch, rng = dict(masked_batch(NUM_ROWS)), np.random.default_rng(5)
    shares = np.repeat(np.where(np.arange(NUM_ROWS // 2) < NUM_ROWS // 2 - 1, 1 / (NUM_ROWS // 2 - 1), 0.0), 2)
    batch["weights"] = (batch["weights"] > 0).astype(np.float32)
    batch["shares"] = shares[:, None].astype(np.float32)
    batch["reference"] = rng.uniform(30, 50, (NUM_ROWS, 1)).astype(np.float32)
    return batch


def row_losses(config: ModelConfig, params: Any) -> jax.Array:
    """The negative log-likelihood of every row, from all logits."""
    model = nnx.merge(nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0], params)
    batch = pairs()
    words = jax.nn.log_softmax(model(jnp.asarray(batch["tokens"])))
    own = jnp.take_along_axis(words, jnp.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    return -(jnp.asarray(batch["weights"]) * own).sum(-1)


@cache
def one_device(config: ModelConfig) -> tuple[Answer, float, float]:
    """Loss and gradients by `jax.grad` of equation 7, the mean margin, and the share of positive ones."""
    batch = pairs()
    counted = batch["shares"][::2, 0] > 0

    def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
        log_ratio = jnp.asarray(batch["reference"][:, 0]) - row_losses(config, params)
        margin = BETA * (log_ratio[::2] - log_ratio[1::2])[counted]
        return -jnp.log(jax.nn.sigmoid(margin)).mean(), margin

    (loss, margin), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(natural_params(config))
    answer = Answer(loss=float(loss), norm=float(global_norm(grads)), grads=jax.device_get(grads))
    return answer, float(margin.mean()), float((margin > 0).mean())


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_are_those_of_the_formula(case: str) -> None:
    step = pipeline_step(
        MODEL, num_microbatches=4, num_sequences=NUM_ROWS, batch=pairs(), loss=make_preference_loss(BETA), **CASES[case]
    )
    expected, margin, accuracy = one_device(MODEL)
    assert beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE) == {}
    metrics = step.run(step.params, step.batch)[0].metrics
    np.testing.assert_allclose(metrics["reward_margin"], margin, rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_accuracy"], accuracy, rtol=1e-6)
    assert 0 < accuracy < 1


@pytest.mark.parametrize("case", ["1f1b", "zero bubble, ends"])
def test_adapters_are_trained_on_preferences(case: str) -> None:
    config = replace(MODEL, lora_rank=3)
    step = pipeline_step(
        config,
        num_microbatches=4,
        num_sequences=NUM_ROWS,
        batch=pairs(),
        loss=make_preference_loss(BETA),
        **CASES[case],
    )
    assert step.model.fns.frozen is not None
    expected = keep_trained(one_device(config)[0], step.model.fns.frozen)
    assert beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE) == {}
