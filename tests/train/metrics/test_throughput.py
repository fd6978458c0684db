"""Throughput and utilization follow from the time of a step; a utilization that cannot be true is not shown."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from trellax.train.metrics.throughput import Throughput, peak_flops_per_s


@pytest.mark.parametrize(("peak", "expected"), [(None, None), (50.0, 0.2), (10.0, 1.0), (9.0, None)])
def test_utilization_of_an_unknown_peak_or_above_all_of_it_is_none(peak: float | None, expected: float | None) -> None:
    throughput = Throughput(tokens_per_step=10, flops_per_token=2.0, peak_flops_per_s=peak)
    assert throughput.tokens_per_s(2.0) == 5.0
    assert throughput.mfu(2.0) == expected


def test_fake_devices_have_no_peak() -> None:
    assert peak_flops_per_s(Mesh(np.array(jax.devices()), "data")) is None
