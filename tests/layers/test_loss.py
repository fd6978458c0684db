"""Cross-entropy over a split vocabulary is cross-entropy, and the logits stay where they are.

Fused with the projection it is the same to 2e-5, the tolerance of `sharded.py` and for its reason, chunk by chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trellax.layers import cross_entropy, projected_cross_entropy
from trellax.layers.options.logits import LogitShape
from trellax.layers.projected_loss import projected_losses
from trellax.programs.hlo import HloModule, leaves
from trellax.programs.matmul import matrix_flops

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


D = 16
X, TABLE = normal(B, T, D, seed=3), normal(V, D, seed=4)


def project(x: jax.Array, table: jax.Array, weights: jax.Array) -> jax.Array:
    return projected_cross_entropy(x, table, jnp.asarray(TARGETS), weights)


def project_plainly(x: jax.Array, table: jax.Array, weights: jax.Array) -> jax.Array:
    return reference(jnp.einsum("btd,vd->btv", x, table), jnp.asarray(TARGETS), weights)


@pytest.fixture
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk has as many tokens of the 32 as the parameter says."""
    monkeypatch.setattr("trellax.layers.projected_loss.chunk_tokens", lambda _: request.param)


@pytest.mark.parametrize(
    ("chunks", "mesh"), [(32, "tensor=1"), (8, "tensor=8"), (12, "data=2,tensor=4"), (1, "data=4")], indirect=["chunks"]
)
@pytest.mark.usefixtures("chunks")
def test_projected_loss_and_its_gradients_match_all_logits_at_once(mesh: str) -> None:
    devices, weights = mesh_of(mesh), jnp.asarray(MASKED)
    expected = jax.value_and_grad(project_plainly, argnums=(0, 1, 2))(X, TABLE, weights)
    with jax.set_mesh(devices):
        x, table = place(X, ("batch", None, None), mesh=devices), place(TABLE, ("vocab", None), mesh=devices)
        actual = jax.jit(jax.value_and_grad(project, argnums=(0, 1, 2)))(x, table, weights)
        alone = jax.jit(project)(x, table, weights)
    assert differing(jax.device_get(actual), jax.device_get(expected)) == {}
    assert differing(jax.device_get(alone), jax.device_get(expected[0])) == {}


@pytest.mark.parametrize(
    ("chunks", "mesh"),
    [(12, "data=2,tensor=4"), pytest.param(32, "tensor=1", marks=pytest.mark.slow)],
    indirect=["chunks"],
)
@pytest.mark.usefixtures("chunks")
def test_z_loss_and_its_gradients_match_all_logits_at_once(mesh: str) -> None:
    devices, weights, shape = mesh_of(mesh), jnp.asarray(MASKED), LogitShape(scale=0.5, cap=4.0)

    def plainly(x: jax.Array, table: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = shape.apply(jnp.einsum("btd,vd->btv", x, table), ())
        z_loss = (weights * 0.1 * jax.nn.logsumexp(logits, axis=-1) ** 2).sum()
        return reference(logits, jnp.asarray(TARGETS), weights) + z_loss, z_loss

    def fused(x: jax.Array, table: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = projected_losses(x, table, jnp.asarray(TARGETS), weights, z_loss=0.1, shape=shape)
        assert out.z_loss is not None
        return out.loss, out.z_loss

    wanted: dict[str, Any] = {"argnums": (0, 1, 2), "has_aux": True}
    expected = jax.value_and_grad(plainly, **wanted)(jnp.asarray(X), jnp.asarray(TABLE), weights)
    with jax.set_mesh(devices):
        x, table = place(X, ("batch", None, None), mesh=devices), place(TABLE, ("vocab", None), mesh=devices)
        actual = jax.jit(jax.value_and_grad(fused, **wanted))(x, table, weights)
        alone = jax.jit(fused)(x, table, weights)
    assert differing(jax.device_get(actual), jax.device_get(expected)) == {}
    assert differing(jax.device_get(alone), jax.device_get(expected[0])) == {}


@pytest.mark.parametrize("chunks", [8], indirect=True)
@pytest.mark.usefixtures("chunks")
def test_no_logits_of_all_tokens_and_none_computed_twice() -> None:
    step = jax.jit(jax.value_and_grad(project, argnums=(0, 1))).lower(X, TABLE, MASKED).compile()
    program = HloModule.parse(text_of(step))
    sizes = [leaf.num_elements for _, i in program.instructions() for leaf in leaves(i.type)]
    assert max(sizes) < B * T * V
    assert B * 2 * V in sizes
    (trips,) = {i.known_trip_count for _, i in program.instructions() if i.opcode == "while"}
    assert trips == 4
    assert trips * sum(matrix_flops(i, c) for c, i in program.instructions()) == 3 * 2 * B * T * V * D


def test_gradient_of_a_scaled_loss_is_scaled() -> None:
    table, weights = jnp.asarray(TABLE), jnp.asarray(MASKED)
    once, thrice = (jax.grad(lambda x, k=k: k * project(x, table, weights))(jnp.asarray(X)) for k in (1, 3))
    assert differing(3 * once, thrice) == {}


def test_bfloat16_activations_give_gradients_of_their_own_type() -> None:
    x = jnp.asarray(X, jnp.bfloat16)
    grad_x, grad_table = jax.grad(project, argnums=(0, 1))(x, jnp.asarray(TABLE), MASKED)
    assert (grad_x.dtype, grad_table.dtype) == (jnp.bfloat16, jnp.float32)
    expected = jax.grad(project_plainly, argnums=(0, 1))(X, TABLE, MASKED)
    # Eight bits of mantissa in each factor.
    assert differing((grad_x.astype(jnp.float32), grad_table), expected, tolerance=2e-2) == {}


@pytest.mark.parametrize("chunks", [4], indirect=True)
@pytest.mark.usefixtures("chunks")
def test_gradients_are_summed_once_and_not_once_a_chunk() -> None:
    devices = mesh_of("data=2,tensor=4")
    with jax.set_mesh(devices):
        x, table = place(X, ("batch", None, None), mesh=devices), place(TABLE, ("vocab", None), mesh=devices)
        step = jax.jit(jax.grad(project, argnums=(0, 1))).lower(x, table, MASKED).compile()
    found = collectives(text_of(step))
    # In the loop over chunks a few numbers a token; once, the gradient of x over tensor, and of the table over data.
    assert max(one.size for one in found if one.where == "loop") == 4
    assert sorted(one.size for one in found if one.where == "once" and one.size > D) == [V * D // 4, B * T * D // 2]
