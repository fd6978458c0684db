"""Weights split over data equal one device, and what their compiled programs send and hold."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.meshes import MeshSpec, ScheduleError, ShardingError, build_mesh
from trellax.pipeline import PipelineParams, StageFns, pipeline_grads, split_transformer
from trellax.pipeline.lowering.lower import lower
from trellax.plan.costs.device_params import block_matrices, vocabulary_params
from trellax.programs import hlo_text
from trellax.programs.hlo import HloModule
from trellax.schedules import Vocab, build_schedule

from ..programs.steps import report_of, setup_of
from .law import broken, small_model
from .unordered import find_unordered

TOLERANCE = 2e-5  # as in test_law.py, for the same reason

Shard = Literal["step", "chunk", "layer"]
SHARDS: tuple[Shard, ...] = ("step", "chunk", "layer")


@dataclass(frozen=True)
class Case:
    mesh: str
    schedule: str
    num_microbatches: int
    embeddings: Literal["tied", "untied"]
    shard: Shard
    sequence: Literal["off", "on"] = "off"
    vocab: Vocab = "ends"
    num_chunks: int = 1
    layers: tuple[int, ...] | None = None
    unroll: Literal["off", "on"] = "off"

    def __str__(self) -> str:
        extra = f"-{self.vocab}-seq_{self.sequence}" + ("-uneven" if self.layers else "") + f"-unroll_{self.unroll}"
        return f"{self.mesh}-{self.schedule}-m{self.num_microbatches}-{self.embeddings}-{self.shard}{extra}"


CASES = (
    Case("8x1x1", "1f1b", 3, "tied", "layer"),
    Case("4x2x1", "1f1b", 3, "untied", "step", "on"),
    Case("2x2x2", "1f1b", 5, "tied", "layer", "on", "split"),
    Case("2x1x4", "zb-h1", 5, "untied", "layer"),
    Case("2x2x2", "interleaved-1f1b", 3, "untied", "step", "on", "split", 2),
    Case("2x1x4", "zb-v", 5, "tied", "layer", num_chunks=2, vocab="split"),
    Case("2x1x4", "1f1b", 3, "untied", "layer", layers=(1, 3, 3, 1)),
    Case("4x2x1", "1f1b", 3, "tied", "layer", "on", unroll="on"),
    Case("2x2x2", "interleaved-1f1b", 5, "tied", "chunk", "on", "split", 4),
)

MORE_CASES = tuple(
    Case(mesh, schedule, m, embeddings, shard, sequence, vocab, chunks)
    for number, (mesh, (schedule, chunks), shard, m) in enumerate(
        (mesh, kind, shard, m)
        for mesh in ("2x2x2", "4x2x1", "8x1x1", "2x1x4", "4x1x2")
        for kind in (("1f1b", 1), ("interleaved-1f1b", 2), ("zb-h1", 1), ("zb-v", 2))
        for shard in SHARDS
        for m in (1, 3)
    )
    if not mesh.endswith("x1") or schedule == "1f1b"
    for embeddings in (("tied", "untied")[number % 2],)
    for sequence in (("off", "on")["x2x" in mesh],)
    for vocab in (("ends", "split")[number // 2 % 2],)
)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_weights_split_over_data_equal_one_device(case: Case) -> None:
    config = small_model(style="llama", attention="gqa", embeddings=case.embeddings)
    found = broken(
        config,
        tolerance=TOLERANCE,
        mesh=case.mesh,
        schedule=case.schedule,
        num_microbatches=case.num_microbatches,
        num_sequences=8 * case.num_microbatches,
        num_chunks=case.num_chunks,
        layers_per_stage=case.layers,
        vocab=case.vocab,
        sequence=case.sequence,
        shard=case.shard,
        unroll=case.unroll,
        bubbles="nan",
    )
    assert found == {}


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize(("mesh", "extra"), [("4x1x2", ""), ("2x2x2", "--pipeline.vocab split")])
@pytest.mark.parametrize("shard", SHARDS)
def test_bytes_over_data_by_hand(shard: Shard, mesh: str, extra: str, schedule: str) -> None:
    words = f"--train.shard {shard} --pipeline.schedule {schedule} --data.seq_len 32 --model.num_layers 8 {extra}"
    report, (data, tensor, pipe) = report_of(mesh, words), map(int, mesh.split("x"))
    sent: dict[str, float] = defaultdict(float)
    for row in report.traffic:
        if row.axis == "data" and row.kind in ("all-gather", "reduce-scatter"):
            sent[row.kind] += row.bytes
    model = setup_of(mesh, words).config.model
    layers = 8 // pipe * block_matrices(model, tensor=tensor)
    # Tables, whole on each rank or a part on each, once a step.
    tables = vocabulary_params(model, parts=tensor)[0] / (pipe if extra else 1)
    part, microbatches = 4 * (data - 1) / data, 4
    # float32 here: a gather forward and one backward in each of four microbatches, or one a step; one sum each.
    gathers = {"step": 1, "chunk": 1, "layer": 2 * microbatches}[shard]
    sums = 1 if shard == "step" else microbatches
    assert sent["all-gather"] == pytest.approx(part * (gathers * layers + tables), rel=0.01)
    assert sent["reduce-scatter"] == pytest.approx(part * (sums * layers + tables), rel=0.01)


def test_a_chunk_is_gathered_for_each_run_of_its_actions() -> None:
    words = "--pipeline.schedule interleaved-1f1b --pipeline.chunks 4 --pipeline.microbatches 8 --train.batch_size 16"
    common = f"--data.seq_len 32 --model.num_layers 8 {words} --train.shard"
    found = {shard: report_of("2x1x2", f"{common} {shard}") for shard in SHARDS}
    gathers = {shard: sum(r.bytes for r in report.traffic if r.kind == "all-gather") for shard, report in found.items()}
    setup = setup_of("2x1x2", f"{common} chunk")
    columns = lower(setup.schedule, gathers="chunks").turns.weights
    assert columns is not None
    # Of 64 actions on 4 chunks of a layer each, in slots for two.
    runs = int((columns.gather >= 0).sum(axis=0).max())
    assert 4 < runs < 20
    layer = 2 * block_matrices(setup.config.model, tensor=1)
    assert gathers["chunk"] - gathers["step"] == pytest.approx((runs - 4) * layer, rel=0.01)
    assert gathers["layer"] - gathers["step"] == pytest.approx((64 - 4) * layer, rel=0.01)
    assert found["chunk"].memory.gradients == found["layer"].memory.gradients


def test_state_is_split_and_sums_too_where_layers_gather() -> None:
    found = {shard: report_of("8x1x1", f"--train.shard {shard}").memory for shard in ("none", "step", "layer")}
    model = setup_of("8x1x1").config.model
    matrices = 4 * (model.num_layers * block_matrices(model, tensor=1) + vocabulary_params(model, parts=1)[0])
    saved = matrices * 7 / 8
    for shard in ("step", "layer"):
        assert found["none"].parameters - found[shard].parameters == saved
        assert found["none"].optimizer - found[shard].optimizer == pytest.approx(2 * saved, rel=0.001)
    assert found["step"].gradients == found["none"].gradients
    assert found["layer"].gradients < 0.5 * found["none"].gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "chunks", "m", "vocab"),
    [("1f1b", 1, 12, "split"), ("interleaved-1f1b", 4, 12, "ends"), ("dualpipev", 2, 12, "split")],
)
def test_chunks_are_gathered_in_a_steady_state_too(schedule: str, chunks: int, m: int, vocab: Vocab) -> None:
    found = broken(
        small_model(style="llama", attention="gqa", embeddings="untied"),
        tolerance=TOLERANCE,
        mesh="2x1x2" if chunks == 4 else "2x1x4",
        schedule=schedule,
        num_microbatches=m,
        num_sequences=2 * m,
        num_chunks=chunks,
        vocab=vocab,
        shard="chunk",
        overlap="on",
        bubbles="nan",
    )
    assert found == {}


def _own_model(
    spec: P, gather: Shard, *, num_layers: int = 2
) -> tuple[StageFns, PipelineParams, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    stages = {"w": jnp.asarray(rng.standard_normal((1, 2, num_layers, 8, 8)), jnp.float32)}
    fns = StageFns(
        first=lambda shared, microbatch: microbatch["x"] @ shared["in"],
        layer=lambda params, x, _: jnp.tanh(x @ params["w"]),
        last=lambda shared, y, microbatch: jnp.sum((y @ shared["in"].T) ** 2),
        stage_specs={"w": spec},
        shared_specs={"in": spec},
        gather=gather,
    )
    params = PipelineParams(stages=stages, shared={"in": jnp.asarray(rng.standard_normal((8, 8)), jnp.float32)})
    return fns, params, {"x": rng.standard_normal((3, 8, 8)).astype(np.float32)}


@pytest.mark.parametrize("schedule", ["zb-h1", pytest.param("1f1b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gather", ["layer", pytest.param("chunk", marks=pytest.mark.slow)])
def test_no_two_collectives_of_a_kind_and_group_can_run_at_once(gather: Shard, schedule: str) -> None:
    # Of three layers a loop runs two or all; what comes after it might run beside it on CPUs.
    fns, params, batch = _own_model(P("data"), gather, num_layers=3)
    mesh, plan = build_mesh(MeshSpec(data=4, pipe=2)), build_schedule(schedule, num_ranks=2, num_microbatches=3)
    run = jax.jit(lambda p, b: pipeline_grads(fns, params=p, batch=b, mesh=mesh, schedule=plan))
    program = HloModule.parse(hlo_text(run.lower(params, batch).compile()))
    assert "reduce-scatter" in {i.opcode for _, i in program.instructions()}
    assert find_unordered(program) == []


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")])
@pytest.mark.parametrize("gather", SHARDS)
def test_functions_of_ones_own_are_given_whole_weights(spec: P, gather: Shard) -> None:
    mesh = build_mesh(MeshSpec(data=4, pipe=2))
    schedule = build_schedule("1f1b", num_ranks=2, num_microbatches=3)
    found = []
    for own in (spec, P()):
        fns, params, batch = _own_model(own, gather)
        found.append(
            jax.jit(lambda p, b, f=fns: pipeline_grads(f, params=p, batch=b, mesh=mesh, schedule=schedule))(
                params, batch
            )
        )
    assert P(*found[0].grads.stages["w"].sharding.spec[3:]) == spec
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "prepare",
    [lambda params: {"w": params["w"].reshape(8, -1)}, lambda params: {"w": jnp.concatenate([params["w"]] * 4)[:8]}],
    ids=["reshape", "concatenate"],
)
def test_a_prepare_that_mixes_parts_is_refused_where_layers_gather(prepare: Any) -> None:
    fns, params, batch = _own_model(P("data"), "layer")
    mesh, schedule = build_mesh(MeshSpec(data=4, pipe=2)), build_schedule("1f1b", num_ranks=2, num_microbatches=3)
    with pytest.raises(ShardingError, match="prepare has the operation"):
        pipeline_grads(replace(fns, prepare=prepare), params=params, batch=batch, mesh=mesh, schedule=schedule)


def test_a_prepare_that_keeps_to_its_part_is_run_on_parts() -> None:
    mesh, schedule = build_mesh(MeshSpec(data=4, pipe=2)), build_schedule("1f1b", num_ranks=2, num_microbatches=3)
    found = []
    for spec in (P("data"), P()):
        fns, params, batch = _own_model(spec, "layer")
        own = replace(fns, prepare=lambda params: {"w": 2.0 * params["w"].T})
        step = jax.jit(lambda p, b, own=own: pipeline_grads(own, params=p, batch=b, mesh=mesh, schedule=schedule))
        found.append(step(params, batch))
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5)


def test_shards_that_divide_no_weight_are_refused() -> None:
    config = replace(small_model(), hidden_size=72, num_heads=4, num_kv_heads=4, ffn_size=36, vocab_size=63)
    mesh = build_mesh(MeshSpec(data=5), devices=jax.devices()[:5])
    with pytest.raises(ShardingError, match="5 divides no dimension"):
        split_transformer(config, mesh=mesh, shard="layer")


@pytest.mark.parametrize("gather", SHARDS)
def test_integers_that_are_split_have_zeros_for_gradients(gather: Shard) -> None:
    fns, params, batch = _own_model(P("data"), gather)
    own = replace(fns, layer=lambda params, x, _: jnp.tanh(x @ (params["w"] * params["sign"])), gather_dtype="float32")
    stages = params.stages | {"sign": jnp.ones((1, 2, 2, 8, 8), jnp.int32)}
    own = replace(own, stage_specs=P("data"))
    mesh, schedule = build_mesh(MeshSpec(data=4, pipe=2)), build_schedule("1f1b", num_ranks=2, num_microbatches=3)
    run = jax.jit(lambda p, b: pipeline_grads(own, params=p, batch=b, mesh=mesh, schedule=schedule))
    out = run(replace(params, stages=stages), batch)
    assert out.grads.stages["sign"].dtype == jnp.int32
    assert not out.grads.stages["sign"].any()
    expected = jax.jit(lambda p, b: pipeline_grads(fns, params=p, batch=b, mesh=mesh, schedule=schedule))(params, batch)
    np.testing.assert_allclose(out.grads.stages["w"], expected.grads.stages["w"], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("shard", SHARDS)
def test_an_embeddings_gradient_is_summed_in_float32_whatever_is_sent(shard: Shard) -> None:
    # Of 1,024 tokens four in five are the same: a bfloat16 sum of their gradients would stand still (0.3 off).
    config = replace(small_model(dtype="bfloat16", embeddings="untied"), num_layers=2, max_tokens=512)
    mesh, found = build_mesh(MeshSpec(data=2), devices=jax.devices()[:2]), []
    rng = np.random.default_rng(0)
    tokens = np.where(rng.uniform(size=(1, 2, 512)) < 0.8, 1, rng.integers(0, 64, (1, 2, 512))).astype(np.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.full((1, 2, 512), 1 / 1024, np.float32)}
    schedule = build_schedule("1f1b", num_ranks=1, num_microbatches=1)
    for choice in ("none", shard):
        model = split_transformer(config, mesh=mesh, shard=choice)
        run = jax.jit(lambda p, m=model: pipeline_grads(m.fns, params=p, batch=batch, mesh=mesh, schedule=schedule))
        found.append(np.asarray(run(model.init(0)).grads.shared["embed"]["table"], np.float64))
    assert np.linalg.norm(found[1] - found[0]) < 0.01 * np.linalg.norm(found[0])


def test_a_prepare_that_reads_sizes_is_refused_where_layers_gather() -> None:
    fns, params, batch = _own_model(P("data"), "layer")
    mesh, schedule = build_mesh(MeshSpec(data=4, pipe=2)), build_schedule("1f1b", num_ranks=2, num_microbatches=3)
    own = replace(fns, prepare=lambda params: {"w": params["w"] / params["w"].shape[0]})
    with pytest.raises(ShardingError, match="another thing"):
        pipeline_grads(own, params=params, batch=batch, mesh=mesh, schedule=schedule)


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_axes": ("data",)},
        {"token_axes": "tensor"},
        {"token_axes": ("tensor", "tensor")},
        {"gather_dtype": "bf16"},
    ],
    ids=str,
)
def test_wrong_fields_are_refused_by_name(wrong: dict[str, Any]) -> None:
    fns, _, _ = _own_model(P("data"), "layer")
    with pytest.raises(ScheduleError, match=next(iter(wrong))):
        replace(fns, **wrong)
