"""Choose XLA's compiler options for GPUs, each with its reason, and compile with them.

Options named in the user's `XLA_FLAGS` are left alone. Programs for GPUs that this machine lacks are compiled with the
same options, so that `trellax inspect` reads the program that would run. `compilation_cache.py` stores the programs.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from ..meshes.processes.messages import gather_texts
from ..meshes.switches import xla_flags
from ..programs.hardware import XLA_BASE_SHARE, XLA_SLOP
from ..programs.memory import kept_bytes, limit_bytes, total_bytes
from .compilation_cache import enable_compilation_cache

CompilerOption = bool | int | str
"""Value of a compiler option, as `Lowered.compile` takes it."""


_GPUS = ("gpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A compiler option of XLA, with the reason for its value."""

    name: str
    value: CompilerOption
    why: str


GPU_SETTINGS: tuple[Setting, ...] = (
    Setting(
        name="xla_gpu_enable_latency_hiding_scheduler",
        value=True,
        why="starts a collective earlier and waits for it later, so that matrix products run in between",
    ),
    Setting(
        name="xla_gpu_enable_highest_priority_async_stream",
        value=True,
        why="a collective that queues behind a product is not hidden behind it",
    ),
    Setting(
        name="xla_gpu_enable_triton_gemm",
        value=False,
        why="products of cuBLASLt read a layer's weights in place, and add a gradient to its sum themselves",
    ),
)
"""Two options keep XLA's default, until a measurement on a GPU says otherwise: command buffers (on, without
collectives), and the threshold up to which all-reduces of gradients are combined (30 MB). With a higher one all
gradients become one all-reduce, which nothing is left to overlap with."""

MEMORY_FRACTION = 0.92
"""Fraction of a GPU's memory that jax may allocate. Its default of 0.75 leaves 35 GB of an H200 idle; 8% stay for
libraries such as NCCL."""


_NO_LIMIT = 10.0
"""Share of the available memory that no estimate of XLA reaches.

XLA keeps 5% in reserve, and plans with an estimate that may be far above what a program takes: of 70B in four chunks a
rank, 66 GB, it computes slices again at a limit of 110 GB.
"""

SLOP = "xla_gpu_memory_limit_slop_factor"
"""XLA's option for the share, in percent, of the memory left for temporary values for which it plans a program."""


def compile_for(
    lowered: Any,
    *,
    platform: str,
    more: Mapping[str, CompilerOption] | None = None,
    absent_bytes: int | None = None,
) -> Any:
    """Compile a lowered program with the options for its platform, and more, that this version of XLA knows.

    A program over XLA's limit is compiled again without one, and with no reserve, and the first that fits is taken; or
    XLA would compute values again and let collectives wait.

    >>> compile_for(jax.jit(jnp.sin).lower(1.0), platform="cpu")(0.0)
    Array(0., dtype=float32, ...)

    Args:
        absent_bytes: memory of a GPU that is not present, of which jax could allocate `MEMORY_FRACTION`.
    """
    options = choose_options(platform) | dict(more or {})
    compiled = _compile(lowered, options)
    taken = allocator_bytes() if absent_bytes is None else int(XLA_BASE_SHARE * absent_bytes)
    kept = kept_bytes(compiled.memory_analysis()) if taken else 0
    if taken is None or taken <= kept or platform not in _GPUS or SLOP in xla_flags():
        return compiled
    available = taken if absent_bytes is None else int(MEMORY_FRACTION * absent_bytes)
    return _compile_without_limit(lowered, options, compiled, taken=taken, available=available)


def _compile_without_limit(
    lowered: Any, options: dict[str, CompilerOption], compiled: Any, *, taken: int, available: int
) -> Any:
    """Return a program as compiled, or if XLA has squeezed it, one with another limit that fits the available memory.

    Args:
        taken: bytes that XLA takes as available.
        available: bytes that jax may allocate.
    """
    kept = kept_bytes(compiled.memory_analysis())

    def compile_again(share: float) -> Any:
        slop = int(100 * share * (available - kept) / (taken - kept))
        return _compile(lowered, options | {SLOP: slop})

    def is_squeezed_on_any(compiled: Any, *, base: int) -> bool:
        return any(_answers(is_squeezed(compiled, limit=limit_bytes(kept, base=base))))

    if available > taken and is_squeezed_on_any(compiled, base=taken):
        # XLA takes less of an absent GPU than of one that is there: first as much as there.
        compiled = compile_again(XLA_SLOP)
    if is_squeezed_on_any(compiled, base=available):
        for share in (_NO_LIMIT, 1.0):
            again = compile_again(share)
            if all(_answers(total_bytes(again.memory_analysis()) <= available)):
                return again
    return compiled


def is_squeezed(compiled: Any, *, limit: int) -> bool:
    """Return whether XLA has computed values again by itself, or planned more memory than its limit."""
    # XLA names an instruction that it runs again `NAME.remat`; over the limit it found no more to run again.
    return total_bytes(compiled.memory_analysis()) > limit or ".remat" in compiled.as_text()


def allocator_bytes() -> int | None:
    """Return the bytes that jax may allocate on a GPU, which XLA takes as available; None without one."""
    if jax.default_backend() != "gpu":
        return None
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _answers(own: bool) -> list[bool]:
    """Return the answers of all processes, which must run the same program."""
    return [text == str(True) for text in gather_texts(str(own))]


def _compile(lowered: Any, options: dict[str, CompilerOption]) -> Any:
    while True:
        try:
            return lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            # Options come and go with XLA's versions; XLA names an unknown one before it compiles anything.
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or options.pop(unknown[1], None) is None:
                raise


def choose_options(platform: str) -> dict[str, CompilerOption]:
    """Return the options for a platform (`gpu`, `cpu`) that the user's XLA_FLAGS do not set."""
    if platform not in _GPUS:
        return {}
    named = xla_flags()
    return {setting.name: setting.value for setting in GPU_SETTINGS if setting.name not in named}


def prepare_backend() -> str:
    """Set GPU memory fraction and compilation cache, which jax reads when its backend starts.

    Values that the environment or jax's configuration already has are left alone. Returns a warning to print, or "".
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    return enable_compilation_cache()
