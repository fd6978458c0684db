"""A worker on one device: training steps of a small GPT in plain Flax, and of the same GPT in trellax.

Plain Flax is `nnx.Linear`, `nnx.LayerNorm` and `nnx.Embed`, a scan over stacked layers, optax's cross-entropy, and a
scan over microbatches that sums gradients. trellax is its layers on a 1x1x1 mesh, and its executor with one stage. Both
use the same AdamW. Model and batch are those of `../workers/train_step.py`. `run.py` starts this worker.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from trellax.layers import ModelConfig, Transformer
from trellax.meshes import MeshSpec, build_mesh
from trellax.pipeline import pipeline_grads, split_transformer
from trellax.schedules import build_schedule

from benchmarks.workers.process import serve, start_devices
from benchmarks.workers.train_step import CONFIG, NUM_SEQUENCES, make_batch

Grads = Callable[[Any, Any], tuple[jax.Array, Any]]


class PlainBlock(nnx.Module):
    """A pre-norm attention and MLP block, as a user of Flax would write it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        d, self.num_heads = config.hidden_size, config.num_heads
        self.attention_norm, self.mlp_norm = (nnx.LayerNorm(d, epsilon=config.norm_epsilon, rngs=rngs) for _ in "ab")
        self.query, self.key, self.value, self.out = (nnx.Linear(d, d, rngs=rngs) for _ in "qkvo")
        self.up, self.down = nnx.Linear(d, config.ffn_size, rngs=rngs), nnx.Linear(config.ffn_size, d, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.attention_norm(x)
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (linear(y).reshape(heads) for linear in (self.query, self.key, self.value))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class PlainModel(nnx.Module):
    """A GPT with its output head tied to the embedding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.positions = nnx.Embed(config.max_tokens, config.hidden_size, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=config.num_layers)(
            nnx.vmap(lambda rngs: PlainBlock(config, rngs=rngs), in_axes=0, out_axes=0)
        )(rngs)
        self.norm = nnx.LayerNorm(config.hidden_size, epsilon=config.norm_epsilon, rngs=rngs)

    def loss(self, batch: Any) -> jax.Array:
        x = self.embed(batch["tokens"]) + self.positions(jnp.arange(batch["tokens"].shape[1]))[None]
        graph, layers = nnx.split(self.blocks)
        x, _ = jax.lax.scan(lambda x, own: (nnx.merge(graph, own)(x), None), x, layers)
        logits = self.embed.attend(self.norm(x))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (batch["weights"] * losses).sum()


def make_plain(accumulate: str) -> tuple[Any, Grads]:
    """Return parameters and a gradient function in plain Flax."""
    graph, params = nnx.split(PlainModel(CONFIG, rngs=nnx.Rngs(0)))
    one = jax.value_and_grad(lambda params, batch: nnx.merge(graph, params).loss(batch))

    def add(total: Any, microbatch: Any, params: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(params, microbatch)), None

    def many(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(partial(add, params=params), zeros, batch)[0]

    return params, many if accumulate == "on" else one


def make_layers(mesh: jax.sharding.Mesh) -> tuple[Any, Grads]:
    """Return parameters and a gradient function of trellax's layers on a mesh."""
    with nnx.use_eager_sharding(False):
        graph, params = nnx.split(Transformer(CONFIG, rngs=nnx.Rngs(0)))

    def grads(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(lambda params: nnx.merge(graph, params).loss(**_named(batch)))(params)

    return params, grads


def make_executor(mesh: jax.sharding.Mesh, num_microbatches: int) -> tuple[Any, Grads]:
    """Return parameters and a gradient function of trellax's executor with one stage."""
    model = split_transformer(CONFIG, mesh=mesh)
    schedule = build_schedule("1f1b", num_ranks=1, num_microbatches=num_microbatches)

    def grads(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        out = pipeline_grads(model.fns, params=params, batch=batch, mesh=mesh, schedule=schedule)
        return out.loss, out.grads

    return model.init(0), grads


class OverheadBench:
    """Compiled steps by way and number of microbatches; each has its own state."""

    def __init__(self) -> None:
        self._mesh = build_mesh(MeshSpec(), devices=jax.devices()[:1])
        self._steps: dict[tuple[str, int], list[Any]] = {}

    def step(self, way: str, num_microbatches: int) -> dict[str, float]:
        """Run one step (the first call compiles it and warms it up); return its wall and CPU seconds, and the loss."""
        key = way, num_microbatches
        if key not in self._steps:
            self._steps[key] = self._compile(way, num_microbatches)
            self._run(key)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = self._run(key)
        return {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start, "loss": loss}

    def _run(self, key: tuple[str, int]) -> float:
        compiled, params, opt_state, batch = self._steps[key]
        params, opt_state, loss = jax.block_until_ready(compiled(params, opt_state, batch))
        self._steps[key][1:3] = params, opt_state
        return float(loss)

    def _compile(self, way: str, num_microbatches: int) -> list[Any]:
        makers: dict[str, Callable[[], tuple[Any, Grads]]] = {
            "plain": lambda: make_plain("off"),
            "layers": lambda: make_layers(self._mesh),
            "plain_accumulation": lambda: make_plain("on"),
            "executor": lambda: make_executor(self._mesh, num_microbatches),
        }
        params, grads = makers[way]()
        optimizer = optax.adamw(1e-3)

        def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
            loss, gradients = grads(params, batch)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        is_whole = way in ("plain", "layers")
        batch = jax.device_put(_batch(num_microbatches, is_whole=is_whole))
        opt_state = jax.jit(optimizer.init)(params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, batch).compile()
        return [compiled, params, opt_state, batch]


def _batch(num_microbatches: int, *, is_whole: bool) -> dict[str, np.ndarray]:
    batch = make_batch(CONFIG, num_microbatches, NUM_SEQUENCES)
    return {name: leaf.reshape(-1, CONFIG.max_tokens) for name, leaf in batch.items()} if is_whole else batch


def _named(batch: Any) -> dict[str, Any]:
    return {f"{name}_BT": leaf for name, leaf in batch.items()}


if __name__ == "__main__":
    start_devices(int(sys.argv[1]))
    serve({"step": OverheadBench().step})
