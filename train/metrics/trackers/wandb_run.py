"""A run in Weights & Biases, by the package `wandb`; with WANDB_MODE=offline it is a folder that `wandb sync` sends.

The project is that of WANDB_PROJECT, or trellax. A step's history has one row: what W&B has of a step it keeps, so a
step that is taken again after a resume changes nothing there.
"""

import os
from collections.abc import Mapping

import wandb

from .tracker import Ended, RunFacts, Tracker, finite_values


class WandbRun(Tracker):
    """A run in Weights & Biases.

    Args:
        run_id: id of the run to go on with; None begins one, which gets the lines that are there.

    Raises:
        Exception: of wandb: it cannot begin the run.
    """

    def __init__(self, facts: RunFacts, run_id: str | None) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "trellax"),
            name=facts.name,
            dir=facts.folder,
            config=dict(facts.hyperparameters),
            id=run_id,
            resume=None if run_id is None else "allow",
            # What a run prints stays as it is, and two runs of one process are two runs.
            settings=wandb.Settings(console="off"),
            reinit="create_new",
        )
        self.id, self.place = self._run.id, self._run.url or self._run.dir
        # An offline folder cannot tell what another one holds: each has the steps of its command.
        if run_id is None or self._run.resumed:
            for line in facts.lines:
                if line["step"] >= self._run.step:
                    self.write(line["step"], finite_values(line))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of one step."""
        if values:
            self._run.log(dict(values), step=step)

    def close(self, ended: Ended) -> None:
        """End the run, and wait until all is sent or written."""
        self._run.finish(exit_code=0 if ended == "whole" else 1)


def check_login() -> None:
    """Raise unless metrics can be sent, or the mode is offline; on a terminal wandb asks for the key.

    Raises:
        Exception: of wandb: there is no API key.
    """
    if os.environ.get("WANDB_MODE") not in ("offline", "dryrun", "disabled"):
        wandb.login()
