"""The layers of one stage, run in order forward and in reverse order backward, with residuals in buffers.

    forward        x -> layer 0 -> layer 1 -> ... -> y        each writes its residuals at [slot, layer]
    backward      dx <- layer 0 <- layer 1 <- ... <- dy       each reads them there, and adds dw to its sum
    input_grad    dx <- layer 0 <- layer 1 <- ... <- dy       each reads them, and writes there what dw needs
    weight_grad         layer 0,   layer 1,   ...             each reads that, and adds dw to its sum

Buffers are updated in place, layer by layer. `jax.grad` of a scan over layers would make all residuals of a stage anew
for every microbatch, and a second copy of all gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp

from ...layers.in_order import Mark, next_mark, start_mark, zero_after
from ...meshes.device_axes import hold
from ...meshes.device_kind import is_nvidia
from ..model.protocol import Given, Output
from ..model.stage import Unroll
from .backward.residuals import LayerVjp
from .backward.split_backward import SplitBackward
from .buffers import read, vary_like, write
from .loop_state import Grads, LoopState, Place, Sums
from .split_weights.sharded import LayerGather

Index = jax.Array | int

Work = Callable[["Place", Any, Index, Any], Any]
"""What is done with one layer: from its place, parameters, index in the stage and a carry to the next carry."""


@dataclass(frozen=True, kw_only=True)
class LayerStack:
    """The layers of one stage on this rank: the first `count` of chunk `chunk` of `stages`, by kind [C, k, ...].

    stage: position of the stage in the model.
    first_layer: position of its first layer in the model.
    state: what layers are given as `info.state`, by kind, leaves [C, k, ...].
    gathers: the gather of a layer's parameters by kind, None where this device has them whole.
    kind_of, place_of: kind of each layer and its place among those of its kind, [most layers]; None for a single kind.
    kind_counts: number of layers of each kind where they are sorted by kind, in place of `kind_of` and `place_of`.
    slot: position of the chunk in `stages`, where these are [slots, k, ...] of chunks that were gathered.
    """

    stages: dict[str, Any]
    chunk: Index
    count: Index
    stage: Index
    first_layer: Index
    state: dict[str, Any]
    gathers: dict[str, LayerGather | None]
    kind_of: Any = None
    place_of: Any = None
    kind_counts: dict[str, Index] | None = None
    unroll: Unroll = "off"
    slot: Index | None = None

    def params(self, place: Place) -> Any:
        """Return the (prepared) parameters of one layer, whole over the batch axes."""
        chunk, gather = place.chunk if self.slot is None else self.slot, self.gathers[place.kind]
        own = read(self.stages[place.kind], chunk, place.index)
        return own if gather is None else gather.gather(own)

    def with_chunks(self, chunks: dict[str, Any], slot: Index) -> "LayerStack":
        """Return the layers with parameters that were gathered before, [slots, k, ...] by kind."""
        return replace(self, stages=chunks, slot=slot, gathers=dict.fromkeys(chunks))

    def given(self, given: Given, index: Index, place: Place) -> Given:
        """Return what one layer is given: a microbatch, with the layer's info if any function asks for it."""
        if given.info is None:
            return given
        # Marked alike on every path, since a layer is traced once for all.
        like = given.info.microbatch
        position, stage = (vary_like(jnp.asarray(n, jnp.int32), like) for n in (self.first_layer + index, self.stage))
        state = read(self.state[place.kind], *place.where)
        return replace(given, info=replace(given.info, index=position, stage=stage, state=state))

    def loop(self, work: Work, carry: Any, *, is_reversed: bool = False) -> Any:
        """Return work(place, params, index, carry) of all layers, one after another, from the last if reversed.

        Gathered parameters of the next layer are in the carry, so that their gather runs beside this layer's products;
        the last layer, which has no next one, stands behind the loop.
        """
        if self.kind_counts is not None:
            return self._loop_by_kind(self.kind_counts, work, carry, is_reversed=is_reversed)
        unroll = self._unroll(self.count)

        def index_of(turn: Index) -> Index:
            return self.count - 1 - turn if is_reversed else turn

        def alone(turn: jax.Array, carry: Any) -> Any:
            return self._run(index_of(turn), work, carry)

        if self.kind_of is not None or not any(self.gathers.values()):
            return jax.lax.fori_loop(0, self.count, alone, carry, **unroll)

        def beside(turn: Index, carried: tuple[Any, Any, Mark]) -> tuple[Any, Any, Mark]:
            params, carry, mark = carried
            following = self.params(self._place(index_of(turn + 1)))
            return following, work(self._place(index_of(turn)), params, index_of(turn), carry), next_mark(mark)

        start = self.params(self._place(index_of(0))), carry, start_mark()
        params, carry, mark = jax.lax.fori_loop(0, self.count - 1, beside, start, **unroll)
        # A weight gradient, or what is recomputed, needs nothing else of the loop.
        last = index_of(self.count - 1) + zero_after(mark)
        return work(self._place(last), params, last, carry)

    def _loop_by_kind(self, counts: dict[str, Index], work: Work, carry: Any, *, is_reversed: bool) -> Any:
        """Return what `loop` does, by a loop for each kind: no layer asks at run time of which kind it is."""
        firsts = dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))
        both = carry, start_mark()
        for kind, count in reversed(counts.items()) if is_reversed else counts.items():
            shift = zero_after(both[1])

            def turn(turn: Index, both: Any, kind: str = kind, count: Index = count, shift: Index = shift) -> Any:
                index = (count - 1 - turn if is_reversed else turn) + shift
                place = Place(kind=kind, chunk=self.chunk, index=index)
                return work(place, self.params(place), firsts[kind] + index, both[0]), next_mark(both[1])

            both = jax.lax.fori_loop(0, count, turn, both, **self._unroll(count))
        return both[0]

    def _unroll(self, count: Index) -> dict[str, Any]:
        """Return how a loop over so many layers is unrolled."""
        # A count that differs between ranks is a traced number: such a loop cannot be written out.
        return {"unroll": (self.unroll == "on" and isinstance(count, int)) or None}

    def _run(self, index: Index, work: Work, carry: Any) -> Any:
        """Return work of the layer at an index; a layer's kind decides at run time which work is done."""
        # One `cond` for each kind, as for actions in execute.py: buffers of the other kinds pass through untouched.
        if self.kind_of is None:
            return work(place := self._place(index), self.params(place), index, carry)

        def run(place: Place, carry: Any) -> Any:
            return work(place, self.params(place), index, carry)

        for number, kind in enumerate(self.stages):
            place = Place(kind=kind, chunk=self.chunk, index=self.place_of[index])
            carry = jax.lax.cond(self.kind_of[index] == number, partial(run, place), lambda same: same, carry)
        return carry

    def _place(self, index: Index) -> Place:
        """Return the place of the layer at an index, where all are of one kind."""
        return Place(kind=next(iter(self.stages)), chunk=self.chunk, index=index)


def run_layers(
    stack: LayerStack, layers: dict[str, Callable[[Any, Any, Given], Output]], x: Any, sums: Sums, given: Given
) -> tuple[Any, Sums]:
    """Return the output of all layers, x[b, ...] -> y[b, ...], and the sums with theirs; keep nothing."""

    def work(place: Place, params: Any, index: Index, carry: tuple[Any, Sums]) -> tuple[Any, Sums]:
        x, sums = carry
        out = layers[place.kind](params, x, stack.given(given, index, place))
        return out.x, sums.add(out, place)

    return stack.loop(work, (x, sums))


def forward_layers(
    stack: LayerStack, vjps: dict[str, LayerVjp], x: Any, state: LoopState, given: Given, *, slot: Index
) -> tuple[Any, LoopState]:
    """Return the output of all layers, and the state with their residuals [slots, layers, ...] at the slot."""

    def work(place: Place, params: Any, index: Index, carry: tuple[Any, Sums, Any]) -> tuple[Any, Sums, Any]:
        x, sums, buffers = carry
        out, residuals = vjps[place.kind].forward(params, x, stack.given(given, index, place))
        # With a split backward there are more buffers, which only the input gradient writes.
        kept = buffers[place.kind]
        pairs = zip(kept, residuals, strict=False)
        written = [write(buffer, leaf, slot, place.index) for buffer, leaf in pairs]
        return out.x, sums.add(out, place), buffers | {place.kind: [*written, *kept[len(residuals) :]]}

    x, sums, residuals = stack.loop(work, (x, state.sums, state.residuals))
    if is_nvidia() and any(stack.gathers.values()):
        # The last layer stands behind the loop. XLA would write its residuals anew inside the element-wise kernels of a
        # backward that reads them, from the buffers as they were before: it kept a copy of those.
        residuals = jax.tree.map(jax.lax.optimization_barrier, residuals)
    return x, replace(state, sums=sums, residuals=residuals)


def backward_layers(
    stack: LayerStack, vjps: dict[str, LayerVjp], dy: list[jax.Array], state: LoopState, given: Given, *, slot: Index
) -> tuple[list[jax.Array], LoopState]:
    """Return dx, and the state with the gradients of all layers added, in float32; no communication of its own.

    dy and dx are lists of the floating-point leaves of what layers pass on.
    """

    def work(place: Place, params: Any, index: Index, carry: tuple[list[jax.Array], Grads]) -> Any:
        dy, sums = carry
        residuals = [read(buffer, slot, place.index) for buffer in state.residuals[place.kind]]
        grads, dx = vjps[place.kind].backward(params, residuals, stack.given(given, index, place), dy)
        if is_nvidia() and stack.gathers[place.kind] is not None and isinstance(place.index, int):
            # A sum that is transposed is copied as a whole where XLA knows the slice that it adds to.
            place = replace(place, index=jax.lax.optimization_barrier(jnp.int32(place.index)))
        return vary_like(dx, dy), sums.add_layer(grads, place, given.number)

    # Gradients of the ends are no part of the loop, so that these layers and the ends need not wait for each other.
    sums = state.grads
    assert sums is not None
    dx, grads = stack.loop(work, (dy, replace(sums, shared=None)), is_reversed=True)
    return dx, replace(state, grads=replace(grads, shared=sums.shared))


def input_grad_layers(
    stack: LayerStack,
    halves: dict[str, SplitBackward],
    dy: list[jax.Array],
    state: LoopState,
    given: Given,
    *,
    slot: Index,
) -> tuple[list[jax.Array], LoopState]:
    """Return dx, and the state with what the weight gradients need in place of the residuals."""

    def work(place: Place, params: Any, index: Index, carry: tuple[list[jax.Array], Any]) -> Any:
        (dy, buffers), split = carry, halves[place.kind]
        own = buffers[place.kind]
        saved = [read(buffer, slot, place.index) for buffer in own[: split.num_saved]]
        dx, kept = split.input_grad(params, saved, stack.given(given, index, place), dy)
        old = [*saved, *[None] * len(split.extra)]
        # Only what changed is written: a write of the same value would cost a copy of the entry.
        changed = {n: new for n, (new, before) in enumerate(zip(kept, old, strict=True)) if new is not before}
        own = [*own]
        # A cut that is early is written when its place has been read, see `split_backward.py`.
        for n, other in split.early.items():
            if other is None:
                (own[n], changed[n]), dx = hold((own[n], changed[n]), until=dx)
            else:
                (own[n], changed[n]), changed[other] = hold((own[n], changed[n]), until=changed[other])
        for n, new in changed.items():
            own[n] = write(own[n], new, slot, place.index)
        return vary_like(dx, dy), buffers | {place.kind: own}

    dx, residuals = stack.loop(work, (dy, state.residuals), is_reversed=True)
    return dx, replace(state, residuals=residuals)


def weight_grad_layers(
    stack: LayerStack, halves: dict[str, SplitBackward], state: LoopState, given: Given, *, slot: Index
) -> LoopState:
    """Return the state with the gradients of all layers added, from what `input_grad_layers` left."""

    def work(place: Place, params: Any, index: Index, sums: Grads) -> Grads:
        kept = [read(buffer, slot, place.index) for buffer in state.residuals[place.kind]]
        grads = halves[place.kind].weight_grad(params, kept, stack.given(given, index, place))
        return sums.add_layer(grads, place, given.number)

    return replace(state, grads=stack.loop(work, state.grads))
