"""The arrays that hold a server's layers: for each kind of layer one stack of all, or one array for each layer.

    6 layers, the first dense, 2 ranks        rank 0                        rank 1
                                              dense experts experts         experts experts experts
    loop        stacks of 1 and 3 layers      dense 0 | experts 0 1 .       .       | experts 2 3 4
    unrolled    stacks of 1, 1, 1, 1          dense 0 | experts 0 | 1 | .   .       | experts 2 | 3 | 4

All ranks have arrays of the same shapes; `.` is padding, never run. Read `params.py` next.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..layers import ModelConfig
from ..layers.experts.kinds import LayerKind, layer_kinds, layers_by_kind
from ..pipeline.model.balance import decode_layers

LayerLoop = Literal["loop", "unrolled"]
"""Whether a rank runs its layers in one loop over stacked arrays, or each layer has its own arrays and code.

On a GPU, a matrix product cannot read a slice of an array at an index that is known only at run time: in a loop, XLA
first copies the weights of every layer, and decoding takes three times as long. A loop compiles faster, in the time of
one layer.
"""


def default_loop(mesh: Mesh) -> LayerLoop:
    """Return how layers are run on a mesh: in a loop on CPUs, where unrolling gains nothing, unrolled elsewhere."""
    return "loop" if mesh.devices.flat[0].platform == "cpu" else "unrolled"


@dataclass(frozen=True, kw_only=True)
class StageStack:
    """One array of layers on every rank: `size` of a kind, from the layer `first` of those that a stage has of it.

    counts: number of layers of the kind of each stage, first to last.
    """

    kind: LayerKind
    counts: tuple[int, ...]
    first: int
    size: int

    @property
    def is_full(self) -> bool:
        """Whether no stage has padding here."""
        return self.first + self.size <= min(self.counts)

    def number_of(self, index: jax.Array | int, rank: jax.Array | int) -> jax.Array | int:
        """Return the number in the model of a layer of this array, on a rank."""
        before = [self.kind.first + self.first + sum(self.counts[:stage]) for stage in range(len(self.counts))]
        return index + (before[rank] if isinstance(rank, int) else jnp.asarray(before)[rank])


def stage_stacks(config: ModelConfig, *, num_ranks: int, layers: LayerLoop) -> tuple[StageStack, ...]:
    """Return the stacks of a stage, in the order in which they run.

    Raises:
        ScheduleError: there are fewer layers than stages.
    """
    counts, found = layers_by_kind(config, layers_of_stages(config, num_ranks=num_ranks)), []
    for kind in layer_kinds(config):
        own = counts[kind.name]
        sizes = (max(own),) if layers == "loop" else (1,) * max(own)
        firsts = accumulate(sizes, initial=0)
        found += [
            StageStack(kind=kind, counts=own, first=first, size=size)
            for first, size in zip(firsts, sizes, strict=False)
        ]
    return tuple(found)


def layers_of_stages(config: ModelConfig, *, num_ranks: int) -> tuple[int, ...]:
    """Return the number of layers of each stage that spreads the bytes read per token evenly.

    Raises:
        ScheduleError: there are fewer layers than stages.
    """
    return decode_layers(config, num_stages=num_ranks)
