"""Layers go from the model's order into stages and back: each once, in order, and none is dropped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.meshes import ScheduleError
from trellax.pipeline import check_layers, natural_order, stages_from_layers

Golden = Callable[[str, str], None]

LAYERS = {"kernel": jnp.arange(1, 8 * 3 + 1).reshape(8, 3), "bias": jnp.arange(1, 9)}

MISFITS: dict[str, dict[str, Any]] = {
    "fewer_layers_than_ranks": {"num_layers": 2, "num_ranks": 4},
    "layers_over_ranks": {"num_layers": 30, "num_ranks": 4},
    "layers_over_chunks": {"num_layers": 12, "num_ranks": 4, "num_chunks": 2},
    "layers_dropped": {"num_layers": 30, "num_ranks": 4, "layers_per_stage": (7, 7, 7, 7)},
    "too_few_stages": {"num_layers": 30, "num_ranks": 4, "layers_per_stage": (15, 15)},
    "empty_stage": {"num_layers": 30, "num_ranks": 4, "layers_per_stage": (0, 10, 10, 10)},
}


@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(1, 1), (4, 1), (2, 2)])
def test_equal_stages_are_a_reshape_of_the_natural_order(num_ranks: int, num_chunks: int) -> None:
    stages = stages_from_layers(LAYERS, num_ranks=num_ranks, num_chunks=num_chunks)
    reshaped = jax.tree.map(lambda leaf: leaf.reshape(num_chunks, num_ranks, -1, *leaf.shape[1:]), LAYERS)
    assert jax.tree.all(jax.tree.map(np.array_equal, stages, reshaped))
    assert jax.tree.all(jax.tree.map(np.array_equal, natural_order(stages), LAYERS))


@pytest.mark.parametrize(("num_ranks", "num_chunks", "counts"), [(3, 1, (3, 4, 1)), (2, 2, (1, 2, 2, 3))])
def test_unequal_stages_hold_every_layer_once_and_zeros(
    num_ranks: int, num_chunks: int, counts: tuple[int, ...]
) -> None:
    stages = stages_from_layers(LAYERS, num_ranks=num_ranks, num_chunks=num_chunks, layers_per_stage=counts)
    found = []
    for stage, count in enumerate(counts):
        bias = stages["bias"][stage // num_ranks, stage % num_ranks]
        found += bias[:count].tolist()
        assert not bias[count:].any()
    assert found == list(range(1, 9))
    back = natural_order(stages, layers_per_stage=counts)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, LAYERS))


def test_natural_order_takes_empty_arrays_and_gradients_of_whole_numbers() -> None:
    stages = {"empty": jnp.zeros((1, 2, 2, 0)), "count": np.zeros((1, 2, 2), jax.dtypes.float0)}
    found = natural_order(stages, layers_per_stage=(2, 1))
    assert {name: leaf.shape for name, leaf in found.items()} == {"empty": (3, 0), "count": (3,)}


@pytest.mark.parametrize("name", MISFITS)
def test_layers_that_do_not_divide_are_refused_with_the_equation(name: str, golden: Golden) -> None:
    with pytest.raises(ScheduleError) as caught:
        check_layers(**MISFITS[name])
    golden(f"errors/pipeline/split_{name}.txt", str(caught.value))


@pytest.mark.parametrize("counts", [(1, 3, 4), (2, 4, 2), (4, 4), (3, 3, 3)])
def test_natural_order_by_other_counts_is_refused(counts: tuple[int, ...]) -> None:
    """An index past the end read the last layer again."""
    stages = stages_from_layers(LAYERS, num_ranks=3, layers_per_stage=(2, 5, 1))
    with pytest.raises(ScheduleError, match=f"but {len(counts)} stages of"):
        natural_order(stages, layers_per_stage=counts)
