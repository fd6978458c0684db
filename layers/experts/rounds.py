"""Run the experts on the rows of one round, and further rounds while any expert of the group has tokens left.

The first round is what happens nearly always, and jax differentiates it. The number of rounds is known at run time
alone, and jax has no backward for such a loop: the backward here runs the same rounds again, each with its own.
Devices along expert decide together, since each sends in every round; those along data decide for themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ...meshes.device_axes import block_index, hold, manual_axes, mark_varying
from ...meshes.scopes import RARELY
from ..collectives import max_blocks
from ..in_order import held
from ..mlp import Gate, gelu
from .slots import Order, Slots, from_rows, round_slots, to_rows

EXPERT_ROWS = "expert_rows"
"""Checkpoint name of what experts read and write: rematerialization keeps it, so the backward sends nothing again."""


class Weight(NamedTuple):
    """The kernels of a linear layer of experts, [E, D, F], their scales and biases [E, F], None if there are none.

    a, b: adapters [E, D, r], times alpha / r, and [E, r, F]; factor: what products are multiplied by, [E, F], where
        columns have magnitudes.
    """

    kernel: Any
    scale: Any
    bias: Any
    a: Any = None
    b: Any = None
    factor: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The weights of this device's experts: up and gate [E@expert, D, F@tensor], down [E@expert, F@tensor, D].

    Biases are [E@expert, F@tensor] and [E@expert, D]. gate is None where the feed-forward has none.
    """

    up: Any
    gate: Any
    down: Any


@dataclass(frozen=True, kw_only=True)
class Room:
    """How experts run: `capacity` rows for each of them and device, the axes that split them, and those of features.

    gate: the function of gate and up.
    trained: what has a gradient, all weights or their adapters alone.
    """

    capacity: int
    axes: tuple[str, ...]
    features: tuple[str, ...]
    gate: Gate
    trained: Literal["all", "adapters"] = "all"

    def slots(self, order: Order, number: jax.Array | int) -> Slots:
        """Return the rows of a round."""
        return round_slots(order, number, capacity=self.capacity)


def run_round(x_nD: jax.Array, weights_nk: jax.Array, kernels: Kernels, slots: Slots, room: Room) -> jax.Array:
    """Return what the experts make of the pairs of one round: x[n, D] -> y[n, D], partial sums where F is split.

    Two all-to-all over expert, each of [E, C, D].
    """
    rows_SD = to_rows(x_nD, slots, weights_nk.shape[1])
    rows_ECD = rows_SD.reshape(-1, room.capacity, x_nD.shape[1])
    axes = manual_axes(room.axes)
    if axes:
        rows_ECD = jax.lax.all_to_all(rows_ECD, axes, split_axis=0, concat_axis=1, tiled=True)
    rows_ECD = _run_experts(checkpoint_name(rows_ECD, EXPERT_ROWS), kernels, room)
    if axes:
        rows_ECD = jax.lax.all_to_all(rows_ECD, axes, split_axis=1, concat_axis=0, tiled=True)
    rows_ECD = checkpoint_name(rows_ECD, EXPERT_ROWS)
    return from_rows(rows_ECD.reshape(rows_SD.shape), weights_nk, slots)


def _run_experts(rows_ECD: jax.Array, kernels: Kernels, room: Room) -> jax.Array:
    """rows[E, C, D] of each expert -> [E, C, D], in the dtype of the rows."""
    up = checkpoint_name(_product(rows_ECD, kernels.up), EXPERT_ROWS)
    if kernels.gate is None:
        return _product(gelu(up), _add_once(kernels.down, room.features))
    gate = checkpoint_name(_product(rows_ECD, kernels.gate), EXPERT_ROWS)
    return _product(room.gate(gate, up), _add_once(kernels.down, room.features))


def _product(rows: jax.Array, weight: Weight) -> jax.Array:
    """rows[E, C, D] @ kernel[E, D, F] -> [E, C, F], with adapters and a bias if there are some."""
    kernel = weight.kernel.astype(rows.dtype)
    if weight.scale is None:
        y_ECF = jnp.einsum("ecd,edf->ecf", rows, kernel)
    else:
        y_ECF = jnp.einsum("ecd,edf->ecf", rows, kernel, preferred_element_type=jnp.float32)
        y_ECF = (y_ECF * weight.scale[:, None]).astype(rows.dtype)
    if weight.a is not None:
        small_ECr = jnp.einsum("ecd,edr->ecr", rows, weight.a.astype(rows.dtype))
        y_ECF = y_ECF + jnp.einsum("ecr,erf->ecf", small_ECr, weight.b.astype(rows.dtype))
    if weight.factor is not None:
        y_ECF = (y_ECF.astype(jnp.float32) * weight.factor[:, None]).astype(rows.dtype)
    return y_ECF if weight.bias is None else y_ECF + weight.bias[:, None].astype(y_ECF.dtype)


def _add_once(weight: Weight, features: tuple[str, ...]) -> Weight:
    """Return a weight whose bias is that of one device of those that each hold a part of the sum."""
    axes = manual_axes(features)
    if weight.bias is None or not axes:
        return weight
    bias = mark_varying(weight.bias, axes)
    return weight._replace(bias=jnp.where(block_index(features) == 0, bias, jnp.zeros_like(bias)))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def add_further_rounds(
    y_nD: jax.Array, given: tuple[jax.Array, jax.Array, Kernels], order: Order, room: Room
) -> jax.Array:
    """Return y[n, D] of the first round with `run_round` of all others added, often none; given (x, weights, kernels).

    The loop begins with y: on CPUs the sends of all rounds are then in one order (see `../in_order.py`).
    """

    def body(number: jax.Array, y: jax.Array) -> jax.Array:
        return y + run_round(*given, room.slots(order, number), room)

    return _loop(order, room, body, y_nD)[1]


def _loop(order: Order, room: Room, body: Callable[[jax.Array, Any], Any], start: Any) -> tuple[jax.Array, Any]:
    """Return the number of rounds and, from a tree, body(number, tree) of rounds 1, 2, ... while any has pairs left."""
    num_rounds = max_blocks(-(-order.counts.max() // room.capacity), room.axes)

    def turn(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        number, tree = carry
        return number + 1, body(number, tree)

    with jax.named_scope(RARELY):
        return jax.lax.while_loop(lambda carry: carry[0] < num_rounds, turn, (num_rounds * 0 + 1, start))


def _zeros(kind: jax.ShapeDtypeStruct) -> jax.Array:
    """Return zeros of a type, varying over the same axes."""
    differs = getattr(kind.manual_axis_type, "varying", ())
    return mark_varying(jnp.zeros(kind.shape, kind.dtype), sorted(differs))


def _further_backward(room: Room, saved: tuple[Any, ...], grad: jax.Array) -> tuple[Any, ...]:
    x_nD, weights_nk, kernels, order = saved
    trained = (
        kernels
        if room.trained == "all"
        else _map(lambda own: own._replace(kernel=None, scale=None, bias=None), kernels)
    )

    def pull(number: jax.Array | int) -> Any:
        slots = room.slots(order, number)

        def run(x_nD: jax.Array, weights_nk: jax.Array, trained: Kernels) -> jax.Array:
            whole = trained if room.trained == "all" else _map(_with_frozen, trained, kernels)
            return run_round(x_nD, weights_nk, whole, slots, room)

        return jax.vjp(run, x_nD, weights_nk, trained)[1](grad)

    def body(number: jax.Array, sums: Any) -> Any:
        return jax.tree.map(jnp.add, sums, pull(number))

    number, grads = _loop(order, room, body, jax.tree.map(_zeros, jax.eval_shape(lambda: pull(1))))
    # The backward of the first round waits for those of the others, whose arrays are then not beside its own.
    grad, grads = hold(held(grad, until=number), until=grads)
    return (grad, grads, jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), order))


def _with_frozen(adapters: Weight, whole: Weight) -> Weight:
    return adapters._replace(kernel=whole.kernel, scale=whole.scale, bias=whole.bias)


def _map(change: Callable[..., Weight], *kernels: Kernels) -> Kernels:
    """Return kernels with each weight changed, None where there is no gate."""
    found = {name: [getattr(own, name) for own in kernels] for name in ("up", "gate", "down")}
    return Kernels(**{name: None if own[0] is None else change(*own) for name, own in found.items()})


add_further_rounds.defvjp(
    lambda y, given, order, room: (add_further_rounds(y, given, order, room), (*given, order)),
    _further_backward,
)
