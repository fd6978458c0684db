"""An interpreter of lowered tables: it runs them on names in place of arrays, and records which names were read."""

from typing import Any, Literal

import jax
from trellax.pipeline.lowering.tables import (
    BACKWARD,
    FORWARD,
    IDLE,
    INPUT_GRAD,
    NONE,
    WEIGHT_GRAD,
    Steady,
    Tables,
    Transfer,
    Turns,
)
from trellax.schedules import Action, Schedule
from trellax.schedules.placement import Link


class Interpreter:
    """Runs tables on names, and records which names each action read."""

    def __init__(self, tables: Tables, schedule: Schedule) -> None:
        self.tables, self.schedule = tables, schedule
        ranks = range(schedule.num_ranks)
        self.activations: list[list[Any]] = [[None] * tables.num_activation_slots for _ in ranks]
        self.gradients: list[list[Any]] = [[None] * tables.num_gradient_slots for _ in ranks]
        self.saved: list[list[Any]] = [[None] * tables.num_residual_slots for _ in ranks]
        self.read: dict[Action, tuple[Any, ...]] = {}
        self.order: list[Action] = []
        self.taken: list[Any] = []

    def run(self) -> "Interpreter":
        for number in range(self.tables.num_turns):
            self._turn(self._row(number))
        return self

    def run_pairs(self, *, is_last_late: bool) -> "Interpreter":
        """Run the steady state in the order of `loop.py`, and what is before and after it turn by turn."""
        steady = self.tables.steady
        assert steady is not None
        for number in range(steady.start):
            self._turn(self._row(number), left_to_pairs=steady.backward if number == steady.start - 1 else ())
        for number in range(steady.start, steady.stop, 2):
            before, ahead, back = (self._row(number + offset) for offset in (-1, 0, 1))
            self._pair(steady, before, ahead, back, is_last_late=is_last_late)
        row = self._row(steady.stop - 1)
        self._arrive(row.backward, self.gradients, self._sent(row.backward, self.gradients, -1, steady.backward))
        for number in range(steady.stop, self.tables.num_turns):
            self._turn(self._row(number))
        return self

    def _row(self, number: int) -> Turns:
        return jax.tree.map(lambda column: column[number], self.tables.turns)

    def _turn(self, turn: Turns, *, left_to_pairs: tuple[int, ...] = ()) -> None:
        self._enter(turn)
        self._act_all(turn)
        self._last(turn)
        self._first_back(turn)
        for transfers, buffers, step in ((turn.forward, self.activations, 1), (turn.backward, self.gradients, -1)):
            assert set(transfers) == set(self._links(step))
            for offset, transfer in transfers.items():
                if transfer.is_active and not (step == -1 and offset in left_to_pairs):
                    self._arrive(transfers, buffers, self._sent(transfers, buffers, step, (offset,)))

    def _pair(self, steady: Steady, before: Turns, ahead: Turns, back: Turns, *, is_last_late: bool) -> None:
        gradients = self._sent(before.backward, self.gradients, -1, steady.backward)
        if steady.ends == "always":
            self._first_back(ahead)
        if steady.ends == "sometimes":
            self._enter(ahead)
        self._act_all(ahead)
        self._arrive(before.backward, self.gradients, gradients)
        activations = self._sent(back.forward, self.activations, 1, steady.forward)
        if steady.ends == "always":
            # The backward reads dy before `last` writes, wherever `last` stands.
            seen = [list(buffer) for buffer in self.gradients]
            if not is_last_late:
                self._last(ahead)
            self._enter(back)
            self._act_all(back, gradients=seen)
            if is_last_late:
                self._last(ahead)
        else:
            if steady.ends == "sometimes":
                self._last(ahead)
                self._first_back(ahead)
                self._enter(back)
            self._act_all(back)
            if steady.ends == "sometimes":
                self._last(back)
                self._first_back(back)
        self._arrive(back.forward, self.activations, activations)

    def _act_all(self, turn: Any, *, gradients: list[list[Any]] | None = None) -> None:
        for rank in range(self.schedule.num_ranks):
            self._act(turn.at_rank(rank), rank, self.gradients if gradients is None else gradients)

    def _act(self, turn: Turns, rank: int, gradients: list[list[Any]]) -> None:
        kind, residuals = turn.compute.kind, turn.compute.residuals
        if kind == IDLE:
            return
        stage, microbatch = int(turn.compute.stage), int(turn.compute.microbatch)
        assert self.schedule.placement.stages_of(rank)[turn.compute.chunk] == stage
        if kind == FORWARD:
            action, slot = Action(stage=stage, kind="F", microbatch=microbatch), turn.activations.read
            self.read[action] = (None if slot == NONE else self.activations[rank][slot],)
            _put(self.saved[rank], residuals, ("saved", stage, microbatch))
            _put(self.activations[rank], turn.activations.write, ("y", stage, microbatch))
            if turn.ends.last == NONE:
                _put(self.gradients[rank], turn.gradients.loss, ("dy", stage, microbatch))
        elif kind == WEIGHT_GRAD:
            action = Action(stage=stage, kind="W", microbatch=microbatch)
            self.read[action] = (self.saved[rank][residuals],)
        else:
            is_half = kind == INPUT_GRAD
            assert is_half or kind == BACKWARD
            action = Action(stage=stage, kind="I" if is_half else "B", microbatch=microbatch)
            self.read[action] = (gradients[rank][turn.gradients.read], self.saved[rank][residuals])
            _put(self.gradients[rank], turn.gradients.write, ("dy", stage - 1, microbatch))
            if is_half:
                self.saved[rank][residuals] = ("halved", stage, microbatch)
        self.order.append(action)

    def _enter(self, turn: Turns) -> None:
        for buffer, slot in zip(self.activations, turn.activations.first, strict=True):
            _put(buffer, slot, ("y", -1, int(turn.ends.first)))

    def _first_back(self, turn: Turns) -> None:
        self._take("first_back", turn.ends.first_back, self.gradients, turn.gradients.first_back)

    def _take(self, name: str, microbatch: Any, buffers: list[list[Any]], slots: Any) -> None:
        assert (slots != NONE).sum() == (microbatch != NONE)
        found = [buffer[slot] for buffer, slot in zip(buffers, slots, strict=True) if slot != NONE]
        self.taken += [(name, int(microbatch), *value) for value in found]

    def _last(self, turn: Turns) -> None:
        self._take("last", turn.ends.last, self.activations, turn.activations.last)
        if turn.ends.last != NONE:
            loss_grad = ("dy", self.schedule.num_stages - 1, int(turn.ends.last))
            rank = self.schedule.placement.ranks[-1]
            _put(self.gradients[rank], turn.gradients.loss[rank], loss_grad)

    def _links(self, step: Literal[1, -1]) -> dict[int, list[Link]]:
        return self.schedule.placement.links(step)

    def _sent(
        self, transfers: dict[int, Transfer], buffers: list[list[Any]], step: Literal[1, -1], offsets: tuple[int, ...]
    ) -> dict[int, list[Any]]:
        """Return by side the names that reach each rank. None where nobody sends: the permute delivers zeros or NaN."""
        arrived: dict[int, list[Any]] = {}
        for offset in offsets:
            slots = zip(transfers[offset].send, buffers, strict=True)
            sent = [None if slot == NONE else buffer[slot] for slot, buffer in slots]
            source_of = {receiver: sender for sender, receiver in self._links(step)[offset]}
            arrived[offset] = [sent[source_of[rank]] if rank in source_of else None for rank in range(len(buffers))]
        return arrived

    def _arrive(self, transfers: dict[int, Transfer], buffers: list[list[Any]], arrived: dict[int, list[Any]]) -> None:
        for offset, names in arrived.items():
            for slot, buffer, name in zip(transfers[offset].receive, buffers, names, strict=True):
                _put(buffer, slot, name)


def _put(buffer: list[Any], slot: int, value: Any) -> None:
    if slot != NONE:
        buffer[slot] = value
