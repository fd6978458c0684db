"""Run a pipeline of a single rank: gradient accumulation over microbatches, one at a time.

    for each microbatch:  first -> chunk 0 -> chunk 1 -> ... -> last
                          first <- chunk 0 <- chunk 1 <- ... <- dy

As in `execute.py`, residuals go into buffers that all microbatches share, and gradients are added to sums layer by
layer. Layers that are written out (`unroll="on"`) need no buffers: their residuals are separate arrays.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..model.protocol import Given
from .backward.residuals import LayerVjp
from .buffers import empty_buffer, vary_like
from .layers import LayerStack, backward_layers, forward_layers, run_layers
from .loop_state import Grads, LoopState, Place, Sums, Wants
from .rank_model import RankModel


def run_sequence(model: RankModel, *, wants: Wants) -> tuple[Sums, Grads | None]:
    """Return this device's share of the sums and of the gradients; for use inside `shard_map`.

    loss[] {U:data}, gradients {U:data}.
    """
    chunks = [model.stack(chunk, chunk) for chunk in range(model.num_chunks)]
    if model.functions.fns.gather == "chunk" and any(model.gathers.values()):
        # One rank is at work on all of its chunks all the time.
        whole = jax.tree.map(lambda *own: jnp.stack(own), *(model.gather_chunk(chunk.chunk) for chunk in chunks))
        chunks = [chunk.with_chunks(whole, chunk.chunk) for chunk in chunks]
    numbers = jnp.arange(jax.tree.leaves(model.microbatches.batch)[0].shape[0], dtype=jnp.int32)
    # The sums are marked as varying before the scan: a carry must keep its type.
    state = LoopState(sums=model.zero_sums(), activations=())
    if wants == "loss":
        state, _ = jax.lax.scan(partial(_add_loss, model, chunks), state, numbers)
        return state.sums, None
    vjps = model.plan_backward()
    buffers = {
        kind: [empty_buffer(leaf, len(chunks), model.room(kind)) for leaf in vjp.kept] for kind, vjp in vjps.items()
    }
    if _is_written_out(chunks[0]):
        buffers = {kind: [] for kind in vjps}
    state = replace(state, grads=model.zero_grads(), residuals=buffers)
    state, _ = jax.lax.scan(partial(_add_grads, model, chunks, vjps), state, numbers)
    return state.sums, state.grads


def _add_loss(
    model: RankModel, chunks: list[LayerStack], state: LoopState, number: jax.Array
) -> tuple[LoopState, None]:
    """Run one microbatch forward, and add its loss."""
    given = model.microbatches.read(number)
    x, sums = model.run_first(given), state.sums
    for chunk in chunks:
        x, sums = run_layers(chunk, model.functions.layers, x, sums, given)
    return replace(state, sums=sums.add(model.run_last(x, given))), None


def _add_grads(
    model: RankModel, chunks: list[LayerStack], vjps: dict[str, LayerVjp], state: LoopState, number: jax.Array
) -> tuple[LoopState, None]:
    """Run one microbatch forward and backward, and add its loss and gradients."""
    given = model.microbatches.read(number)
    x, state, saved = _forward(chunks, vjps, model.run_first(given), state, given)
    out, grads, dy = model.last_and_grads(x, given)
    assert state.grads is not None
    state = replace(state, sums=state.sums.add(out), grads=state.grads.add_shared(grads, number))
    dx, state = _backward(chunks, vjps, (dy, state, saved), given)
    assert state.grads is not None
    return replace(state, grads=state.grads.add_shared(model.first_grads(given, dx), number)), None


def _forward(
    chunks: list[LayerStack], vjps: dict[str, LayerVjp], x: Any, state: LoopState, given: Given
) -> tuple[Any, LoopState, list[Any]]:
    """Return the output, the state with residuals in its buffers, and those of each layer that is written out."""
    own: list[Any] = []
    for chunk in chunks:
        if not _is_written_out(chunk):
            x, state = forward_layers(chunk, vjps, x, state, given, slot=chunk.chunk)
            continue
        for index in range(_static_count(chunk)):
            place = Place(kind="", chunk=chunk.chunk, index=index)
            out, kept = vjps[""].forward(chunk.params(place), x, chunk.given(given, index, place))
            x, state = out.x, replace(state, sums=state.sums.add(out, place))
            own.append(kept)
    return x, state, own


def _backward(
    chunks: list[LayerStack],
    vjps: dict[str, LayerVjp],
    forward: tuple[list[jax.Array], LoopState, list[Any]],
    given: Given,
) -> tuple[list[jax.Array], LoopState]:
    """Return dx and the state with gradients added, given (dy, state, residuals of layers that are written out)."""
    dy, state, saved = forward
    for chunk in reversed(chunks):
        if not _is_written_out(chunk):
            dy, state = backward_layers(chunk, vjps, dy, state, given, slot=chunk.chunk)
            continue
        for index in reversed(range(_static_count(chunk))):
            # Residuals form a stack: the last layer of the forward is the first of the backward.
            *saved, kept = saved
            place = Place(kind="", chunk=chunk.chunk, index=index)
            grads, dx = vjps[""].backward(chunk.params(place), kept, chunk.given(given, index, place), dy)
            assert state.grads is not None
            dy = vary_like(dx, dy)
            state = replace(state, grads=state.grads.add_layer(grads, place, given.number))
    return dy, state


def _is_written_out(chunk: LayerStack) -> bool:
    """Return whether residuals are kept apart, layer by layer, and not in buffers; only for layers of one kind."""
    return chunk.unroll == "on" and chunk.kind_of is None


def _static_count(chunk: LayerStack) -> int:
    """Return the number of layers of a chunk, which a single rank knows before it runs."""
    assert isinstance(chunk.count, int)
    return chunk.count
