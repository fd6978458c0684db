"""A split linear layer is the whole layer: values, gradients and the collectives it states."""

from typing import Any

import numpy as np
import pytest
from flax import nnx
from trellax.layers import ColumnLinear, RowLinear

from .sharded import Probe, collectives, differing, mesh_of, normal

LAYERS: dict[str, Any] = {"column": ColumnLinear, "row": RowLinear}
MESHES = ["tensor=1", "tensor=2", "tensor=4", "tensor=8", "data=2,tensor=4"]
X = normal(2, 4, 16)


def probe(name: str, **options: Any) -> Probe:
    return Probe.of(lambda: LAYERS[name](16, 24, dim="ffn", rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("bias", ["on", "off"])
@pytest.mark.parametrize("name", LAYERS)
def test_linear_is_a_matrix_product(name: str, bias: str) -> None:
    layer = probe(name, bias=bias)
    expected = X @ layer.params["kernel"] + (layer.params["bias"] if bias == "on" else 0)
    assert differing(layer.answer(X)["y"], expected) == {}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", LAYERS)
def test_linear_on_any_mesh_matches_one_device(name: str, mesh: str) -> None:
    layer = probe(name)
    assert differing(layer.answer(X, mesh=mesh_of(mesh)), layer.answer(X)) == {}


@pytest.mark.parametrize(("name", "expected"), [("column", []), ("row", [("all-reduce", (2 * 4, 24))])])
def test_only_the_row_layer_communicates_and_only_once(name: str, expected: list[Any]) -> None:
    found = collectives(probe(name).program(X, mesh=mesh_of("tensor=4")))
    assert [(one.kind, one.shape) for one in found] == expected


def test_bfloat16_is_for_computing_and_not_for_parameters() -> None:
    layer = probe("column", dtype="bfloat16")
    answer = layer.answer(X)
    assert (str(answer["y"].dtype), str(answer["grads"]["kernel"].dtype)) == ("bfloat16", "float32")


@pytest.mark.parametrize("name", LAYERS)
def test_bias_starts_at_zero_and_kernel_at_its_spread(name: str) -> None:
    layer = LAYERS[name](256, 256, dim="ffn", std=0.5, rngs=nnx.Rngs(0))
    assert float(abs(layer.bias[...]).max()) == 0.0
    assert np.std(layer.kernel[...]) == pytest.approx(0.5, rel=0.02)
