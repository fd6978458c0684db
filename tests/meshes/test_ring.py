"""Flags under which XLA gives zeros in rings of permutes are refused where they would harm, and there alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from trellax.meshes import ScheduleError
from trellax.meshes.ring import check_ring, find_ring_flag
from trellax.pipeline import PipelineParams, StageFns, pipeline_grads
from trellax.schedules import build_schedule

PIPELINED = "--xla_gpu_enable_pipelined_p2p"
LEVEL = "--xla_gpu_experimental_pipeline_parallelism_opt_level"


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("", None),
        (f"--xla_dump_to=/nowhere {PIPELINED}=true", "xla_gpu_enable_pipelined_p2p=true"),
        (PIPELINED, "xla_gpu_enable_pipelined_p2p=true"),
        (f"{PIPELINED}=1", "xla_gpu_enable_pipelined_p2p=1"),
        (f"{PIPELINED}=false", None),
        (f"{PIPELINED}=true {PIPELINED}=false", None),
        (f"{LEVEL}=PIPELINE_PARALLELISM_OPT_LEVEL_ENABLE", f"{LEVEL[2:]}=PIPELINE_PARALLELISM_OPT_LEVEL_ENABLE"),
        (f"{LEVEL}=PIPELINE_PARALLELISM_OPT_LEVEL_DISABLE", None),
    ],
)
def test_flags_that_break_rings_are_found_on_gpus_alone(flags: str, found: str | None) -> None:
    assert [find_ring_flag(platform=platform, flags=flags) for platform in ("gpu", "cpu")] == [found, None]


def mesh(*sizes: int, platform: str = "gpu") -> AbstractMesh:
    device = AbstractDevice(device_kind="H100", num_cores=None, platform=platform)
    return AbstractMesh(sizes, ("pipe", "data", "tensor"), axis_types=(AxisType.Auto,) * 3, abstract_device=device)


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 2)])
def test_a_single_ring_or_none_is_allowed(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"{PIPELINED}=true")
    check_ring(mesh(*sizes), what="decoding")


def test_an_interleaved_schedule_is_refused_under_such_a_flag(
    monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"{PIPELINED}=true")
    fns = StageFns(first=lambda _, m: m["x"], layer=lambda w, x, _: x @ w, last=lambda _, x, __: x.sum())

    def step(schedule: str, num_chunks: int, platform: str) -> Any:
        sizes: dict[str, Any] = {"num_ranks": 2, "num_microbatches": 2, "num_chunks": num_chunks}
        params = PipelineParams(stages=jnp.ones((num_chunks, 2, 1, 4, 4)), shared={})
        where: dict[str, Any] = {
            "mesh": mesh(2, 2, 1, platform=platform),
            "schedule": build_schedule(schedule, **sizes),
        }
        return jax.eval_shape(
            lambda b: pipeline_grads(fns, params=params, batch=b, **where), {"x": jnp.ones((2, 4, 4))}
        )

    with pytest.raises(ScheduleError) as caught:
        step("interleaved-1f1b", 2, "gpu")
    golden("errors/meshes/ring_under_a_flag.txt", f"{type(caught.value).__name__}: {caught.value}")
    assert step("interleaved-1f1b", 2, "cpu").loss.shape == ()
    assert step("1f1b", 1, "gpu").loss.shape == ()
