"""Weights in four bits are read as what they say, by each device its own alone; files that do not fit are refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from trellax.hub.mxfp4 import widen
from trellax.hub.read import open_weights, read_weights
from trellax.meshes import WeightsError

from .hf_doubles import Tensors, merge, say
from .hub import shapes_of
from .quantized import EXPERTS, D, F, write_quantized
from .test_read import spy

GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def by_the_format(nibble: int, scale: int) -> float:
    """A sign, two bits of exponent (bias 1) and one of mantissa, times a power of two (OCP MX 1.0)."""
    sign, exponent, mantissa = -1 if nibble & 8 else 1, nibble >> 1 & 3, nibble & 1
    number = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return sign * number * 2.0 ** (scale - 127)


def test_every_weight_is_that_of_the_format() -> None:
    scales = [0, 1, 100, 127, 140, 252]
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    for scale in scales:
        found = widen(blocks, np.full((1, 1, 16), scale, np.uint8)).astype(np.float64).reshape(256, 2)
        expected = [[by_the_format(byte & 15, scale), by_the_format(byte >> 4, scale)] for byte in range(256)]
        assert np.array_equal(found, expected)
    assert np.isnan(widen(blocks, np.full((1, 1, 16), 255, np.uint8)).astype(np.float32)).all()


def test_each_device_reads_its_own_experts_and_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, sizes = write_quantized(tmp_path / "model"), spy(monkeypatch)
    shapes = shapes_of(tmp_path / "model", "tensor=2,expert=2")
    params = read_weights(tmp_path / "model", shapes)["blocks"]["mlp"]
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts."
        gate_up, down = expected[f"{name}gate_up_proj"], expected[f"{name}down_proj"]
        for own, kernel in (("gate", gate_up[..., 0::2]), ("up", gate_up[..., 1::2]), ("down", down)):
            assert np.array_equal(np.asarray(params[own]["kernel"][layer]), kernel.astype(np.float32))
    # A quarter of each kernel of each layer, for each of four devices.
    assert sizes.count(EXPERTS * D * F // 4) == 3 * 2 * 4
    assert max(sizes) <= max(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def replace_by(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Any]:
    def put(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name])

    return lambda folder: merge(folder, put)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no_scales": lambda folder: merge(folder, lambda own: own.pop(f"{GATE_UP}_scales")),
    "other_scales": replace_by(f"{DOWN}_scales", lambda leaf: leaf[:, :-1]),
    "other_blocks": replace_by(f"{DOWN}_blocks", lambda leaf: leaf[..., :8]),
    "no_bytes": replace_by(f"{GATE_UP}_blocks", lambda leaf: leaf.astype(np.float32)),
    "too_few": say(num_local_experts=8),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_before_a_weight_is_read(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    write_quantized(tmp_path / "model")
    DAMAGES[damage](tmp_path / "model")
    shapes, sizes = shapes_of(tmp_path / "model"), spy(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError) as caught:
        open_weights("model", shapes)
    golden(f"errors/hub/mxfp4_{damage}.txt", str(caught.value))
    assert sizes == []
