"""A mixture of experts gives a token the same whatever the other rows of a call hold, NaN of slots not in use too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.layers import ModelConfig
from trellax.layers.experts.moe import MoE
from trellax.serve import Request, param_shapes
from trellax.serve.experts import MOST_TOKENS, with_room

from .models import answer_of, engine_on, mesh_of, model_of, requests_of

ROWS = 8
OTHERS = {
    "nan": lambda own: np.full_like(own, np.nan),
    "inf": lambda own: np.full_like(own, np.inf),
    "the_same": lambda own: own,  # all rows want the same experts
    "zeros": np.zeros_like,
}


def layer(config: ModelConfig) -> Any:
    """A compiled layer of experts, x[B, 1, D] -> y[B, 1, D]."""
    graph, params = nnx.split(MoE(config, rngs=nnx.Rngs(0)))
    return jax.jit(lambda x_BTD: nnx.merge(graph, params)(x_BTD)[0])


def rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, 1, model_of("experts").hidden_size)).astype(np.float32)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("others", OTHERS)
def test_a_row_is_the_same_to_the_last_bit_beside_any_others(others: str, router: str) -> None:
    groups = {"router": router, "router_groups": 4, "router_groups_kept": 2} if router == "sigmoid" else {}
    run = layer(with_room(model_of("experts", **groups), num_tokens=ROWS))
    x_B1D, beside = rows(0), rows(1)
    beside[3] = x_B1D[3]
    expected = np.asarray(run(x_B1D))[3]
    assert (np.asarray(run(beside))[3] == expected).all()
    beside[np.arange(ROWS) != 3] = OTHERS[others](x_B1D[3])
    assert (np.asarray(run(beside))[3] == expected).all()


@pytest.mark.parametrize("others", OTHERS)
def test_in_rounds_no_row_is_left_out_for_the_others(others: str) -> None:
    """Rows of slots that are not in use come first, and the experts have room for one token each."""
    config = with_room(model_of("experts"), num_tokens=MOST_TOKENS + 1)
    x_B1D = rows(0)
    expected = np.asarray(layer(with_room(config, num_tokens=ROWS))(x_B1D))[-1]
    x_B1D[:-1] = OTHERS[others](x_B1D[-1])
    found = np.asarray(layer(config)(x_B1D))[-1]
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_a_model_trained_to_drop_tokens_drops_none_of_a_request() -> None:
    dropping = model_of("experts")
    x_B1D = jnp.asarray(rows(0))
    whole, room = layer(with_room(dropping, num_tokens=ROWS))(x_B1D), layer(dropping)(x_B1D)
    assert np.abs(whole - room).max() > 0.01 * np.abs(whole).max()


@pytest.mark.parametrize("mesh", ["data=2,tensor=2", "pipe=2"])
def test_answers_in_rounds_are_those_of_one_device(mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trellax.serve.experts.MOST_TOKENS", 0)
    requests = requests_of("greedy", 8)
    found = [completion.tokens for completion in engine_on(mesh, "experts").generate(requests)]
    assert found == [answer_of(model_of("experts"), request)[0] for request in requests]


def test_a_request_gets_the_same_alone_and_in_company() -> None:
    engine = engine_on("data=1", "experts", slots=4)
    own = Request(prompt=(5, 17, 33), max_new_tokens=16)
    alone = engine.generate([own])[0]
    assert engine.generate([*requests_of("sampled", 5), own])[-1] == alone
    # Four times the same: all tokens of a call want the same experts.
    assert engine.generate([own] * 4) == [alone] * 4


def test_weights_of_routers_stay_in_float32() -> None:
    shapes = param_shapes(model_of("experts", dtype="bfloat16"), mesh=mesh_of("tensor=2"))["blocks"]["mlp"]
    assert shapes["router"]["weight"].dtype == jnp.float32
    assert shapes["up"]["kernel"].dtype == jnp.bfloat16
