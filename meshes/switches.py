"""Refuse jax config options under which our programs cannot run, before they are traced, and read XLA_FLAGS."""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax

from .errors import TrellaxError

Switch = Literal["jax_disable_jit", "jax_auto_pcast", "jax_enable_x64", "jax_transfer_guard_host_to_device"]


@dataclass(frozen=True, kw_only=True)
class _Refusal:
    values: tuple[Any, ...]
    why: str
    fix: str


_REFUSALS: dict[Switch, _Refusal] = {
    "jax_disable_jit": _Refusal(
        values=(True,),
        why="this is one compiled program: operation by operation, devices cannot do different things at once",
        fix="call it inside `with jax.disable_jit(False):`, and look inside with jax.debug.print.",
    ),
    "jax_auto_pcast": _Refusal(
        values=(False,),
        why="without it not even a constant can be added to what differs between devices",
        fix='leave it on: jax.config.update("jax_auto_pcast", True).',
    ),
    "jax_enable_x64": _Refusal(
        values=(True,),
        why="tokens and positions here are 32 bits wide, and jax mixes no widths of indices",
        fix="call it inside `with jax.enable_x64(False):`, or unset JAX_ENABLE_X64.",
    ),
    "jax_transfer_guard_host_to_device": _Refusal(
        values=("disallow", "disallow_explicit"),
        why="requests come from the host, so every step sends some",
        fix='call it inside `with jax.transfer_guard_host_to_device("allow"):`.',
    ),
}


def check_switches(*switches: Switch, error: type[TrellaxError]) -> None:
    """Raise `error` if one of these jax config options has a value under which our program cannot run.

    Raises:
        TrellaxError: of the class `error`, with the option, the reason and what to set instead.
    """
    for switch in switches:
        # Not every release of jax has every option.
        value, refusal = getattr(jax.config, switch, None), _REFUSALS[switch]
        if value in refusal.values:
            raise error(f"{switch}={value!r}: {refusal.why}.", fix=refusal.fix)


def xla_flags(text: str | None = None) -> dict[str, str]:
    """Return the flags of a text, or of the environment's XLA_FLAGS, by name; one without a value has "".

    Of several flags with one name XLA takes the last.

    >>> xla_flags("--xla_dump_to=a --xla_dump_to=b")
    {'xla_dump_to': 'b'}
    """
    return dict(re.findall(r"--(\w+)(?:=(\S*))?", os.environ.get("XLA_FLAGS", "") if text is None else text))
