"""A utilization that cannot be true is not shown."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from trellax.train.speed import peak_flops_per_s, utilization


@pytest.mark.parametrize(("peak", "expected"), [(None, None), (50.0, 0.2), (10.0, 1.0), (9.0, None)])
def test_utilization_of_an_unknown_peak_or_above_all_of_it_is_none(peak: float | None, expected: float | None) -> None:
    assert utilization(5.0, flops_per_token=2.0, peak=peak) == expected


def test_fake_devices_have_no_peak() -> None:
    assert peak_flops_per_s(Mesh(np.array(jax.devices()), "data")) is None
