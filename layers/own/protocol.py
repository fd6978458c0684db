"""What a layer may be told beside x and return beside y: its place and random keys, parts of the loss and metrics.

Functions of a pipeline and blocks of the user's use both; read `../../pipeline/model/protocol.py` for the former.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from ...meshes import ScheduleError
from ..dropout import threefry_keys


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """Where a function runs, and the randomness and state that it may use.

    index: position of the layer in the model, int32 []; -1 in `first`, and -2 in `last`.
    stage: position of its stage, int32 []; -1 in `first` and `last`.
    microbatch: number of the microbatch, int32 [].
    sequences: position in the whole batch of each sequence of this microbatch on this data shard, int32 [b].
    key: the key that the pipeline was given, the same everywhere; None without one.
    state: this layer's part of the pipeline's `state`, without [chunks, ranks, layers]; None without one.
    """

    index: jax.Array
    stage: jax.Array
    microbatch: jax.Array
    sequences: jax.Array
    key: Any = None
    state: Any = None

    def keys(self) -> jax.Array:
        """Return a random key for each sequence, [b], that depends on layer and sequence alone.

        So what is drawn from them is the same on every mesh, with every schedule and number of microbatches. They are
        keys of threefry where the pipeline's is of rbg, which draws other numbers where keys are many.

        Raises:
            ScheduleError: the pipeline was given no key.
        """
        if self.key is None:
            raise ScheduleError(
                "info.keys() needs a random key, and the pipeline was given none.",
                fix="call it with key=jax.random.key(step), another one each step.",
            )
        own = jax.random.fold_in(threefry_keys(self.key), self.index.astype("uint32"))
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(own, self.sequences)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Output:
    """The result of a layer or of `last`, with what it adds to sums of the whole step.

    x: what the next layer is given; None in `last`.
    loss: a part of the loss, float32 [], added over layers, microbatches and data shards: that of the model in `last`,
        a router's balance or a z-loss in a layer. It has gradients.
    metrics: named arrays, added alike, without gradients.
    stats: a tree of arrays, added over microbatches and data shards for each layer by itself, without gradients: what a
        layer's state is updated from once a step. `last` has none.
    """

    x: Any = None
    loss: jax.Array | None = None
    metrics: Mapping[str, jax.Array] = field(default_factory=dict)
    stats: Any = None
