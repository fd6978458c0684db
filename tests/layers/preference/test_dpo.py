"""The loss of preferences is equation 7 of Rafailov et al. 2023, in numpy and in torch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.layers.preference.dpo import preference_loss

BETA, SHAPE, VOCAB, WIDTH = 0.2, (6, 9), 11, 8


def draw() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(*SHAPE, WIDTH)).astype(np.float32),
        "table": rng.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        "targets": rng.integers(0, VOCAB, SHAPE, np.int32),
        "weights": (rng.uniform(size=SHAPE) > 0.4).astype(np.float32),
        "reference": rng.uniform(10, 20, SHAPE[0]).astype(np.float32),
    }


def loss_of(x: jax.Array, table: jax.Array, given: dict[str, Any]) -> Any:
    shares = jnp.full(SHAPE[0], 2 / SHAPE[0])
    batch = (jnp.asarray(given["targets"]), jnp.asarray(given["weights"]))
    pairs = {"reference_B": jnp.asarray(given["reference"]), "shares_B": shares, "beta": BETA}
    return preference_loss(x, table, *batch, **pairs)


def test_loss_margin_and_accuracy_equal_numpys() -> None:
    given = draw()
    logits = given["x"].astype(np.float64) @ given["table"].T
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(log_probs, given["targets"][..., None], -1)[..., 0]
    log_ratio = (own * given["weights"]).sum(-1) + given["reference"]
    margin = BETA * (log_ratio[::2] - log_ratio[1::2])
    found = loss_of(jnp.asarray(given["x"]), jnp.asarray(given["table"]), given)
    np.testing.assert_allclose(found.loss, np.log1p(np.exp(-margin)).mean(), rtol=1e-5)
    np.testing.assert_allclose(found.margin, margin.mean(), rtol=1e-5)
    assert float(found.accuracy) == pytest.approx((margin > 0).mean())


def test_loss_and_gradients_equal_torchs() -> None:
    torch = pytest.importorskip("torch")
    given = draw()
    x, table = (torch.tensor(given[name], requires_grad=True) for name in ("x", "table"))
    log_probs = (x @ table.T).log_softmax(-1)
    own = log_probs.gather(-1, torch.tensor(given["targets"]).long()[..., None])[..., 0]
    # The reference's log-probabilities are those of frozen weights: numbers.
    policy, reference = (own * torch.tensor(given["weights"])).sum(-1), -torch.tensor(given["reference"])
    chosen, rejected = (policy - reference)[::2], (policy - reference)[1::2]
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    loss.backward()
    (found, grads) = jax.value_and_grad(lambda x, table: loss_of(x, table, given).loss, argnums=(0, 1))(
        jnp.asarray(given["x"]), jnp.asarray(given["table"])
    )
    np.testing.assert_allclose(found, loss.item(), rtol=1e-6)
    for own_grad, theirs in zip(grads, (x.grad, table.grad), strict=True):
        np.testing.assert_allclose(own_grad, theirs.numpy(), atol=1e-6)
