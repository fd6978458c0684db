"""Checks of arguments refuse values of any size in a sentence."""

from collections.abc import Callable
from typing import Any

import pytest
from trellax.meshes import MeshError
from trellax.meshes.arguments import check_choice, check_count, check_number

HUGE = 10**5000
CHECKS: dict[str, tuple[Callable[..., None], Any]] = {
    "count_far_below": (check_count, -HUGE),
    "count_of_letters": (check_count, "x" * HUGE.bit_length()),
    "huge_choice": (lambda name, value, **how: check_choice(name, value, ("on", "off"), **how), HUGE),
    "huge_number": (check_number, HUGE),
    "number_far_below": (check_number, -HUGE),
    "nan": (check_number, float("nan")),
}


@pytest.mark.parametrize("name", CHECKS)
def test_value_of_any_size_is_refused_in_a_short_sentence(name: str) -> None:
    check, value = CHECKS[name]
    with pytest.raises(MeshError, match=r"^n=") as caught:
        check("n", value, error=MeshError)
    assert len(str(caught.value)) < 200
