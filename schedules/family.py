"""A family of schedules as a value: its builder and everything that callers ask about it before a schedule exists.

No code outside this value asks for a schedule by name. A new schedule is one file in `families/` that ends in a
`Family`, and one entry in `registry.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..meshes.arguments import check_choice
from ..meshes.errors import ScheduleError
from .formula import Formula
from .placement import Shape
from .schedule import Schedule
from .stage_cost import StageCost
from .vocab import Vocab

Option = Literal["num_chunks", "clock", "vocab", "max_in_flight", "stages"]
"""An argument that a builder may take besides `num_ranks` and `num_microbatches`."""

PeakInFlight = Callable[[int, int, Vocab], int]
"""The most microbatches of a chunk that any rank holds in lockstep, by number of ranks, chunks per rank, and vocab.

It bounds steps of any number of microbatches; a step with fewer holds all of them.
"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Schedules of one name in all sizes; calling the family builds one.

    >>> SCHEDULES["gpipe"](num_ranks=2, num_microbatches=2).num_ticks
    6

    Args:
        build: returns the schedule for `num_ranks`, `num_microbatches` and the options of `takes`.
        takes: options of `build`; `build_schedule` leaves out the others.
        chunks: chunks of layers per rank: always one, always two, always several, or any number.
        placement: shape in which stages are placed on ranks, or "searched" if only the schedule itself knows it.
        backward: "whole", "split" into input and weight gradient, or "either", as the costs decide.
        order: "fixed" by the sizes, or "searched" for given times of the stages.
        peak_in_flight: "all" where a rank holds every microbatch of the step, a function where a formula is known, None
            if it can only be counted in the schedule itself.
        bubble: returns the bubble fraction that the literature states, given the schedule and a rank's times.
        is_paired: whether all ranks run a forward and a whole backward in most ticks, a steady state in which the
            executor can overlap messages, and then holds one microbatch more.
        counterpart: name of the family with the same order for the other number of chunks, one or several.
        run_ahead: builds the order of separate programs that run ahead while results travel, as Megatron does.

    Raises:
        ScheduleError: a field is not one of its choices, or `chunks` contradicts `takes`.
    """

    name: str
    build: Callable[..., Schedule]
    takes: frozenset[Option] = frozenset()
    chunks: Literal["one", "two", "several", "any"] = "one"
    placement: Shape | Literal["searched"] = "loop"
    backward: Literal["whole", "split", "either"] = "whole"
    order: Literal["fixed", "searched"] = "fixed"
    peak_in_flight: PeakInFlight | Literal["all"] | None = None
    bubble: Callable[[Schedule, StageCost], Formula] | None = None
    is_paired: bool = False
    counterpart: str | None = None
    run_ahead: Callable[..., Schedule] | None = None

    def __post_init__(self) -> None:
        check_choice("chunks", self.chunks, ("one", "two", "several", "any"), error=ScheduleError)
        check_choice("placement", self.placement, (*get_args(Shape), "searched"), error=ScheduleError)
        check_choice("backward", self.backward, ("whole", "split", "either"), error=ScheduleError)
        check_choice("order", self.order, ("fixed", "searched"), error=ScheduleError)
        if self.peak_in_flight is not None and not callable(self.peak_in_flight):
            check_choice("peak_in_flight", self.peak_in_flight, ("all",), error=ScheduleError)
        if ("num_chunks" in self.takes) != (self.chunks in ("several", "any")):
            raise ScheduleError(
                f"family {self.name!r} has chunks={self.chunks!r} and takes {sorted(self.takes)}.",
                fix="let it take num_chunks exactly if it has chunks='several' or 'any'.",
            )

    def __call__(self, **sizes: Any) -> Schedule:
        """Build a schedule of these sizes; arguments and errors are those of `build`."""
        return self.build(**sizes)

    def accepted(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that `build` takes: the sizes, and the options in `takes`."""
        names = {"num_ranks", "num_microbatches", *self.takes}
        return {name: value for name, value in given.items() if name in names}

    @property
    def default_chunks(self) -> int:
        """Chunks per rank where nothing else is asked for: 2 if there must be several, else 1."""
        return 2 if self.chunks in ("two", "several") else 1

    def allows_chunks(self, num_chunks: int) -> bool:
        """Return whether a rank can have this number of chunks."""
        allowed = {"one": num_chunks == 1, "two": num_chunks == 2, "several": num_chunks > 1, "any": True}
        return allowed[self.chunks]

    def check_chunks(self, num_chunks: int) -> None:
        """Raise unless a rank can have this number of chunks.

        Raises:
            ScheduleError: it cannot; the fix names the family for that number, if there is one.
        """
        if self.allows_chunks(num_chunks):
            return
        if self.chunks == "two":
            raise ScheduleError(
                f"schedule {self.name!r} has two chunks a rank, not {num_chunks}: there and back in a V.",
                fix="set 2 chunks.",
            )
        if self.chunks == "several":
            other = f", or use {self.counterpart!r}" if self.counterpart else ""
            raise ScheduleError(
                f"schedule {self.name!r} with {num_chunks} chunks a rank has nothing to interleave.",
                fix=f"set 2 chunks or more{other}.",
            )
        raise ScheduleError(
            f"schedule {self.name!r} has one chunk a rank, not {num_chunks}.",
            fix="set 1 chunk, or use an interleaved one.",
        )

    def check_limit(self, max_in_flight: int | None) -> None:
        """Raise if a limit of microbatches in flight is given to a family that takes none.

        Raises:
            ScheduleError: it is.
        """
        if max_in_flight is not None and "max_in_flight" not in self.takes:
            raise ScheduleError(
                f"max_in_flight={max_in_flight} is for the schedule auto alone; {self.name} takes no limit.",
                fix="build 'auto', or leave max_in_flight out.",
            )
