"""Options of the compiler that a training step has on GPUs alone."""

from typing import Any

import jax
import pytest
from trellax.configs import load_config
from trellax.meshes import MeshSpec, build_mesh
from trellax.train import step
from trellax.train.state import Setup

WRITTEN, BUFFERS = "xla_gpu_enable_dynamic_slice_fusion", "xla_gpu_enable_command_buffer"


def options(monkeypatch: pytest.MonkeyPatch, *words: str, jaxlib: str, platform: str = "gpu", **more: Any) -> Any:
    monkeypatch.setattr(step.jaxlib, "__version__", jaxlib)
    monkeypatch.setattr(step, "platform_of", lambda _: platform)
    monkeypatch.setattr(step, "compiler_options", lambda *_, **__: {})
    setup = Setup(load_config("tiny-llama", list(words)), build_mesh(MeshSpec(), devices=jax.devices()[:1]))
    return step.step_options(setup, **more)


def test_products_of_a_loop_are_not_computed_twice_by_jaxlib_0_11(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options(monkeypatch, jaxlib="0.11.2") == {WRITTEN: False}
    assert options(monkeypatch, "--pipeline.unroll", "on", jaxlib="0.11.2") == {}
    assert options(monkeypatch, jaxlib="0.12.0") == {}
    assert options(monkeypatch, jaxlib="0.11.2", platform="cpu") == {}


def test_flags_of_the_user_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"--{WRITTEN}=true")
    assert options(monkeypatch, jaxlib="0.11.2") == {}


def test_profiler_sees_the_kernels_of_gpus_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options(monkeypatch, jaxlib="0.12.0", is_traced=True) == {BUFFERS: ""}
    assert options(monkeypatch, jaxlib="0.12.0", platform="cpu", is_traced=True) == {}
