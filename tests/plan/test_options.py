"""The planner counts the parameters that a device holds of blocks with the choices of a few architectures."""

import math

import jax
import pytest
from trellax.plan.costs.device_params import block_params
from trellax.serve import param_shapes

from ..layers.options.variants import VARIANTS
from ..layers.sharded import mesh_of, small_config


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_block_has_as_many_parameters_on_a_device(name: str, tensor: int) -> None:
    config = small_config("llama", num_kv_heads=2, **VARIANTS[name])
    leaves = jax.tree.leaves(param_shapes(config, mesh=mesh_of(f"tensor={tensor}"))["blocks"])
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert config.num_layers * block_params(config, tensor=tensor) == held
