"""A mesh spec is read, resolved and refused by arithmetic alone."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.meshes import MeshError, MeshSpec
from trellax.meshes.spec import AXES

Golden = Callable[[str, str], None]
SIZES = st.integers(1, 16)

BAD_TEXTS = {
    "unknown_axis": "tenso=2",
    "repeated_axis": "data=2,data=4",
    "word_for_a_size": "data=two",
    "no_size": "data",
    "zero": "pipe=0",
    "below_minus_one": "tensor=-2",
    "two_open": "data=-1,tensor=-1",
}

MISFITS: dict[str, tuple[dict[str, Any], int]] = {
    "too_few_devices": ({"data": 3, "tensor": 4}, 8),
    "too_many_devices": ({"data": 2}, 8),
    "no_size_fits": ({"data": 3, "tensor": 5, "pipe": 7}, 8),
    "open_axis_has_no_whole_size": ({"tensor": 3, "pipe": -1}, 8),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_text_that_is_not_a_mesh_is_refused(name: str, golden: Golden) -> None:
    with pytest.raises(MeshError) as caught:
        MeshSpec.parse(BAD_TEXTS[name])
    golden(f"errors/meshes/mesh_{name}.txt", str(caught.value))


@pytest.mark.parametrize("name", MISFITS)
def test_mesh_that_does_not_fit_shows_the_equation(name: str, golden: Golden) -> None:
    sizes, num_devices = MISFITS[name]
    with pytest.raises(MeshError) as caught:
        MeshSpec(**sizes).resolve(num_devices=num_devices)
    golden(f"errors/meshes/mesh_{name}.txt", str(caught.value))


@pytest.mark.parametrize("size", [2.0, True, "2"])
def test_size_must_be_a_whole_number(size: Any) -> None:
    with pytest.raises(MeshError, match="is not a whole number"):
        MeshSpec(data=size)


@pytest.mark.parametrize("text", ["", " ", "data=1", "pipe = 1 , tensor=1,"])
def test_axes_left_out_have_size_one(text: str) -> None:
    assert MeshSpec.parse(text) == MeshSpec(data=1, tensor=1, pipe=1)


def test_tensor_is_the_fastest_axis() -> None:
    assert AXES == ("pipe", "data", "tensor")


@settings(derandomize=True, deadline=None)
@given(data=SIZES, tensor=SIZES, pipe=SIZES, hidden=st.sampled_from([None, *AXES]))
def test_one_hidden_size_is_found_again(data: int, tensor: int, pipe: int, hidden: str | None) -> None:
    spec = MeshSpec(data=data, tensor=tensor, pipe=pipe)
    asked = spec.resize(**{hidden: -1}) if hidden else spec
    assert asked.resolve(num_devices=data * tensor * pipe) == spec


@settings(derandomize=True, deadline=None)
@given(data=SIZES, tensor=SIZES, pipe=SIZES)
def test_text_of_a_spec_parses_back(data: int, tensor: int, pipe: int) -> None:
    spec = MeshSpec(data=data, tensor=tensor, pipe=pipe)
    assert MeshSpec.parse(str(spec).replace(" ", ",")) == spec


@settings(derandomize=True, deadline=None)
@given(data=SIZES, tensor=SIZES, pipe=SIZES, num_devices=st.integers(1, 64))
def test_resolving_uses_all_devices_or_refuses(data: int, tensor: int, pipe: int, num_devices: int) -> None:
    spec = MeshSpec(data=data, tensor=tensor, pipe=pipe)
    if spec.num_devices == num_devices:
        assert spec.resolve(num_devices=num_devices) == spec
    else:
        with pytest.raises(MeshError, match=f"{num_devices} are visible"):
            spec.resolve(num_devices=num_devices)
