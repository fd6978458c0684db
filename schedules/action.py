"""One action of a schedule: a stage runs a forward or a backward of one microbatch. Read `grid.py` next."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ..meshes.arguments import check_choice, check_count
from ..meshes.errors import ScheduleError

Kind = Literal["F", "B", "I", "W"]
"""F forward, B backward; a split backward is I, the gradient of the inputs, and W, the gradient of the weights."""

_PATTERN = re.compile(r"(\d+)([A-Z])(\d+)")
_KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}


@dataclass(frozen=True, kw_only=True, order=True)
class Action:
    """One computation, printed as `2F0`: stage 2, forward, microbatch 0.

    >>> Action.parse("2F0")
    Action(stage=2, kind='F', microbatch=0)

    Raises:
        ScheduleError: the kind is unknown, or a number is negative or not an integer.
    """

    stage: int
    kind: Kind
    microbatch: int

    def __post_init__(self) -> None:
        # A schedule has thousands of actions, so valid ones skip the checks that build messages.
        if self.kind not in _KINDS:
            check_choice("kind", self.kind, _KINDS, error=ScheduleError)
        is_whole = type(self.stage) is int and type(self.microbatch) is int
        if not is_whole or self.stage < 0 or self.microbatch < 0:
            check_count("stage", self.stage, error=ScheduleError, least=0)
            check_count("microbatch", self.microbatch, error=ScheduleError, least=0)

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Parse an action written as `2F0`.

        Raises:
            ScheduleError: the text is not a stage, a kind and a microbatch.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None or match[2] not in _KINDS:
            raise ScheduleError(
                f"{text!r} is not an action; one is a stage, a kind ({', '.join(_KINDS)}) and a microbatch.",
                fix="write 2F0 for the forward of microbatch 0 on stage 2.",
            )
        return cls(stage=int(match[1]), kind=_KINDS[match[2]], microbatch=int(match[3]))

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"
