"""A size that does not divide is refused with its quotient, and the nearest that does is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trellax.meshes import ModelError
from trellax.meshes.divisibility import check_divides, nearest_multiples


@given(st.integers(1, 10**9), st.integers(1, 10**6))
def test_nearest_multiples_enclose_the_value(value: int, divisor: int) -> None:
    below, above = nearest_multiples(value, divisor)
    assert below % divisor == above % divisor == 0
    assert below <= value <= above
    assert above - below == (divisor if value % divisor else 0)


def test_size_that_does_not_divide_is_refused_with_the_next_that_does() -> None:
    with pytest.raises(ModelError) as caught:
        check_divides("ffn_size", 10, over="tensor", parts=4, error=ModelError)
    assert str(caught.value) == (
        "ffn_size=10 does not split over tensor=4: 10 / 4 = 2.50.\n"
        "  Fix: set ffn_size=12, or choose a tensor size that divides 10."
    )
    with pytest.raises(ModelError, match=r"over pipe=2 x tensor=2: it must, but 10 / 4 = 2\.50\.\n  Fix: pad it\."):
        check_divides(
            "ffn_size", 10, over="pipe=2 x tensor=2", parts=4, error=ModelError, rule="it must, but ", fix="pad it."
        )


def test_size_that_divides_is_taken() -> None:
    check_divides("ffn_size", 12, over="tensor", parts=4, error=ModelError)
