"""Residuals that wait in host memory: the tables by an interpreter, and gradients equal to the last bit."""

from typing import Any

import jax
import numpy as np
import pytest
from trellax.configs import load_config
from trellax.meshes import ScheduleError, build_mesh
from trellax.pipeline import pipeline_grads
from trellax.pipeline.lowering.lower import lower
from trellax.pipeline.lowering.tables import BACKWARD, FORWARD, INPUT_GRAD, NONE, WEIGHT_GRAD, Tables
from trellax.schedules import build_schedule
from trellax.train import Setup

SCHEDULES = [
    ("1f1b", 4, 8, 1),
    ("1f1b", 8, 20, 1),
    ("1f1b", 3, 7, 1),
    ("interleaved-1f1b", 4, 16, 2),
    ("zb-h1", 4, 9, 1),
    ("zb-v", 4, 8, 2),
    ("gpipe", 4, 6, 1),
]


TWO_CHUNKS = "--pipeline.schedule interleaved-1f1b --pipeline.chunks 2"


def tables_of(name: str, ranks: int, microbatches: int, chunks: int, **options: Any) -> Tables:
    schedule = build_schedule(name, num_ranks=ranks, num_microbatches=microbatches, num_chunks=chunks)
    return lower(schedule, ends="together", **options)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("name", "ranks", "microbatches", "chunks"), SCHEDULES)
def test_every_reader_finds_the_residuals_of_its_forward(
    name: str, ranks: int, microbatches: int, chunks: int, overlap: bool
) -> None:
    tables = tables_of(name, ranks, microbatches, chunks, overlap=overlap, offload="residuals")
    compute, host = tables.turns.compute, tables.turns.host
    assert host is not None
    for rank in range(ranks):
        on_device: dict[int, Any] = {}
        on_host: dict[int, Any] = {}
        for turn in range(tables.num_turns):
            kind, slot = compute.kind[turn, rank], compute.residuals[turn, rank]
            what = (compute.stage[turn, rank], compute.microbatch[turn, rank])
            arriving = on_host.pop(host.load[turn, rank]) if host.load[turn, rank] != NONE else None
            if kind == FORWARD:
                assert slot not in on_device
                on_device[slot] = what
            if kind in (BACKWARD, INPUT_GRAD, WEIGHT_GRAD):
                assert on_device[slot] == what
            if kind in (BACKWARD, WEIGHT_GRAD):
                del on_device[slot]
            if host.send[turn, rank] != NONE:
                assert host.store[turn, rank] not in on_host
                on_host[host.store[turn, rank]] = on_device.pop(host.send[turn, rank])
            if arriving is not None:
                assert host.receive[turn, rank] not in on_device
                on_device[host.receive[turn, rank]] = arriving
        assert not on_device
        assert not on_host
    steady = tables.steady
    if steady is not None:
        # A pair is one body, which copies in its first turn.
        second = slice(steady.start + 1, steady.stop, 2)
        assert (host.store[second] == NONE).all()
        assert (host.load[second] == NONE).all()


def test_slots_fall_where_backwards_are_far_off() -> None:
    def slots(name: str, ranks: int, microbatches: int, chunks: int, **options: Any) -> list[int]:
        both = [tables_of(name, ranks, microbatches, chunks, offload=one, **options) for one in ("none", "residuals")]
        return [tables.num_residual_slots for tables in both]

    assert slots("1f1b", 8, 32, 1, overlap=True) == [15, 3]
    assert slots("interleaved-1f1b", 4, 16, 2, overlap=True) == [11, 3]
    assert slots("gpipe", 4, 8, 1) == [8, 2]
    # A weight gradient reads long after its input gradient, so these wait on the device.
    assert slots("zb-h1", 8, 32, 1) == [8, 8]


def grads_of(words: str, *, offload: Any, overlap: Any) -> Any:
    config = load_config("tiny-llama", f"--pipeline.microbatches 8 --train.batch_size 16 {words}")
    setup = Setup(config, build_mesh(config.mesh, devices=jax.devices()[: config.mesh.num_devices]))
    random = np.random.default_rng(0)
    shapes = setup.batch_shapes
    values = {name: random.integers(0, 256, leaf.shape, np.int32) for name, leaf in shapes.items()}
    values["weights"] = np.full(shapes["weights"].shape, 1 / values["tokens"].size, np.float32)
    batch = {name: jax.device_put(value, shapes[name].sharding) for name, value in values.items()}
    given: dict[str, Any] = {"mesh": setup.mesh, "schedule": setup.schedule, "overlap": overlap, "bubbles": "nan"}
    given["offload"] = offload
    step = jax.jit(lambda params, batch: pipeline_grads(setup.model.fns, params=params, batch=batch, **given))
    return step(setup.model.init(0), batch)


@pytest.mark.parametrize(
    ("words", "overlap"),
    [
        ("--mesh.data 2 --mesh.pipe 4 --model.num_layers 6", "off"),
        ("--mesh.data 2 --mesh.pipe 4 --model.num_layers 6", "on"),
        (
            f"--mesh.tensor 2 --mesh.pipe 4 --model.num_layers 8 {TWO_CHUNKS}",
            "on",
        ),
        pytest.param(
            "--mesh.data 2 --mesh.pipe 4 --model.num_layers 8 --pipeline.schedule zb-h1", "off", marks=pytest.mark.slow
        ),
        pytest.param(
            "--mesh.tensor 2 --mesh.pipe 2 --model.num_layers 8 --pipeline.schedule zb-v --pipeline.chunks 2",
            "off",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --train.shard layer --pipeline.remat none",
            "on",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--mesh.pipe 4 --model.num_layers 4 --pipeline.schedule gpipe --pipeline.vocab ends",
            "off",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients_are_those_of_residuals_on_the_device(words: str, overlap: str) -> None:
    # The same operations on the same numbers, which were elsewhere meanwhile: equal to the last bit.
    there, here = (grads_of(words, offload=offload, overlap=overlap) for offload in ("residuals", "none"))
    assert float(there.loss) == float(here.loss)
    pairs = zip(jax.tree.leaves(there.grads), jax.tree.leaves(here.grads), strict=True)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_one_rank_has_no_residuals_that_wait() -> None:
    with pytest.raises(ScheduleError, match=r"offload='residuals' on a mesh with pipe=1"):
        grads_of("--mesh.data 2", offload="residuals", overlap="off")
