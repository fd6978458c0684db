"""Settings of XLA that trellax chooses for GPUs, each with its reason.

A user's own `XLA_FLAGS` win: what they name is left alone. Programs for GPUs that are not there are compiled with the
same settings, so that `trellax inspect` reads the program that would run. `program_cache.py` keeps what was compiled.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from .program_cache import open_program_cache

CompilerOption = bool | int | str
"""Value of a setting, as `Lowered.compile` takes it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting of XLA, and why it is set."""

    name: str
    value: CompilerOption
    why: str


GPU_SETTINGS: tuple[Setting, ...] = (
    Setting(
        name="xla_gpu_enable_latency_hiding_scheduler",
        value=True,
        why="moves the start of a collective up and its end down, so that products run in between",
    ),
    Setting(
        name="xla_gpu_enable_highest_priority_async_stream",
        value=True,
        why="a collective that queues behind a product is not hidden behind it",
    ),
)
"""Left as XLA has them, until a GPU says otherwise: command buffers (on, collectives outside), and how much of the
gradients one sum takes (30 MB): with more, all gradients become one sum that nothing overlaps."""

MEMORY_FRACTION = 0.92
"""Share of a GPU that jax may take: 0.75, its default, leaves 35 GB of an H200 idle; the rest is for libraries."""


def compile_for(lowered: Any, *, platform: str) -> Any:
    """Return the compiled program, with the settings for its platform that this XLA knows.

    >>> compile_for(jax.jit(jnp.sin).lower(1.0), platform="cpu")(0.0)
    Array(0., dtype=float32, ...)
    """
    options = choose_options(platform)
    while True:
        try:
            return lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            # Names come and go with XLA's versions; one that is not known is told before anything is compiled.
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or options.pop(unknown[1], None) is None:
                raise


def choose_options(platform: str) -> dict[str, CompilerOption]:
    """Return the settings for a platform (`gpu`, `cpu`) that the user's XLA_FLAGS leave open."""
    if platform not in ("gpu", "cuda"):
        return {}
    named = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    return {setting.name: setting.value for setting in GPU_SETTINGS if setting.name not in named}


def prepare_backend() -> str:
    """Set what must be set before jax starts: the share of GPU memory, and the cache of compiled programs.

    What the environment or jax's own configuration says already is left alone. Returns what a person should know, or
    "".
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    return open_program_cache()
