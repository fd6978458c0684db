"""Models with classes of the user's answer from a cache as they do by full recomputation on one device."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from trellax.layers import Attention, ColumnLinear, ModelConfig, RowLinear
from trellax.layers.norms import apply_norm, make_norm
from trellax.meshes import ServeError, ShardingRules
from trellax.serve import Engine, check_model

from .models import answer_of, mesh_of, model_of, params_on, requests_of


class Squared(nnx.Module):
    """A feed-forward of squared ReLUs (So et al. 2021), of our layers."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        given: dict[str, Any] = {"dim": "inner", "dtype": config.dtype, "rngs": rngs, "rules": rules}
        self.up = ColumnLinear(config.hidden_size, 48, **given)
        self.down = RowLinear(48, config.hidden_size, **given)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(x_BTD)) ** 2)


class Shift(nnx.Module):
    """A norm of the scale alone, with a learned shift."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        del rngs, rules
        self.shift = nnx.Param(jnp.zeros(config.hidden_size), out_sharding=("embed",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD * jax.lax.rsqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-5) + jnp.expand_dims(
            self.shift[...], (0, 1)
        )


class Parallel(nnx.Module):
    """Attention and feed-forward side by side, with a cache."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        self.norm = make_norm(config, rngs=rngs, rules=rules)
        self.attention = Attention(config, rngs=rngs, rules=rules)
        self.mlp = Squared(config, rngs=rngs, rules=rules)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        n_BTD = apply_norm(self.norm, x_BTD)
        return x_BTD + self.attention(n_BTD) + self.mlp(n_BTD)

    def extend(self, x_BTD: jax.Array, *, cache: Any, layer: Any, new: Any) -> tuple[jax.Array, Any]:
        n_BTD = apply_norm(self.norm, x_BTD)
        attended_BTD, cache = self.attention.extend(n_BTD, cache=cache, layer=layer, new=new)
        return x_BTD + attended_BTD + self.mlp(n_BTD), cache


MODELS: dict[str, dict[str, Any]] = {
    "parts": {"mlp_class": f"{__name__}:Squared", "norm_class": f"{__name__}:Shift"},
    "block": {"block": f"{__name__}:Parallel"},
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2,pipe=2", "data=2,tensor=2"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_one_device(name: str, mesh: str) -> None:
    config, own = model_of("llama", dims=("inner=tensor",), **MODELS[name]), mesh_of(mesh)
    engine = Engine(config, params_on(config, own), mesh=own, slots=8, chunk=4, page=2, fill="nan")
    requests = requests_of("greedy", 8)
    found = [completion.tokens for completion in engine.generate(requests)]
    assert found == [answer_of(config, request)[0] for request in requests]


def test_block_without_a_cache_is_refused() -> None:
    config = model_of("llama", dims=("inner=tensor",), block=f"{__name__}:Squared")
    sizes = {"data": 1, "tensor": 1, "pipe": 1}
    with pytest.raises(ServeError, match="Squared has no method extend, by which a server computes new tokens"):
        check_model(config, sizes, max_tokens=8)
