"""Decide after which steps a run logs, validates and saves."""

from dataclasses import dataclass

from ..configs.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """The steps of one call of `train`, and the intervals between its logs, validations and saves.

    Steps are counted from 1: the first of this call is `first_step + 1`, the last is `steps`.
    """

    first_step: int
    steps: int
    log_every: int
    eval_every: int
    save_every: int

    def logs(self, step: int) -> bool:
        """Return whether the metrics of this step are logged; those of the first and the last step always are."""
        return step % self.log_every == 0 or step in (self.first_step + 1, self.steps)

    def validates(self, step: int) -> bool:
        """Return whether a validation follows this step."""
        return self._is_between(step, self.eval_every)

    def saves(self, step: int) -> bool:
        """Return whether a save follows this step."""
        return self._is_between(step, self.save_every)

    def _is_between(self, step: int, every: int) -> bool:
        # Not after the last step: the end of a run validates and saves anyway.
        return every > 0 and step % every == 0 and step < self.steps


def make_intervals(config: RunConfig, *, first_step: int) -> Intervals:
    """Return the intervals of a config for a call that starts after `first_step` steps."""
    return Intervals(
        first_step=first_step,
        steps=config.train.steps,
        log_every=config.train.log_every,
        eval_every=config.train.eval_every,
        save_every=config.checkpoint.every,
    )
