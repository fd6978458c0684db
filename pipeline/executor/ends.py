"""The two ends of a pipeline: what makes activations of a microbatch, and a loss of activations.

Alone, the first and last stage run `first` and `last` inside their own actions, with parameters that every rank holds.
Together, all ranks run them on one microbatch between two actions, each with its part of the parameters: no rank has
more to hold or to do than another ("Balancing Pipeline Parallelism with Vocabulary Parallelism", Yeung et al. 2024).
The executor drives either through the same hooks.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..model.stage import PipelineParams, StageFns
from .buffers import Carry, Row, add, leave, read, vary, write
from .lower import NONE
from .traced_vjp import pull_back

Wants = Literal["loss", "grads"]
"""Whether a program runs forwards alone."""


class AloneEnds:
    """The ends of the first and the last stage, run by these."""

    def __init__(self, fns: StageFns, params: PipelineParams, batch: Any, wants: Wants) -> None:
        self.fns, self.wants = fns, wants
        self.shared, self.batch = jax.tree.map(vary, (params.shared, batch))

    def before(self, carry: Carry, _row: Row, _columns: Row) -> Carry:
        """Nothing to do for all ranks before an action."""
        return carry

    def enter(self, carry: Carry, row: Row, microbatch: Any) -> jax.Array:
        """Return what enters a stage: the microbatch itself on the first, else what arrived."""

        @jax.named_scope("first")
        def first() -> jax.Array:
            return vary(self.fns.first(self.shared, microbatch))

        return jax.lax.cond(row["source"] == NONE, first, lambda: read(carry["activations"], row["source"]))

    def leave(self, carry: Carry, y: jax.Array, row: Row, microbatch: Any) -> Carry:
        """Pass on what a stage made; the last stage makes the loss of it."""
        carry = leave(carry, "activations", y, row["target"])
        finish = partial(self._evaluate, y, microbatch)
        if self.wants == "grads":
            finish = partial(self._differentiate, y, microbatch, row)
        return jax.lax.cond(row["target"] == NONE, finish, lambda carry: carry, carry)

    def leave_back(self, carry: Carry, dx: jax.Array, row: Row, microbatch: Any) -> Carry:
        """Pass back the gradient of a stage's input; the first stage takes it through `first`."""

        @jax.named_scope("first_back")
        def through_first(sums: Any) -> Any:
            grads = pull_back(lambda *args: vary(self.fns.first(*args)), self.shared, microbatch, dx)
            return add(sums, grads)

        sums = jax.lax.cond(row["target"] == NONE, through_first, lambda sums: sums, carry["shared_grads"])
        return leave(carry | {"shared_grads": sums}, "gradients", dx, row["target"])

    def after(self, carry: Carry, _row: Row, _columns: Row) -> Carry:
        """Nothing to do for all ranks after an action."""
        return carry

    @jax.named_scope("last")
    def _evaluate(self, y: jax.Array, microbatch: Any, carry: Carry) -> Carry:
        return carry | {"loss": carry["loss"] + vary(self.fns.last(self.shared, y, microbatch))}

    @jax.named_scope("last")
    def _differentiate(self, y: jax.Array, microbatch: Any, row: Row, carry: Carry) -> Carry:
        """Loss of the last stage and its gradient at once, so that logits never wait in a buffer."""
        loss, (d_shared, dy) = jax.value_and_grad(self.fns.last, argnums=(0, 1), allow_int=True)(
            self.shared, y, microbatch
        )
        return carry | {
            "loss": carry["loss"] + loss,
            "gradients": write(carry["gradients"], vary(dy), row["loss_grad"]),
            "shared_grads": add(carry["shared_grads"], d_shared),
        }


class TogetherEnds:
    """The ends of all stages, run by all ranks at once, each with its part of the parameters.

    Per microbatch four all-reduces of one activation over `pipe`, in float32: what `first` makes, what `last` is
    given, and the gradients of both. Ranks meet there at the end of a turn; where all actions of a turn are of one
    kind, as in the schedules made for it, nobody waits for that.
    """

    def __init__(self, fns: StageFns, params: PipelineParams, batch: Any, wants: Wants) -> None:
        self.fns, self.wants = fns, wants
        # What is the same on every rank stays marked so: then autodiff knows which gradients to sum over ranks.
        self.shared, self.batch = jax.tree.map(lambda leaf: vary(leaf, ("data",)), (params.shared, batch))

    def before(self, carry: Carry, row: Row, columns: Row) -> Carry:
        """Make the activations of the microbatch that the first stage is about to run."""

        @jax.named_scope("first")
        def first(carry: Carry) -> Carry:
            x = self.fns.first(self.shared, read(self.batch, columns["first"]))
            return leave(carry, "activations", vary(x), row["first_slot"])

        return jax.lax.cond(columns["first"] == NONE, lambda carry: carry, first, carry)

    def enter(self, carry: Carry, row: Row, _microbatch: Any) -> jax.Array:
        """Return what arrived, or was made by `before`."""
        return read(carry["activations"], row["source"])

    def leave(self, carry: Carry, y: jax.Array, row: Row, _microbatch: Any) -> Carry:
        """Put what a stage made where the next stage, or `after`, takes it from."""
        return leave(carry, "activations", y, row["target"])

    def leave_back(self, carry: Carry, dx: jax.Array, row: Row, _microbatch: Any) -> Carry:
        """Put the gradient of a stage's input where the stage before, or `after`, takes it from."""
        return leave(carry, "gradients", dx, row["target"])

    def after(self, carry: Carry, row: Row, columns: Row) -> Carry:
        """Make the loss of what the last stage has just made, and take the first stage's gradient through `first`."""
        last = partial(self._last, row=row, columns=columns)
        carry = jax.lax.cond(columns["last"] == NONE, lambda carry: carry, last, carry)
        if self.wants == "loss":
            return carry
        first_back = partial(self._first_back, row=row, columns=columns)
        return jax.lax.cond(columns["first_back"] == NONE, lambda carry: carry, first_back, carry)

    @jax.named_scope("last")
    def _last(self, carry: Carry, *, row: Row, columns: Row) -> Carry:
        microbatch = read(self.batch, columns["last"])
        is_here = row["last_slot"] != NONE
        y = _broadcast(carry["activations"], row["last_slot"])
        if self.wants == "loss":
            loss = vary(self.fns.last(self.shared, y, microbatch))
            return carry | {"loss": carry["loss"] + jnp.where(is_here, loss, 0)}
        loss, (d_shared, dy) = jax.value_and_grad(self.fns.last, argnums=(0, 1), allow_int=True)(
            self.shared, y, microbatch
        )
        carry = leave(carry, "gradients", vary(dy), row["loss_grad"])
        return carry | {
            "loss": carry["loss"] + jnp.where(is_here, vary(loss), 0),
            "shared_grads": add(carry["shared_grads"], d_shared),
        }

    @jax.named_scope("first_back")
    def _first_back(self, carry: Carry, *, row: Row, columns: Row) -> Carry:
        microbatch = read(self.batch, columns["first_back"])
        dx = _broadcast(carry["gradients"], row["first_back_slot"])
        grads = pull_back(self.fns.first, self.shared, microbatch, dx)
        return carry | {"shared_grads": add(carry["shared_grads"], grads)}


def _broadcast(buffer: jax.Array, slot: jax.Array) -> jax.Array:
    """Return to every rank the value in the slot of the one rank that has one.

    Summed in float32, since XLA's CPU backend aborts on bfloat16 sums over manual axes.
    """
    value = read(buffer, jnp.maximum(slot, 0)).astype(jnp.float32)
    return jax.lax.psum(jnp.where(slot == NONE, 0, value), "pipe").astype(buffer.dtype)
