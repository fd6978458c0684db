"""Cross-entropy over a split vocabulary is cross-entropy, and the logits stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trellax.layers import cross_entropy

from .sharded import collectives, differing, mesh_of, normal, place, text_of

B, T, V = 4, 8, 64
TARGETS = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
MASKED = np.random.default_rng(2).integers(0, 3, (B, T)).astype(np.float32)
WEIGHTS = {"mean": np.full((B, T), 1 / (B * T), np.float32), "masked": MASKED / MASKED.sum()}
LOGITS = {"small": normal(B, T, V), "large": 1e4 * normal(B, T, V), "shifted": normal(B, T, V) - 1e4}


def reference(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    return (weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets)).sum()


@pytest.mark.parametrize(
    ("weights", "mesh"), [("mean", "tensor=1"), ("masked", "tensor=8"), ("masked", "data=2,tensor=4")]
)
@pytest.mark.parametrize("logits", LOGITS)
def test_cross_entropy_and_its_gradient_match_optax(logits: str, weights: str, mesh: str) -> None:
    devices = mesh_of(mesh)
    expected = jax.value_and_grad(reference)(jnp.asarray(LOGITS[logits]), TARGETS, WEIGHTS[weights])
    with jax.set_mesh(devices):
        split = place(LOGITS[logits], ("batch", "tokens", "vocab"), mesh=devices)
        actual = jax.jit(jax.value_and_grad(cross_entropy))(split, TARGETS, WEIGHTS[weights])
    assert differing(jax.device_get(actual), jax.device_get(expected)) == {}


def test_token_of_weight_zero_has_no_part_in_loss_or_gradient() -> None:
    changed = np.where(MASKED[..., None] == 0, 7.0, LOGITS["small"]).astype(np.float32)
    run = jax.value_and_grad(cross_entropy)
    whole, other = (run(jnp.asarray(x), TARGETS, MASKED) for x in (LOGITS["small"], changed))
    assert float(whole[0]) == float(other[0])
    assert float(jnp.abs(whole[1][MASKED == 0]).max()) == 0.0


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = jnp.asarray(LOGITS["small"], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.asarray(TARGETS), jnp.asarray(MASKED))
    assert differing(loss, reference(logits.astype(jnp.float32), jnp.asarray(TARGETS), jnp.asarray(MASKED))) == {}


def test_even_guess_costs_the_logarithm_of_the_vocabulary() -> None:
    loss = cross_entropy(jnp.zeros((B, T, V)), jnp.asarray(TARGETS), jnp.asarray(WEIGHTS["mean"]))
    assert float(loss) == pytest.approx(np.log(V), rel=1e-6)


def test_logits_never_cross_the_network() -> None:
    devices = mesh_of("tensor=4")
    with jax.set_mesh(devices):
        split = place(LOGITS["small"], ("batch", "tokens", "vocab"), mesh=devices)
        step = jax.jit(jax.value_and_grad(cross_entropy)).lower(split, TARGETS, MASKED).compile()
    found = collectives(text_of(step))
    assert {one.kind for one in found} == {"all-reduce"}
    assert max(one.size for one in found) == B * T
