"""XLA's compiler options are set for GPUs only, never over the user's, and unknown ones are left out."""

import os
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from trellax.train import xla
from trellax.train.xla import GPU_SETTINGS, SLOP, allocator_bytes, choose_options, compile_for, prepare_backend


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


class FakeProgram:
    """A program that takes some bytes; `slop` is the option that it was compiled with."""

    def __init__(self, temp_bytes: int, *, slop: object = None, text: str = "") -> None:
        self.temp_bytes, self.slop, self.text = temp_bytes, slop, text

    def memory_analysis(self) -> Any:
        return SimpleNamespace(
            argument_size_in_bytes=100,
            output_size_in_bytes=100,
            alias_size_in_bytes=100,
            temp_size_in_bytes=self.temp_bytes,
            generated_code_size_in_bytes=0,
        )

    def as_text(self) -> str:
        return self.text


class FakeLowered:
    """Gives a program of `temp_bytes` with all of the memory, of less with a reserve, and of more without a limit."""

    def __init__(self, temp_bytes: int, *, with_reserve: int, unlimited: int | None = None, text: str = "") -> None:
        self.whole, self.with_reserve, self.text = temp_bytes, with_reserve, text
        self.unlimited = temp_bytes if unlimited is None else unlimited
        self.compiled = 0

    def compile(self, compiler_options: dict[str, Any]) -> FakeProgram:
        self.compiled += 1
        slop = compiler_options.get(SLOP)
        sizes: dict[object, int] = {100: self.whole, 117: self.whole, 1000: self.unlimited, 1171: self.unlimited}
        return FakeProgram(sizes.get(slop, self.with_reserve), slop=slop, text=self.text)


REMAT = "  %fusion.3.remat = f32[8]{0} fusion(%x), kind=kLoop"


@pytest.mark.parametrize(
    ("lowered", "slop", "times"),
    [
        # Of 1,100 bytes 100 are kept; XLA plans 95% of 1,000 for the rest.
        (FakeLowered(940, with_reserve=940), None, 1),
        (FakeLowered(980, with_reserve=970), 1000, 2),
        (FakeLowered(980, with_reserve=900, text=REMAT), 1000, 2),
        (FakeLowered(980, with_reserve=900, unlimited=1050, text=REMAT), 100, 3),
        (FakeLowered(1200, with_reserve=940, text=REMAT), None, 3),
    ],
    ids=["fits", "over the limit", "computed again", "fits with a limit", "does not fit without recomputation"],
)
def test_the_limit_is_given_up_where_a_program_needs_it(
    lowered: FakeLowered, slop: int | None, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(xla, "allocator_bytes", lambda: 1100)
    assert compile_for(lowered, platform="gpu").slop == slop
    assert lowered.compiled == times


@pytest.mark.parametrize(
    ("lowered", "slop", "times"),
    [
        # Of 1,000 bytes XLA takes 800 and jax would 920; 100 are kept. 820 / 700 = 117%, and 95% of that 111%.
        (FakeLowered(660, with_reserve=660), None, 1),
        (FakeLowered(700, with_reserve=700), 111, 2),
        (FakeLowered(800, with_reserve=790), 1171, 3),
        (FakeLowered(800, with_reserve=790, unlimited=830), 117, 4),
        (FakeLowered(830, with_reserve=790), 111, 4),
    ],
    ids=["fits", "fits a run", "needs the reserve", "fits with a limit", "does not fit"],
)
def test_a_program_for_an_absent_gpu_is_that_of_a_run(
    lowered: FakeLowered, slop: int | None, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    assert compile_for(lowered, platform="gpu", absent_bytes=1000).slop == slop
    assert lowered.compiled == times


def test_slop_factor_of_the_user_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"--{SLOP}=90")
    monkeypatch.setattr(xla, "allocator_bytes", lambda: 1100)
    lowered = FakeLowered(980, with_reserve=970)
    assert compile_for(lowered, platform="gpu").slop is None
    assert lowered.compiled == 1


def test_without_a_gpu_nothing_is_compiled_twice() -> None:
    assert allocator_bytes() is None
    lowered = FakeLowered(980, with_reserve=970)
    assert compile_for(lowered, platform="gpu").slop is None
    assert lowered.compiled == 1
