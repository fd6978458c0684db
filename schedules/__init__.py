"""Pipeline schedules as data, without jax: which rank runs which action in which tick.

Read `schedule.py` for the value, `family.py` for what is known of a schedule by name, `registry.py` for the names.
"""

from .action import Action, Kind
from .csv_format import load_schedule, schedule_from_csv, schedule_to_csv
from .explain import explain_difference, find_formula
from .family import Family
from .formula import Formula
from .orders import schedule_from_orders
from .picture import draw_picture
from .placement import Placement
from .registry import SCHEDULES, build_schedule, find_family
from .schedule import Schedule
from .simulate import Clock, Span, Timing, count_messages, simulate, time_actions
from .stage_cost import StageCost
from .trace import trace_from_schedule
from .vocab import Vocab

__all__ = [
    "SCHEDULES",
    "Action",
    "Clock",
    "Family",
    "Formula",
    "Kind",
    "Placement",
    "Schedule",
    "Span",
    "StageCost",
    "Timing",
    "Vocab",
    "build_schedule",
    "count_messages",
    "draw_picture",
    "explain_difference",
    "find_family",
    "find_formula",
    "load_schedule",
    "schedule_from_csv",
    "schedule_from_orders",
    "schedule_to_csv",
    "simulate",
    "time_actions",
    "trace_from_schedule",
]
