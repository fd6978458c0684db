"""The executor: one loop over ticks runs any schedule, inside one jitted program.

Manual over `pipe` and `data`, automatic over `tensor`. In each tick a rank looks up its row of the tables and runs a
forward, a backward, both or nothing; then activations move one rank on and gradients one rank back. Bubbles are
skipped by `lax.cond`, so they cost nothing. Residuals wait in ring buffers with as many slots as microbatches are in
flight. Gradients are summed over `data` once, after the loop. `lower.py` makes the tables; `sequential.py` is the
path of a single rank.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from .lower import NONE, Tables
from .residuals import StageVjp
from .stage import PipelineParams, StageFns

Bubbles = Literal["zeros", "nan"]
"""What fills buffers before use and what idle ranks send; "nan" proves that none of it reaches a result."""


def run_ticks(
    fns: StageFns, params: PipelineParams, batch: Any, *, tables: Tables, bubbles: Bubbles, wants: Literal["loss", "grads"]
) -> tuple[jax.Array, PipelineParams | None]:
    """Return this device's share of the loss and its gradients; for use inside `shard_map` over pipe and data.

    params.stages[C, k...] of this rank, params.shared whole; batch leaves [M, b, ...] -> loss[] {U:(pipe, data)},
    gradients {U:data} for stages and {U:(pipe, data)} for shared. Per tick: one neighbour permute of an activation
    and one of a gradient, in ticks where somebody sends.
    """
    machine = _Machine(fns, params, batch, tables, bubbles, wants)
    rows = {name: jnp.asarray(column) for name, column in tables.columns.items()}
    sends = {"forward": jnp.asarray(tables.sends_forward), "backward": jnp.asarray(tables.sends_backward)}
    carry, _ = jax.lax.scan(machine.tick, machine.start(), (rows, sends))
    return carry["loss"], carry.get("grads")


class _Machine:
    """One rank's view of the loop; the carry is a dict of buffers."""

    def __init__(
        self,
        fns: StageFns,
        params: PipelineParams,
        batch: Any,
        tables: Tables,
        bubbles: Bubbles,
        wants: Literal["loss", "grads"],
    ) -> None:
        self.fns, self.params, self.batch = fns, params, batch
        self.tables, self.bubbles, self.wants = tables, bubbles, wants
        self.vjp = StageVjp(fns.stage)

    def start(self) -> dict[str, Any]:
        """The carry before the first tick: empty buffers, zero sums."""
        x, residuals = jax.eval_shape(self._trace_stage)
        carry: dict[str, Any] = {"loss": vary(jnp.zeros((), jnp.float32)), "inbox": self._empty(x, "inbox")}
        if self.wants == "grads":
            carry["grad_inbox"] = self._empty(x, "grad")
            carry["saved"] = [self._empty(leaf, "save") for leaf in residuals]
            carry["grads"] = jax.tree.map(lambda p: vary(jnp.zeros(p.shape, jnp.float32)), self.params)
        return carry

    def tick(self, carry: dict[str, Any], row: tuple[dict[str, jax.Array], dict[str, jax.Array]]) -> tuple[Any, None]:
        """One turn: forward, backward, then pass on what was made."""
        rank = jax.lax.axis_index("pipe")
        columns, sends = row
        mine = {name: column[rank] for name, column in columns.items()}
        idle = self._fill(carry["inbox"].shape[1:], carry["inbox"].dtype)
        carry, y = jax.lax.cond(mine["forward"] != NONE, self._forward, lambda c, _: (c, idle), carry, mine)
        carry["inbox"] = _deliver(carry["inbox"], y, mine["arrive"], sends["forward"], step=1)
        if self.wants == "grads":
            carry, dx = jax.lax.cond(mine["backward"] != NONE, self._backward, lambda c, _: (c, idle), carry, mine)
            carry["grad_inbox"] = _deliver(carry["grad_inbox"], dx, mine["arrive_grad"], sends["backward"], step=-1)
        return carry, None

    def _forward(self, carry: dict[str, Any], mine: Mapping[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
        carry = dict(carry)
        microbatch = self._microbatch(mine["forward"])
        x = jax.lax.cond(
            mine["forward_input"] == NONE,
            lambda: vary(self.fns.first(self.params.shared, microbatch)),
            lambda: _read(carry["inbox"], mine["forward_input"]),
        )
        params = self._chunk(mine["forward_chunk"])
        if self.wants == "loss":
            y = vary(self.fns.stage(params, x, microbatch))
            is_last = (mine["forward_chunk"] == self._num_chunks - 1) & (jax.lax.axis_index("pipe") == self._num_ranks - 1)
            carry["loss"] += jax.lax.cond(
                is_last,
                lambda: vary(self.fns.last(self.params.shared, y, microbatch)),
                lambda: vary(jnp.zeros((), jnp.float32)),
            )
            return carry, y
        y, residuals = self.vjp.forward(params, x, microbatch)
        carry["saved"] = [
            _write(buffer, vary(leaf), mine["forward_save"])
            for buffer, leaf in zip(carry["saved"], residuals, strict=True)
        ]
        ends = {name: carry[name] for name in ("loss", "grad_inbox", "grads")}
        ends = jax.lax.cond(
            mine["forward_grad"] == NONE, lambda ends: ends, partial(self._finish, y, microbatch, mine), ends
        )
        return carry | ends, vary(y)

    def _finish(
        self, y: jax.Array, microbatch: Any, mine: Mapping[str, jax.Array], ends: dict[str, Any]
    ) -> dict[str, Any]:
        """Loss of the last stage and its gradient at once, so that logits never wait in a buffer."""
        loss, (d_shared, dy) = jax.value_and_grad(self.fns.last, argnums=(0, 1))(self.params.shared, y, microbatch)
        return {
            "loss": ends["loss"] + loss,
            "grad_inbox": _write(ends["grad_inbox"], vary(dy), mine["forward_grad"]),
            "grads": PipelineParams(stages=ends["grads"].stages, shared=_add(ends["grads"].shared, d_shared)),
        }

    def _backward(self, carry: dict[str, Any], mine: Mapping[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
        params = self._chunk(mine["backward_chunk"])
        residuals = [_read(buffer, mine["backward_save"]) for buffer in carry["saved"]]
        d_params, dx = self.vjp.backward(params, residuals, _read(carry["grad_inbox"], mine["backward_grad"]))
        shared = jax.lax.cond(
            mine["backward_first"] == 1,
            partial(self._embed_backward, dx, self._microbatch(mine["backward"])),
            lambda shared: shared,
            carry["grads"].shared,
        )
        stages = self._add_chunk(carry["grads"].stages, d_params, mine["backward_chunk"])
        return carry | {"grads": PipelineParams(stages=stages, shared=shared)}, vary(dx)

    def _embed_backward(self, dx: jax.Array, microbatch: Any, shared: Any) -> Any:
        _, vjp = jax.vjp(lambda shared: vary(self.fns.first(shared, microbatch)), self.params.shared)
        return _add(shared, vjp(dx)[0])

    def _trace_stage(self) -> tuple[jax.Array, list[jax.Array]]:
        microbatch = self._microbatch(jnp.zeros((), jnp.int32))
        x = self.fns.first(self.params.shared, microbatch)
        return self.vjp.forward(self._chunk(jnp.zeros((), jnp.int32)), vary(x), microbatch)

    @property
    def _num_chunks(self) -> int:
        return jax.tree.leaves(self.params.stages)[0].shape[0]

    @property
    def _num_ranks(self) -> int:
        return self.tables.columns["forward"].shape[1]

    def _microbatch(self, index: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: _read(leaf, index), self.batch)

    def _chunk(self, index: jax.Array) -> Any:
        if self._num_chunks == 1:
            return jax.tree.map(lambda leaf: leaf[0], self.params.stages)
        return jax.tree.map(lambda leaf: _read(leaf, index), self.params.stages)

    def _add_chunk(self, sums: Any, grads: Any, index: jax.Array) -> Any:
        if self._num_chunks == 1:
            return jax.tree.map(lambda total, g: total + g[None].astype(total.dtype), sums, grads)
        return jax.tree.map(lambda total, g: total.at[index].add(g.astype(total.dtype)), sums, grads)

    def _empty(self, leaf: jax.ShapeDtypeStruct, buffer: Literal["inbox", "grad", "save"]) -> jax.Array:
        slots = getattr(self.tables, f"num_{buffer}_slots")
        return self._fill((slots, *leaf.shape), leaf.dtype)

    def _fill(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        poison = self.bubbles == "nan" and jnp.issubdtype(dtype, jnp.floating)
        return vary(jnp.full(shape, jnp.nan if poison else 0, dtype))


def vary(x: jax.Array) -> jax.Array:
    """Return x marked as differing over every manual axis of size > 1, as all that the loop carries is."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = [axis for axis, kind in kinds if kind == AxisType.Manual and mesh.shape[axis] > 1]
    missing = tuple(axis for axis in manual if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _deliver(buffer: jax.Array, value: jax.Array, slot: jax.Array, is_sent: jax.Array, *, step: int) -> jax.Array:
    """Pass `value` on by `step` ranks if anybody sends in this tick, and keep what arrives in its slot."""
    num_ranks = jax.lax.axis_size("pipe")
    # A line, not a ring: the link from the last rank back to the first would carry nothing.
    links = [(rank, rank + step) for rank in range(num_ranks) if 0 <= rank + step < num_ranks]
    arrived = jax.lax.cond(is_sent, lambda v: jax.lax.ppermute(v, "pipe", links), lambda v: v, value)
    return jax.lax.cond(slot != NONE, lambda b: _write(b, arrived, slot), lambda b: b, buffer)


def _read(buffer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(buffer, index, keepdims=False)


def _write(buffer: jax.Array, value: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(buffer, value, slot, 0)


def _add(sums: Any, grads: Any) -> Any:
    return jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), sums, grads)
