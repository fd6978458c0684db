"""All-reduces over tensor in the compiled step of a transformer, for each layer and microbatch.

Forward, attention and feed-forward each sum one output. Backward, each sums one input gradient: query, key and value
enter their split region together, and so do gate and up.
"""

from functools import cache
from typing import Any

import jax
import pytest
from trellax.layers import Remat
from trellax.programs.groups import read_groups
from trellax.programs.hlo import HloModule, Instruction, leaves

from ..law import Attention, pipeline_step, small_model

NUM_SUMS_OF_ENDS = 1 + 4
"""Of a microbatch: the embedding's rows; of the loss the maximum, normalizer, target's logit and input gradient."""


@cache
def sums_over_tensor(mesh: str, style: str, attention: Attention, remat: Remat) -> tuple[tuple[str, int], ...]:
    """The name in the program, and the number of arrays, of every all-reduce in a loop over neighbours along tensor."""
    config = small_model(style=style, attention=attention)
    step = pipeline_step(config, mesh=mesh, schedule="1f1b", num_microbatches=4, num_sequences=8, remat=remat)
    text: Any = jax.jit(step.run).lower(step.params, step.batch).compile().as_text()
    program = HloModule.parse(text)
    inside = program.in_loops()
    found = (i for computation, i in program.instructions() if computation.name in inside)
    return tuple((i.op_name, len(list(leaves(i.type)))) for i in found if is_over_tensor(i))


def is_over_tensor(instruction: Instruction) -> bool:
    if instruction.opcode.removesuffix("-start") != "all-reduce":
        return False
    # Devices are numbered over (pipe, data, tensor), two along tensor.
    groups = read_groups(instruction, num_devices=8) or ()
    return all(group == (group[0], group[0] + 1) for group in groups)


def num_sums(action: str, *case: Any) -> int:
    return sum(number for name, number in sums_over_tensor(*case) if f"/{action}/while/" in name)


@pytest.mark.parametrize("style", ["gpt", "llama"])
@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("mesh", ["1x2x2", "2x2x2"])
def test_a_layer_sums_twice_forward_and_twice_backward(mesh: str, remat: Remat, style: str) -> None:
    assert [num_sums(action, mesh, style, "mha", remat) for action in ("forward", "backward")] == [2, 2]


def test_full_rematerialization_sums_again_what_its_backward_reads() -> None:
    """Attention's output, from which the feed-forward's input is made; no gradient reads the feed-forward's output."""
    case = ("2x2x2", "llama", "mha", "full")
    assert [num_sums(action, *case) for action in ("forward", "backward")] == [2, 2 + 1]


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("dots", 0), ("full", 1)])
def test_without_a_pipeline_it_is_the_same(remat: Remat, again: int) -> None:
    found = sums_over_tensor("1x2x1", "llama", "mha", remat)
    assert sum(number for _, number in found) == 2 + 2 + again + NUM_SUMS_OF_ENDS


def test_heads_that_several_devices_use_cost_the_sums_of_their_weight_gradients() -> None:
    """One key/value head on two devices: two arrays more, of the key's and of the value's kernel."""
    case = ("2x2x2", "llama", "mqa", "dots")
    assert [num_sums(action, *case) for action in ("forward", "backward")] == [2, 2 + 2]
