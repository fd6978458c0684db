"""Compile the two programs of a run, its training step and its validation, before the first batch is read."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from ..meshes.processes.messages import require_one_program
from .state import Setup
from .step import make_eval_step, make_train_step, step_options
from .xla import CompilerOption, compile_for

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class CompiledSteps:
    """The compiled programs of a run.

    `train` maps (state, batch, peak_rate) to (state, metrics) and consumes the state; `evaluate` maps (state, batch)
    to the batch's part of the validation loss.
    """

    train: Callable[..., Any]
    evaluate: Callable[..., Any]


def compile_steps(setup: Setup, *, is_traced: bool = False, say: Say) -> CompiledSteps:
    """Compile both programs, and say how long each took.

    Args:
        is_traced: whether a profiler is to find the instructions of the training step.

    Raises:
        RunError: the processes of the run would run different programs.
    """
    more = step_options(setup, is_traced=is_traced)
    return CompiledSteps(
        train=_compile("train step", make_train_step(setup), setup, setup.peak_rate_shape, more=more, say=say),
        evaluate=compile_eval_step(setup, say=say),
    )


def compile_eval_step(setup: Setup, *, say: Say) -> Callable[..., Any]:
    """Compile the validation alone: (state, batch) -> loss."""
    return _compile("validation", make_eval_step(setup), setup, say=say)


def _compile(
    what: str,
    function: Any,
    setup: Setup,
    *rest: jax.ShapeDtypeStruct,
    say: Say,
    more: Mapping[str, CompilerOption] | None = None,
) -> Callable[..., Any]:
    start_s = time.perf_counter()
    lowered = function.lower(setup.shapes, setup.batch_shapes, *rest)
    # Processes with different programs would wait in each other's collectives forever.
    require_one_program(what, lowered)
    compiled = compile_for(lowered, platform=setup.mesh.devices.flat[0].platform, more=more)
    say(f"compiled  {what} in {time.perf_counter() - start_s:.1f} s")
    return compiled
