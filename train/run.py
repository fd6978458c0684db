"""Build the parts of a run that its loop uses: first state, data, compiled steps, intervals, saver.

`loop.py` takes the steps, `finish.py` ends the run.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from ..configs.changes import Changes
from ..configs.resolved_config import list_hyperparameters, resolve_config, write_resolved_config
from ..configs.run_config import RunConfig
from ..hub.saves.seal import Seal
from ..meshes.processes.messages import is_first
from .bad_steps import BadSteps
from .checkpoints.checkpoints import Checkpoints
from .compiled_steps import CompiledSteps, compile_steps
from .data.corpus import Corpus
from .data.training_data import TrainingData, make_training_data
from .intervals import Intervals, make_intervals
from .metrics import MetricsLog, NoLog, last_loss, read_metrics
from .metrics.noise_scale import NoiseScale
from .metrics.plateau import Plateau
from .metrics.progress import StepProgress, say
from .metrics.recorder import StepRecorder
from .metrics.step_timer import StepTimer
from .metrics.throughput import Throughput, step_throughput
from .preferences.reference import reference_losses
from .profile import StepProfile
from .restore import restore_or_initialize
from .run_folder import HeldFolder
from .saver import StateSaver
from .state import Setup, TrainState

_MIN_TIMED_STEPS = 10
"""Fewest steps in the mean that is logged as step time. The end of a step is seen while the next one runs: on devices
that share the host's cores it is seen late, and the last step, which has no next one, would seem to take no time."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of one run, ready for its first step; the state itself is handed from step to step.

    `last_loss` is the last training loss on record, None before the first step of a run.
    """

    setup: Setup
    data: TrainingData
    compiled: CompiledSteps
    intervals: Intervals
    saver: StateSaver
    plateau: Plateau
    timer: StepTimer
    throughput: Throughput
    profile: StepProfile
    console: Console
    last_loss: float | None

    @property
    def config(self) -> RunConfig:
        """The config of the run."""
        return self.setup.config

    def say(self, text: str) -> None:
        """Print a line on the run's console."""
        say(self.console, text)

    def open_log(self) -> MetricsLog | NoLog:
        """Write the resolved config, and open the log of metrics; lines of steps that will be taken again are dropped.

        Raises:
            OSError: the run folder cannot be written.
        """
        if not is_first():
            return NoLog()
        config = resolve_config(self.config, sizes=self.setup.sizes)
        write_resolved_config(config, say=self.say)
        return MetricsLog(
            self.config.run_folder,
            resumed_step=self.intervals.first_step,
            hyperparameters=list_hyperparameters(config),
            log_to=self.config.train.log_to,
            say=self.say,
        )

    def open_progress(self) -> StepProgress:
        """Return the display of progress, a context manager."""
        return StepProgress(self.console, first_step=self.intervals.first_step, steps=self.intervals.steps)

    def make_recorder(self, log: MetricsLog | NoLog, progress: StepProgress) -> StepRecorder:
        """Return the recorder of finished steps."""
        return StepRecorder(
            log=log,
            progress=progress,
            timer=self.timer,
            throughput=self.throughput,
            intervals=self.intervals,
            bad_steps=BadSteps(self.config, saver=self.saver, say=self.say),
            last_loss=self.last_loss,
            noise=NoiseScale(batch_size=self.config.train.batch_size),
        )


def build_run(
    setup: Setup,
    *,
    corpus: Corpus,
    checkpoints: Checkpoints,
    folder: HeldFolder,
    profile: StepProfile,
    console: Console,
    changes: Changes,
) -> tuple[Run, TrainState]:
    """Return the parts of a run and its first state, which is that of the newest save if there is one.

    Raises:
        TrellaxError: the save is of another run, or the corpus does not give a batch.
    """
    config, tell = setup.config, partial(say, console)
    pairs = corpus.preferences
    reference = reference_losses(setup, pairs, cache=config.run_folder, say=tell) if pairs else None
    # The state comes first, since its save has the sequence of the corpus with which the run continues.
    state, seal = restore_or_initialize(setup, checkpoints, corpus_sha256=corpus.sha256, changes=changes, say=tell)
    first_step = int(state.step)
    first = _find_first_sequence(seal, first_step=first_step, batch_size=config.train.batch_size)
    placed: dict[str, Any] = {"sharding": setup.batch_sharding, "num_context": setup.sizes.context}
    data = make_training_data(config, corpus, **placed, first_sequence=first, reference=reference, say=tell)
    plateau = Plateau(config.train.patience, record=seal.data if seal else None)
    run = Run(
        setup=setup,
        data=data,
        compiled=compile_steps(setup, is_traced=profile.is_wanted, say=tell),
        intervals=make_intervals(config, first_step=first_step),
        saver=StateSaver(setup=setup, checkpoints=checkpoints, folder=folder, data=data, plateau=plateau),
        plateau=plateau,
        timer=StepTimer(window=max(config.train.log_every, _MIN_TIMED_STEPS)),
        throughput=step_throughput(config, setup.mesh),
        profile=profile,
        console=console,
        # A run that is resumed at its end takes no step: its last loss is the one on record.
        last_loss=last_loss(read_metrics(config.run_folder) if seal else [], step=first_step),
    )
    return run, state


def _find_first_sequence(seal: Seal | None, *, first_step: int, batch_size: int) -> int:
    """Return where batch 0 would start, so that batch `first_step` starts where the save's last batch ended.

    It is 0 unless the batch size has changed: 300 sequences seen after 10 steps, then batches of 20, give
    300 - 10 * 20 = 100.
    """
    seen = seal.data.get("sequences") if seal else None
    return 0 if seen is None else seen - first_step * batch_size
