"""Shared by tests of pipelines: small models, masked batches, the reference on one device, the comparison."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.layers import ModelConfig, Remat, Transformer, cross_entropy, model_rules
from trellax.layers.context.choice import Way
from trellax.layers.context.places import order_chunks
from trellax.layers.lora.nf4 import is_nf4
from trellax.layers.quantized import SCALE
from trellax.layers.vocabulary import resize_tables
from trellax.meshes import MeshSpec, ShardingRules, build_mesh
from trellax.pipeline import (
    LossAndGrads,
    PipelinedModel,
    PipelineParams,
    natural_order,
    pipeline_grads,
    split_transformer,
    stages_from_layers,
)
from trellax.pipeline.model.losses import LossFn, next_token_loss
from trellax.pipeline.model.split import SplitWeights
from trellax.schedules import Schedule, Vocab, build_schedule

Attention = Literal["mha", "gqa", "mqa"]
"""Number of key/value heads: as many as query heads (8), half as many, or one."""

OnOff = Literal["off", "on"]

KV_HEADS: dict[Attention, int] = {"mha": 8, "gqa": 4, "mqa": 1}
NUM_TOKENS = 16
VOCAB_SIZE = 64

STYLES: dict[str, dict[str, Any]] = {
    "gpt": {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "bias": "on"},
    "llama": {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": "off"},
    "qwen": {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": "qkv", "qk_norm": "on"}
    | {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_tokens": 64, "attention_window": 5},
}


def small_model(
    *,
    style: str = "gpt",
    attention: Attention = "mha",
    embeddings: Literal["tied", "untied"] = "tied",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> ModelConfig:
    """Eight layers of width 64: deep enough for eight stages, wide enough for eight tensor ranks."""
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=8,
        hidden_size=64,
        num_heads=8,
        num_kv_heads=KV_HEADS[attention],
        max_tokens=NUM_TOKENS,
        embeddings=embeddings,
        dtype=dtype,
        **STYLES[style],
    )


def mesh_of(text: str) -> Mesh:
    """Return the mesh written as data x tensor x pipe, over the first of the fake devices."""
    return _build(_spec_of(text))


def _spec_of(text: str) -> MeshSpec:
    """Return the spec written as data x tensor x pipe, or as `MeshSpec.parse` reads it."""
    if "=" in text:
        return MeshSpec.parse(text)
    data, tensor, pipe = map(int, text.split("x"))
    return MeshSpec(data=data, tensor=tensor, pipe=pipe)


def _build(spec: MeshSpec) -> Mesh:
    return build_mesh(spec, devices=jax.devices()[: spec.num_devices])


@cache
def masked_batch(num_sequences: int) -> dict[str, np.ndarray]:
    """Random tokens and targets, [B, T]; a third of the weights is 0, the others differ and all sum to 1."""
    rng = np.random.default_rng(num_sequences)
    shape = (num_sequences, NUM_TOKENS)
    weights = rng.uniform(0.1, 1.0, shape) * (rng.uniform(size=shape) > 1 / 3)
    return {
        "tokens": rng.integers(0, VOCAB_SIZE, shape, np.int32),
        "targets": rng.integers(0, VOCAB_SIZE, shape, np.int32),
        "weights": (weights / weights.sum()).astype(np.float32),
    }


def microbatches(
    batch: dict[str, np.ndarray],
    *,
    mesh: Mesh,
    num_microbatches: int,
    over: tuple[str, ...] = ("data",),
    context: tuple[str, ...] = (),
) -> dict[str, jax.Array]:
    """Return the batch as [M, B@data, T@context] on the mesh, in the order of context ranks."""
    place = NamedSharding(mesh, P(None, over, context or None))
    num_ranks = math.prod(mesh.shape[axis] for axis in context)
    cut = {
        name: order_chunks(leaf, num_ranks=num_ranks).reshape(num_microbatches, -1, *leaf.shape[1:])
        for name, leaf in batch.items()
    }
    return jax.device_put(cut, place)


@cache
def natural_params(config: ModelConfig) -> dict[str, Any]:
    """Return parameters in the form of a plain `Transformer`, in numpy; random also where they start as 0 or 1."""
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if is_nf4(leaf):
            return rng.integers(0, 256, leaf.shape, np.uint8)
        if path[-1].key == SCALE:
            return rng.uniform(0.1, 0.3, leaf.shape).astype(np.float32)
        middle = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (middle + 0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def cut_params(config: ModelConfig, model: PipelinedModel) -> PipelineParams:
    """Return the same parameters as stages on the mesh of the model."""
    params = natural_params(config)
    num_chunks, num_ranks = jax.tree.leaves(model.params.stages)[0].shape[:2]
    cut: dict[str, Any] = {"layers_per_stage": model.fns.layers_per_stage, "placement": model.fns.placement}
    cut |= {"pattern": model.fns.pattern}
    stages = stages_from_layers(params["blocks"], num_ranks=num_ranks, num_chunks=num_chunks, **cut)
    num_rows = model.params.shared["embed"]["table"].shape[0]
    shared = resize_tables({"embed": params["embed"], "head": params.get("head", {})}, num_rows)
    return jax.device_put(PipelineParams(stages=stages, shared=shared), model.shardings)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Loss, global gradient norm and gradients in natural layer order, in numpy."""

    loss: float
    norm: float
    grads: dict[str, Any]


@cache
def one_device(
    config: ModelConfig, num_sequences: int, *, loss_of_logits: Callable[..., jax.Array] = cross_entropy
) -> Answer:
    """Compute the reference by `jax.grad` on the whole batch: no mesh, no microbatches, no fused loss."""
    graph = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]

    def loss_of(params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
        model: Transformer = nnx.merge(graph, params)
        x, of_routers = model.hidden(batch["tokens"], batch["weights"])
        logits = model.head(x, embedding_VD=model.embed.table[...])
        return loss_of_logits(logits, batch["targets"], batch["weights"]) + of_routers

    @jax.jit
    def step(params: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any], jax.Array]:
        loss, grads = jax.value_and_grad(loss_of, allow_int=True)(params, batch)
        # Integers, kernels of four bits, have no gradient.
        grads = jax.tree.map(lambda grad: jnp.zeros(grad.shape) if grad.dtype == jax.dtypes.float0 else grad, grads)
        return loss, grads, global_norm(grads)

    loss, grads, norm = jax.device_get(step(natural_params(config), masked_batch(num_sequences)))
    return Answer(loss=float(loss), norm=float(norm), grads=grads)


def global_norm(tree: Any) -> jax.Array:
    """Return the 2-norm of all leaves together."""
    return jnp.sqrt(sum(((leaf * leaf).sum() for leaf in jax.tree.leaves(tree)), start=jnp.float32(0)))


@dataclass(frozen=True, kw_only=True)
class Step:
    """A jitted step of the pipeline with its arguments, for tests that run it or read its compiled program."""

    model: PipelinedModel
    run: Callable[..., tuple[LossAndGrads, jax.Array]]
    params: PipelineParams
    batch: dict[str, jax.Array]
    config: ModelConfig


def pipeline_step(
    config: ModelConfig,
    *,
    mesh: str,
    schedule: str | Schedule,
    num_microbatches: int,
    num_sequences: int,
    num_chunks: int = 1,
    layers_per_stage: tuple[int, ...] | None = None,
    vocab: Vocab = "ends",
    sequence: OnOff = "off",
    whole: dict[str, None] | None = None,
    shard: SplitWeights = "none",
    remat: Remat = "none",
    unroll: OnOff = "off",
    overlap: Literal["auto", "on", "off"] = "auto",
    bubbles: Literal["zeros", "nan"] = "zeros",
    batch: dict[str, np.ndarray] | None = None,
    context: Way = "gather",
    frozen: Callable[[str], bool] | None = None,
    loss: LossFn = next_token_loss,
    key: jax.Array | None = None,
) -> Step:
    """Return the step that computes loss, gradients and their global norm on a mesh.

    Args:
        mesh, whole, batch: as 2x2x2 or `dp=2:batch,pp=4:pipe`; rules that keep dimensions whole; leaves [B, T].
    """
    devices = _build(spec := _spec_of(mesh))
    rules = _rules_of(config, devices, spec, sequence=sequence, context=context).replace(**whole or {})
    sizes = {"num_ranks": spec.pipe, "num_microbatches": num_microbatches, "num_chunks": num_chunks}
    plan = build_schedule(schedule, **sizes, vocab=vocab) if isinstance(schedule, str) else schedule
    cut: dict[str, Any] = {"num_chunks": num_chunks, "layers_per_stage": layers_per_stage, "vocab": vocab}
    cut |= {"placement": plan.placement, "remat": remat, "unroll": unroll, "shard": shard, "loss": loss}
    model = split_transformer(config, mesh=devices, rules=rules, **cut)
    fns = model.fns if frozen is None else replace(model.fns, frozen=frozen)
    run = partial(pipeline_grads, fns, mesh=devices, schedule=plan, overlap=overlap, bubbles=bubbles, key=key)
    axes: dict[str, Any] = {"over": spec.roles.batch, "context": spec.roles.context, "mesh": devices}
    cut_batch = microbatches(batch or masked_batch(num_sequences), num_microbatches=num_microbatches, **axes)
    return Step(model=model, run=_with_norm(run), params=cut_params(config, model), batch=cut_batch, config=config)


def _with_norm(run: Callable[..., LossAndGrads]) -> Callable[..., tuple[LossAndGrads, jax.Array]]:
    @jax.jit
    def step(params: PipelineParams, batch: Any) -> tuple[LossAndGrads, jax.Array]:
        out = run(params=params, batch=batch)
        return out, global_norm(out.grads)

    return step


def _rules_of(config: ModelConfig, mesh: Mesh, spec: MeshSpec, *, sequence: OnOff, context: Way) -> ShardingRules:
    rules = model_rules(config, mesh.shape, rules=ShardingRules.of(spec.roles))
    rules = rules.split_stream() if sequence == "on" else rules
    rules = rules.keep_keys() if context == "gather-once" else rules
    return rules.exchange_heads() if context == "ulysses" else rules


def answer_of(step: Step) -> Answer:
    """Run the step and bring its results into natural order."""
    out, norm = step.run(step.params, step.batch)
    fns = step.model.fns
    cut: dict[str, Any] = {"layers_per_stage": fns.layers_per_stage, "placement": fns.placement}
    stages = natural_order(out.grads.stages, pattern=fns.pattern, **cut)
    shared = jax.device_get(out.grads.shared)
    for own in shared.values():
        # Padding of the vocabulary has no gradient at all.
        table = own.get("table")
        assert table is None or not table[step.config.vocab_size :].any()
    grads = {"blocks": stages, **resize_tables(shared, step.config.vocab_size)}
    return Answer(loss=float(out.loss), norm=float(norm), grads=jax.device_get(grads))


def errors_of(actual: Answer, expected: Answer) -> dict[str, float]:
    """Return the relative error of loss, norm and every gradient, by name.

    A gradient's error is its largest difference over the largest |gradient| of that leaf, but over no less than 1e-2
    of the largest gradient of all. Only key biases come under that floor: the softmax cancels them, their gradient is
    zero, and what is computed is the rounding of sums as large as other leaves' gradients.
    """
    errors = {
        "loss": abs(actual.loss - expected.loss) / abs(expected.loss),
        "norm": abs(actual.norm - expected.norm) / expected.norm,
    }
    top = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected.grads))
    wanted = dict(jax.tree_util.tree_leaves_with_path(expected.grads))
    found = dict(jax.tree_util.tree_leaves_with_path(actual.grads))
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        scale = max(np.abs(leaf).max(), 1e-2 * top)
        difference = np.abs(np.asarray(found[path], np.float64) - np.asarray(leaf, np.float64)).max()
        errors[jax.tree_util.keystr(path, simple=True, separator=".")] = float(difference / scale)
    return errors


def beyond(errors: dict[str, float], *, tolerance: float) -> dict[str, float]:
    """Return the errors that are not within the tolerance; NaN is not."""
    return {name: error for name, error in errors.items() if not error <= tolerance}


def broken(config: ModelConfig, *, tolerance: float, num_sequences: int, **step: Any) -> dict[str, float]:
    """Return where a step, of the arguments of `pipeline_step`, differs from one device by more than the tolerance."""
    actual = answer_of(pipeline_step(config, num_sequences=num_sequences, **step))
    return beyond(errors_of(actual, one_device(config, num_sequences)), tolerance=tolerance)


def relative_distances(actual: Answer, expected: Answer) -> dict[str, float]:
    """Return the relative error of loss and norm, and of every gradient |difference| / |gradient| in the 2-norm.

    For coarse number formats, whose single entries are noise; gradients that are zero but for rounding are left out.
    """
    found = errors_of(actual, expected)
    errors = {name: found[name] for name in ("loss", "norm")}
    wanted = jax.tree_util.tree_leaves_with_path(expected.grads)
    top = max(np.abs(leaf).max() for _, leaf in wanted)
    for (path, leaf), other in zip(wanted, jax.tree.leaves(actual.grads), strict=True):
        if np.abs(leaf).max() > 1e-2 * top:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            errors[name] = float(np.linalg.norm(other - leaf) / np.linalg.norm(leaf))
    return errors
