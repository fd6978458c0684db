"""List the families of fixed order, which follows from the sizes alone. `auto.py` compares their schedules."""

from ..family import Family
from .gpipe import GPIPE
from .interleaved import INTERLEAVED_1F1B
from .interleaved_zero_bubble import INTERLEAVED_ZB_H1
from .naive import NAIVE
from .one_f_one_b import ONE_F_ONE_B
from .zero_bubble import ZB_H1

FIXED: tuple[Family, ...] = (NAIVE, GPIPE, ONE_F_ONE_B, INTERLEAVED_1F1B, ZB_H1, INTERLEAVED_ZB_H1)
"""In the order in which tables show them."""
