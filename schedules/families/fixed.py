"""List the families of fixed order, which follows from the sizes alone. `auto.py` compares their schedules."""

from ..family import Family
from .dual_pipe_v import DUAL_PIPE_V
from .gpipe import GPIPE
from .interleaved import INTERLEAVED_1F1B
from .interleaved_zero_bubble import INTERLEAVED_ZB_H1
from .naive import NAIVE
from .one_f_one_b import ONE_F_ONE_B
from .v_shaped import V_HALF, V_MIN, ZB_V
from .zero_bubble import ZB_H1

FIXED: tuple[Family, ...] = (
    NAIVE,
    GPIPE,
    ONE_F_ONE_B,
    INTERLEAVED_1F1B,
    ZB_H1,
    INTERLEAVED_ZB_H1,
    ZB_V,
    V_HALF,
    V_MIN,
    DUAL_PIPE_V,
)
"""In the order in which tables show them."""
