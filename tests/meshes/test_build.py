"""Devices sit where the links want them: tensor ranks next to each other, pipeline stages far apart."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from trellax.meshes import MeshError, MeshSpec, abstract_mesh, build_mesh, mesh_sizes
from trellax.meshes.spec import AXES


def test_tensor_ranks_are_neighbours_and_pipe_is_outermost() -> None:
    mesh = build_mesh(MeshSpec(data=2, tensor=2, pipe=2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert mesh.axis_names == AXES
    assert ids.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_order_of_the_given_devices_does_not_matter() -> None:
    spec = MeshSpec(data=2, tensor=4)
    assert build_mesh(spec, devices=jax.devices()[::-1]) == build_mesh(spec)


def test_open_axis_takes_what_is_left() -> None:
    assert build_mesh(MeshSpec(data=-1, tensor=2)).shape == {"pipe": 1, "data": 4, "tensor": 2}


def test_axes_are_automatic_on_real_and_abstract_meshes() -> None:
    spec = MeshSpec(data=2, tensor=2, pipe=2)
    for mesh in (build_mesh(spec), abstract_mesh(spec)):
        assert mesh.axis_types == (AxisType.Auto,) * 3


def test_abstract_mesh_may_be_larger_than_the_machine() -> None:
    spec = MeshSpec(data=16, tensor=8, pipe=32)
    assert mesh_sizes(abstract_mesh(spec)) == spec


def test_sizes_of_a_mesh_are_the_spec_it_was_built_from() -> None:
    spec = MeshSpec(data=2, tensor=4)
    assert mesh_sizes(build_mesh(spec)) == spec


def test_axes_that_a_mesh_lacks_have_size_one() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert mesh_sizes(mesh) == MeshSpec(data=8)


MISTAKES: dict[str, Callable[[], Any]] = {
    "more_than_visible": lambda: build_mesh(MeshSpec(data=3, tensor=4)),
    "fewer_given": lambda: build_mesh(MeshSpec(data=8), devices=jax.devices()[:4]),
    "abstract_with_open_axis": lambda: abstract_mesh(MeshSpec(data=-1, tensor=4)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mesh_that_cannot_be_built_is_refused(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(MeshError) as caught:
        MISTAKES[name]()
    golden(f"errors/meshes/build_{name}.txt", str(caught.value))


def test_missing_platform_is_reported_in_a_sentence() -> None:
    script = (
        "from trellax.meshes import MeshSpec, build_mesh\ntry: build_mesh(MeshSpec())\nexcept ValueError as e: print(e)"
    )
    env = os.environ | {"JAX_PLATFORMS": "foo", "PYTHONPATH": str(Path(__file__).parents[2] / ".src")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("jax cannot start on JAX_PLATFORMS='foo': Unable to initialize backend 'foo'")
    assert done.stdout.endswith("\n  Fix: unset JAX_PLATFORMS, set it to cpu, or install jax for that platform.\n")
