"""The transformer block that each device runs, with layers that read the same input joined into one product.

    as stored       query[D, N@tensor]   key[D, K@tensor]   value[D, K@tensor]
    as it is run    qkv[D, (N + K + K)@tensor], on each device its own columns of all three side by side

A training step and a server join the parameters of all layers once: in a loop, kernels would be copied in every
iteration. Read `../../layers/joined_linear.py` for the layer.
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from ...layers import Block, ModelConfig
from ...layers.block import make_block
from ...layers.own.call import join_layers
from ...layers.quantized import Weights, quantize_layers
from ...meshes import ShardingRules
from .trees import on_mesh


@dataclass(frozen=True, kw_only=True)
class JoinedBlock:
    """The structure of a block before and after `Block.join`; it holds no arrays.

    own, joined: graphs for `nnx.merge`; equal where nothing is split, and nothing is joined.
    own_specs, joined_specs: partition specs of the parameters of one layer.
    """

    own: Any
    joined: Any
    own_specs: Any
    joined_specs: Any

    @classmethod
    def on(cls, mesh: Mesh, *, config: ModelConfig, rules: ShardingRules, weights: Weights = "plain") -> "JoinedBlock":
        """Return the structure on a mesh; nothing is computed."""
        block = nnx.eval_shape(lambda: quantize_layers(make_block(config, rngs=nnx.Rngs(0), rules=rules), weights))
        own, params = nnx.split(block, nnx.Param)
        own_specs, found = _specs_of(block), []

        # Joined layers know the widths of their parts, those of one device's blocks. So they are traced where they run.
        def region(params: Any) -> jax.Array:
            block: Block = nnx.merge(own, params)
            join_layers(block)
            found.append((nnx.split(block)[0], _specs_of(block)))
            return jax.numpy.zeros(())

        trace = jax.shard_map(region, mesh=mesh, in_specs=(on_mesh(own_specs, mesh),), out_specs=PartitionSpec())
        jax.eval_shape(trace, nnx.to_pure_dict(params))
        joined, joined_specs = found[0]
        return cls(own=own, joined=joined, own_specs=own_specs, joined_specs=joined_specs)

    def join(self, params: Any) -> Any:
        """Return the parameters of a layer as `merge` takes them; for use inside `shard_map` over all axes."""
        block: Block = nnx.merge(self.own, params)
        join_layers(block)
        return nnx.to_pure_dict(nnx.state(block, nnx.Param))

    def merge(self, params: Any) -> Block:
        """Return the block with joined parameters."""
        return nnx.merge(self.joined, params)


def _specs_of(block: Block) -> Any:
    return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(block, nnx.Param)))
