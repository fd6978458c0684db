"""Arrays come back from any folder, and a folder that lacks what a load needs is never taken for a save."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.configs import RunConfig
from trellax.hub.saves.arrays import load_arrays, require_all, save_arrays
from trellax.meshes import CheckpointError
from trellax.train import Checkpoints
from trellax.train.checkpoints import store as checkpoint

Tiny = Callable[..., RunConfig]


@pytest.mark.parametrize("name", ["plain", "lr=[3]", "what?", "all*"])
def test_arrays_come_back_from_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    arrays = {
        "params.kernel": jax.device_put(np.arange(32, dtype=np.float32).reshape(16, 2), split),
        "params.bias": jax.device_put(jnp.arange(4, dtype=jnp.bfloat16), jax.NamedSharding(mesh, jax.P())),
        "step": jax.device_put(np.int32(7), jax.NamedSharding(mesh, jax.P())),
    }
    folder = tmp_path / name / "7.part"
    save_arrays(folder, arrays)()
    require_all(folder, arrays)
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole) for key, leaf in arrays.items()}
    found = load_arrays(folder, shapes)
    assert all(np.array_equal(found[key], arrays[key]) for key in arrays)


def test_save_that_could_not_be_loaded_is_not_sealed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    def save_without_merging(folder: Path, arrays: Any) -> Callable[[], None]:
        wait = save_arrays(folder, arrays)

        def finish() -> None:
            wait()
            (folder / "state" / "manifest.ocdbt").unlink()

        return finish

    params, config = {"embed": jnp.ones(8), "blocks": {"kernel": jnp.ones(8)}}, tiny()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_params(params, config)
        checkpoints.wait()
        (tmp_path / "checkpoints" / "0").rename(tmp_path / "checkpoints" / "3")
        monkeypatch.setattr(checkpoint, "save_arrays", save_without_merging)
        checkpoints.save_params(params, config)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    golden("errors/hub/checkpoint_not_loadable.txt", f"CheckpointError: {caught.value}".replace(str(tmp_path), "RUN"))
