"""Frozen parameters: no gradient, no product for one, and the gradients of all others as on one device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import pytest
from trellax.layers import ModelConfig
from trellax.programs.hlo import HloModule, leaves

from .law import Answer, answer_of, beyond, errors_of, global_norm, one_device, pipeline_step, small_model

TOLERANCE = 2e-5
"""As in test_law.py."""

MODEL = small_model(style="llama", attention="gqa", embeddings="untied")

CASES: dict[str, dict[str, Any]] = {
    "one device": {"mesh": "1x1x1", "schedule": "gpipe"},
    "data and tensor, layers gathered": {"mesh": "2x2x1", "schedule": "gpipe", "shard": "layer"},
    "zero bubble": {"mesh": "2x2x2", "schedule": "zb-h1", "vocab": "split"},
    "zero bubble, remat": {"mesh": "1x2x4", "schedule": "zb-h1", "remat": "dots"},
    "sequence, gathered once": {"mesh": "2x2x2", "schedule": "1f1b", "sequence": "on", "shard": "step"},
    "chunks": {"mesh": "1x1x4", "schedule": "interleaved-1f1b", "num_chunks": 2},
}


def freezes_all_but(*names: str) -> Callable[[str], bool]:
    return lambda path: not any(name in path for name in names)


def frozen_answer(config: ModelConfig, num_sequences: int, is_frozen: Callable[[str], bool]) -> Answer:
    """Return the reference without the gradients of frozen parameters."""
    return keep_trained(one_device(config, num_sequences), is_frozen)


def keep_trained(whole: Answer, is_frozen: Callable[[str], bool]) -> Answer:
    """Return an answer without the gradients of frozen parameters."""

    def keep(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        is_layer, rest = name.startswith("blocks."), name.removeprefix("blocks.")
        return None if is_frozen(f"stages.{rest}" if is_layer else f"shared.{name}") else leaf

    grads = jax.tree_util.tree_map_with_path(keep, whole.grads)
    return replace(whole, grads=grads, norm=float(global_norm(grads)))


@pytest.mark.parametrize("trained", ["query,up", "key.kernel,head.table", "scale", "embed.table"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_what_is_trained_equal_those_of_one_device(case: str, trained: str) -> None:
    is_frozen = freezes_all_but(*trained.split(","))
    step = pipeline_step(MODEL, num_microbatches=4, num_sequences=16, frozen=is_frozen, **CASES[case])
    expected = frozen_answer(MODEL, 16, is_frozen)
    assert beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE) == {}


@pytest.mark.parametrize("targets", [(), ("key", "up")])
@pytest.mark.parametrize("case", CASES)
def test_adapters_have_the_gradients_of_one_device(case: str, targets: tuple[str, ...]) -> None:
    config = replace(MODEL, lora_rank=3, lora_alpha=6.0, lora_targets=targets)
    step = pipeline_step(config, num_microbatches=4, num_sequences=16, **CASES[case])
    assert step.model.fns.frozen is not None
    expected = frozen_answer(config, 16, step.model.fns.frozen)
    assert len(jax.tree.leaves(expected.grads)) == 2 * (len(targets) or 7)
    assert beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE) == {}


def test_adapters_of_a_key_head_that_tensor_ranks_share_have_the_gradients_of_one_device() -> None:
    config = replace(small_model(style="gpt", attention="mqa"), lora_rank=2, lora_targets=("key", "value", "out"))
    step = pipeline_step(config, num_microbatches=4, num_sequences=16, **CASES["zero bubble"])
    assert step.model.fns.frozen is not None
    expected = frozen_answer(config, 16, step.model.fns.frozen)
    assert beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE) == {}


@pytest.mark.parametrize("targets", [(), ("key", "up", "down")])
@pytest.mark.parametrize("case", CASES)
def test_magnitudes_have_the_gradients_of_one_device(case: str, targets: tuple[str, ...]) -> None:
    config = replace(MODEL, lora_rank=3, lora_alpha=6.0, lora_targets=targets, lora_magnitude="on")
    step = pipeline_step(config, num_microbatches=4, num_sequences=16, **CASES[case])
    assert step.model.fns.frozen is not None
    expected = frozen_answer(config, 16, step.model.fns.frozen)
    assert len(jax.tree.leaves(expected.grads)) == 3 * (len(targets) or 7)
    assert beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE) == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_adapters_on_kernels_of_four_bits_have_the_gradients_of_one_device(case: str) -> None:
    config = replace(MODEL, lora_rank=3, lora_alpha=6.0, lora_targets=("key", "up", "down"), lora_base="nf4")
    step = pipeline_step(config, num_microbatches=4, num_sequences=16, **CASES[case])
    assert step.model.fns.frozen is not None
    expected = frozen_answer(config, 16, step.model.fns.frozen)
    assert len(jax.tree.leaves(expected.grads)) == 6
    assert beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE) == {}


@pytest.mark.slow
def test_no_kernel_of_four_bits_is_kept_wide() -> None:
    """A layer's kernels are made wide where they are used; the stack of a rank's layers never is, nor in a buffer."""
    case: dict[str, Any] = CASES["zero bubble"] | {"num_microbatches": 4, "num_sequences": 16}
    found = {}
    for base in ("plain", "nf4"):
        step = pipeline_step(replace(MODEL, lora_rank=3, lora_base=base), **case)
        run: Any = step.run
        program = HloModule.parse(run.lower(step.params, step.batch).compile().as_text())
        # Of a rank: 4 layers, 64 features in, and those of up and gate side by side on one of two tensor ranks.
        stacked = 4, MODEL.hidden_size, MODEL.ffn_size
        arrays = (leaf for _, instruction in program.instructions() for leaf in leaves(instruction.type))
        found[base] = any(array.dims[-3:] == stacked for array in arrays)
    assert found == {"plain": True, "nf4": False}


def weight_products(is_frozen: Callable[[str], bool] | None, **case: Any) -> set[tuple[int, ...]]:
    """Return the shapes of kernels and tables that a compiled step makes by a matmul."""
    # 80 or 160 tokens of a microbatch on a device: no dimension of a kernel, so no activation has the shape of one.
    step = pipeline_step(MODEL, num_microbatches=4, num_sequences=40, frozen=is_frozen, **case)
    run: Any = step.run
    program = HloModule.parse(run.lower(step.params, step.batch).compile().as_text())
    matrices = {
        sorted_shape(leaf.sharding.shard_shape(leaf.shape)[-2:])
        for path, leaf in jax.tree_util.tree_leaves_with_path(step.params)
        if path[-1].key in ("kernel", "table")
    }
    found = {
        sorted_shape(array.dims)
        for _, instruction in program.instructions()
        if instruction.opcode == "dot"
        for array in leaves(instruction.type)
    }
    return matrices & found


def sorted_shape(shape: Any) -> tuple[int, ...]:
    return tuple(sorted(shape))


@pytest.mark.parametrize("case", ["one device", "zero bubble", "zero bubble, remat", "sequence, gathered once"])
def test_frozen_weights_have_no_products_in_the_compiled_step(case: str) -> None:
    assert weight_products(lambda name: not name.endswith("scale"), **CASES[case]) == set()


def test_weights_that_are_trained_have_products_in_the_compiled_step() -> None:
    assert (64, 64) in weight_products(None, **CASES["one device"])
