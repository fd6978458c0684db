"""XLA's compiler options are set for GPUs only, never over the user's, and unknown ones are left out."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from trellax.train import xla
from trellax.train.xla import GPU_SETTINGS, choose_options, compile_for, prepare_backend


def test_gpus_get_every_option_and_cpus_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    assert choose_options("gpu") == {setting.name: setting.value for setting in GPU_SETTINGS}
    assert choose_options("cpu") == {}


def test_flags_of_the_user_win(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = GPU_SETTINGS
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/nowhere --{first.name}=false")
    assert choose_options("gpu") == {setting.name: setting.value for setting in rest}


def test_every_option_has_a_reason() -> None:
    assert all(setting.why for setting in GPU_SETTINGS)


def test_option_unknown_to_this_xla_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {"xla_llvm_disable_expensive_passes": True}
    monkeypatch.setattr(xla, "choose_options", lambda _: {"xla_gpu_of_another_day": True} | known)
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(()))
    assert float(compile_for(lowered, platform="gpu")(jnp.ones(()))) == 2.0


def test_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "choose_options", lambda _: {"xla_llvm_disable_expensive_passes": "perhaps"})
    with pytest.raises(Exception, match="perhaps"):
        compile_for(jax.jit(lambda x: x).lower(1.0), platform="gpu")


def test_memory_fraction_of_the_user_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert prepare_backend() == ""
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
