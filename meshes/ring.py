"""Refuse rings of collective permutes under XLA flags with which they would deliver zeros.

A ring over pipe is one cycle for every position on the other axes. With two cycles or more, XLA's pass that decomposes
cyclic permutes delivers zeros to all receivers of a back edge but one (https://github.com/openxla/xla/issues/45222).
The pass runs only under two flags; delete this file when the issue is closed in every jaxlib that we support.
"""

import math
import os

from jax.sharding import AbstractMesh, Mesh

from .device_kind import GPUS, platform_of
from .errors import ScheduleError
from .switches import xla_flags

_PIPELINED = "xla_gpu_enable_pipelined_p2p"
_LEVEL = "xla_gpu_experimental_pipeline_parallelism_opt_level"


def check_ring(mesh: Mesh | AbstractMesh, *, what: str, pipe: str = "pipe") -> None:
    """Raise if XLA_FLAGS would make a ring over the pipe axis of this mesh deliver zeros.

    Args:
        what: the program with the ring, for the message.
        pipe: name of the pipe axis.

    Raises:
        ScheduleError: with the flag and the number of rings.
    """
    rings = math.prod(size for axis, size in mesh.shape.items() if axis != pipe)
    flag = find_ring_flag(platform=platform_of(mesh), flags=os.environ.get("XLA_FLAGS", ""))
    if flag is None or mesh.shape.get(pipe, 1) == 1 or rings == 1:
        return
    raise ScheduleError(
        f"{what} passes activations around {rings} rings of {pipe}={mesh.shape[pipe]}, and XLA_FLAGS has --{flag}: XLA "
        "gives zeros where a permute has several rings (openxla/xla issue 45222).",
        fix=f"take --{flag} out of XLA_FLAGS.",
    )


def find_ring_flag(*, platform: str, flags: str) -> str | None:
    """Return the flag that makes XLA decompose cyclic permutes on this platform, as `flag=value`, or None.

    >>> find_ring_flag(platform="gpu", flags="--xla_gpu_enable_pipelined_p2p=true")
    'xla_gpu_enable_pipelined_p2p=true'
    """
    if platform not in GPUS:
        return None
    found = xla_flags(flags)
    if found.get(_PIPELINED, "false").lower() in ("", "true", "1"):
        return f"{_PIPELINED}={found[_PIPELINED] or 'true'}"
    level = found.get(_LEVEL, "0")
    if level != "0" and not level.endswith("_DISABLE"):
        return f"{_LEVEL}={level}"
    return None
