"""Sequences of several documents, and the reference: every document by itself, on one device, with no masks."""

from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from trellax.layers import Block, ModelConfig, Transformer, cross_entropy
from trellax.layers.block import stacks_of
from trellax.layers.norms import normalize

from .law import NUM_TOKENS, Answer, global_norm, masked_batch, natural_params

LENGTHS = ((16,), (5, 11), (1, 4, 4, 7), (8, 8), (11, 1, 4))
"""Lengths of the documents of sequences, in turn: whole ones, short ones, some over the ends of chunks."""


def lengths_of(sequence: int) -> tuple[int, ...]:
    """Return the lengths of the documents of a sequence."""
    return LENGTHS[sequence % len(LENGTHS)]


@cache
def packed_batch(num_sequences: int) -> dict[str, np.ndarray]:
    """Return `masked_batch` with documents, leaves [B, T]; the last token of each has weight 0."""
    batch = {name: leaf.copy() for name, leaf in masked_batch(num_sequences).items()}
    rows = [lengths_of(sequence) for sequence in range(num_sequences)]
    places = {
        "segments": [np.repeat(np.arange(len(row)), row) for row in rows],
        "positions": [np.concatenate([np.arange(length) for length in row]) for row in rows],
    }
    for weights, row in zip(batch["weights"], rows, strict=True):
        weights[np.cumsum(row) - 1] = 0
    batch["weights"] /= batch["weights"].sum()
    return batch | {name: np.stack(leaf).astype(np.int32) for name, leaf in places.items()}


@cache
def documents_one_by_one(
    config: ModelConfig, num_sequences: int, *, loss_of_logits: Callable[..., jax.Array] = cross_entropy
) -> Answer:
    """Return loss and gradients of the documents of `packed_batch`, each a sequence of its own."""
    graph = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
    batch = packed_batch(num_sequences)
    # Documents of one length are a batch [n, length] of that length.
    by_length: dict[int, list[dict[str, np.ndarray]]] = defaultdict(list)
    for sequence in range(num_sequences):
        start = 0
        for length in lengths_of(sequence):
            own = {name: batch[name][sequence, start : start + length] for name in ("tokens", "targets", "weights")}
            by_length[length].append(own)
            start += length
        assert start == NUM_TOKENS
    documents = [jax.tree.map(lambda *leaves: np.stack(leaves), *own) for own in by_length.values()]

    @jax.jit
    def step(params: dict[str, Any]) -> tuple[jax.Array, dict[str, Any], jax.Array]:
        def loss_of(params: dict[str, Any]) -> jax.Array:
            model: Transformer = nnx.merge(graph, params)
            losses = (
                loss_of_logits(
                    model(jnp.asarray(own["tokens"])), jnp.asarray(own["targets"]), jnp.asarray(own["weights"])
                )
                for own in documents
            )
            return sum(losses, start=jnp.float32(0))

        loss, grads = jax.value_and_grad(loss_of)(params)
        return loss, grads, global_norm(grads)

    loss, grads, norm = jax.device_get(step(natural_params(config)))
    return Answer(loss=float(loss), norm=float(norm), grads=grads)


@cache
def attended_one_by_one(config: ModelConfig, num_sequences: int) -> Answer:
    """Return loss and gradients of `packed_batch` where attention is given each document by itself, with no masks.

    For models with experts: the balance loss is that of a whole sequence, whichever documents it has.
    """
    graph = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
    batch = jax.tree.map(jnp.asarray, packed_batch(num_sequences))

    def loss_of(params: dict[str, Any]) -> jax.Array:
        model: Transformer = nnx.merge(graph, params)
        x, of_routers = model.embed(batch["tokens"], positions_BT=batch["positions"]), jnp.float32(0)
        for stack in stacks_of(model.blocks):
            own, stacked = nnx.split(stack)
            x, losses = jax.lax.scan(partial(_run_apart, own, batch["weights"]), x, stacked)
            of_routers += jnp.float32(0) if losses is None else losses.sum()
        logits = model.head(x, embedding_VD=model.embed.table[...])
        return cross_entropy(logits, batch["targets"], batch["weights"]) + of_routers

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(natural_params(config))
    return Answer(loss=float(loss), norm=float(global_norm(grads)), grads=jax.device_get(grads))


def _run_apart(graph: Any, weights: jax.Array, x: jax.Array, params: Any) -> tuple[jax.Array, jax.Array | None]:
    """Return x after a layer, x[B, T, D] of sequences with the documents of `packed_batch`, and the router's loss."""
    block: Block = nnx.merge(graph, params)
    normal, attended = normalize(block.attention_norm, x), jnp.zeros_like(x)
    # Sequences whose documents have the same lengths are attended to together.
    for number, lengths in enumerate(LENGTHS[: x.shape[0]]):
        documents = jnp.split(normal[number :: len(LENGTHS)], np.cumsum(lengths)[:-1], axis=1)
        own = jnp.concatenate([block.attention(document) for document in documents], axis=1)
        attended = attended.at[number :: len(LENGTHS)].set(own)
    x = x + attended
    y, stats = block._feed_forward(normalize(block.mlp_norm, x), weights)
    return x + y, stats.loss
