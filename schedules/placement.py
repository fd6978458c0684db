"""Placement of stages: which rank holds which stage, as which of its chunks.

    loop, 4 ranks x 2 chunks          v, 4 ranks x 2 chunks
    rank      0  1  2  3              rank      0  1  2  3
    chunk 0   0  1  2  3  -->         chunk 0   0  1  2  3  -->
    chunk 1   4  5  6  7  -->         chunk 1   7  6  5  4  <--

In a loop every activation moves one rank on, from the last rank to the first too. In a V the second chunk climbs back:
the middle stages 3 and 4 share a rank, and so do the first and the last ("Pipeline Parallelism with Controllable
Memory", Qi et al. 2024, section 3). Read `schedule.py` next.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, get_args

from ..meshes.arguments import check_choice, check_count
from ..meshes.errors import ScheduleError

Shape = Literal["loop", "v"]
"""Names of placements in all sizes; the module draws them."""

_STEPS: tuple[Literal[1, -1], ...] = (1, -1)

Link = tuple[int, int]
"""Ranks that send and receive."""


@dataclass(frozen=True)
class Placement:
    """The rank of every stage, from the first stage to the last.

    A rank's chunks are its stages in the model's order. Neighbouring stages are on one rank or on neighbouring ranks,
    where the last rank is a neighbour of the first.

    >>> Placement.of("v", num_ranks=4, num_chunks=2).stages_of(0)
    (0, 7)

    Raises:
        ScheduleError: ranks hold different numbers of stages, a rank number is left out, or neighbouring stages are on
            ranks that are none.
    """

    ranks: tuple[int, ...]

    @classmethod
    def of(cls, shape: Shape, *, num_ranks: int, num_chunks: int = 1) -> "Placement":
        """Return a placement by its name.

        Raises:
            ScheduleError: the name is unknown, or a size is below 1.
        """
        check_choice("placement", shape, get_args(Shape), error=ScheduleError)
        check_count("num_ranks", num_ranks, error=ScheduleError)
        check_count("num_chunks", num_chunks, error=ScheduleError)
        return _place(shape, num_ranks, num_chunks)

    @classmethod
    def resolve(cls, given: "Placement | Shape", *, num_ranks: int, num_chunks: int = 1) -> "Placement":
        """Return a placement given by name or as a value, after a check of its sizes.

        Raises:
            ScheduleError: the name is unknown, or the placement is one of other sizes.
        """
        if not isinstance(given, Placement):
            return cls.of(given, num_ranks=num_ranks, num_chunks=num_chunks)
        if (given.num_ranks, given.num_chunks) != (num_ranks, num_chunks):
            raise ScheduleError(
                f"the placement is of {given.num_ranks} ranks x {given.num_chunks} chunks, not {num_ranks} x "
                f"{num_chunks}.",
                fix='give the placement of the schedule, schedule.placement, or "loop" or "v".',
            )
        return given

    def __post_init__(self) -> None:
        if not isinstance(self.ranks, tuple):
            raise ScheduleError(
                f"a placement is a tuple of ranks, not {self.ranks!r}.",
                fix='give the rank of every stage, (0, 1, 1, 0), or use Placement.of("v", num_ranks=2, num_chunks=2).',
            )
        for stage, rank in enumerate(self.ranks):
            check_count(f"ranks[{stage}]", rank, error=ScheduleError, least=0)
        counts = [self.ranks.count(rank) for rank in range(self.num_ranks)]
        if len(set(counts)) != 1 or sum(counts) != len(self.ranks):
            raise ScheduleError(
                f"a placement of {len(self.ranks)} stages gives ranks 0 to {self.num_ranks - 1} {counts} stages.",
                fix="give every rank from 0 on equally many.",
            )
        for stage, (rank, after) in enumerate(zip(self.ranks, self.ranks[1:], strict=False)):
            if (after - rank) % self.num_ranks not in (0, 1, self.num_ranks - 1):
                raise ScheduleError(
                    f"stages {stage} and {stage + 1} are on ranks {rank} and {after} of {self.num_ranks}: "
                    "no neighbours.",
                    fix="place each stage on the rank of the stage before, or on a neighbour of it.",
                )

    @cached_property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return max(self.ranks, default=0) + 1

    @cached_property
    def num_chunks(self) -> int:
        """Number of stages of each rank."""
        return len(self.ranks) // self.num_ranks

    @cached_property
    def _stages(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(stage for stage, own in enumerate(self.ranks) if own == rank) for rank in range(self.num_ranks)
        )

    @cached_property
    def _chunks(self) -> tuple[int, ...]:
        return tuple(self._stages[rank].index(stage) for stage, rank in enumerate(self.ranks))

    def rank_of(self, stage: int) -> int:
        """Return the rank that holds a stage."""
        return self.ranks[stage]

    def chunk_of(self, stage: int) -> int:
        """Return which of its rank's stages a stage is."""
        return self._chunks[stage]

    def stage_at(self, rank: int, chunk: int) -> int:
        """Return the stage that a rank holds as a chunk."""
        return self._stages[rank][chunk]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank by chunk."""
        return self._stages[rank]

    @cached_property
    def is_loop(self) -> bool:
        """Whether stage s is on rank s % num_ranks."""
        return all(rank == stage % self.num_ranks for stage, rank in enumerate(self.ranks))

    @cached_property
    def has_ring(self) -> bool:
        """Whether messages go round: every rank sends to the same side."""
        return any(len(links) == self.num_ranks for step in _STEPS for links in self.links(step).values())

    def offset(self, stage: int, step: Literal[1, -1]) -> int:
        """Return how many ranks on a message from a stage to the next or the one before is received: -1, 0 or 1."""
        ahead = self.ranks[stage + step] - self.ranks[stage]
        if self.is_loop:
            # With 2 ranks the other one is on both sides; one direction for all messages takes one permute.
            return step if ahead else 0
        return ahead if abs(ahead) <= 1 else -1 if ahead > 0 else 1

    def links(self, step: Literal[1, -1]) -> dict[int, list[Link]]:
        """Return the links that activations (step 1) or gradients (step -1) take, by the offset of the receiver."""
        found: dict[int, set[Link]] = {}
        for stage, rank in enumerate(self.ranks):
            if 0 <= stage + step < len(self.ranks) and (offset := self.offset(stage, step)):
                found.setdefault(offset, set()).add((rank, self.ranks[stage + step]))
        return {offset: sorted(found[offset]) for offset in sorted(found, reverse=True)}


LOOP = Placement(())
"""Stands for the loop of a schedule's own sizes."""


@lru_cache(maxsize=256)
def _place(shape: Shape, num_ranks: int, num_chunks: int) -> Placement:
    return Placement(tuple(rank_in(shape, stage, num_ranks=num_ranks) for stage in range(num_ranks * num_chunks)))


def rank_in(shape: Shape, stage: int, *, num_ranks: int) -> int:
    """Return the rank that holds a stage in a shape, whatever the number of stages."""
    chunk, place = divmod(stage, num_ranks)
    return num_ranks - 1 - place if shape == "v" and chunk % 2 else place
