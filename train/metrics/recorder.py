"""Record the metrics of each training step one step late, so that the devices never wait for the host.

The host starts a step and returns at once; reading its loss would block until it is done. So the host reads the loss
of the step before, while the devices work on the new one:

    host    | start 5 | record 4 | start 6 | record 5 | start 7 ...
    devices |   step 4    |    step 5     |     step 6     | ...
"""

from collections.abc import Mapping

from ..bad_steps import BadSteps
from ..intervals import Intervals
from ..state import TrainState
from ..step import StepMetrics
from .log import MetricsLog, NoLog, set_metrics
from .memory import peak_memory_bytes
from .noise_scale import NoiseScale
from .progress import StepProgress
from .step_timer import StepTimer
from .throughput import Throughput


class StepRecorder:
    """Log each finished step, show it as progress, and stop the run if it was bad.

    Args:
        last_loss: the last training loss on record before the first step, None if there is none.
        noise: the noise scale of the steps.
    """

    def __init__(
        self,
        *,
        log: MetricsLog | NoLog,
        progress: StepProgress,
        timer: StepTimer,
        throughput: Throughput,
        intervals: Intervals,
        bad_steps: BadSteps,
        last_loss: float | None,
        noise: NoiseScale,
    ) -> None:
        self._log, self._progress, self._timer = log, progress, timer
        self._throughput, self._intervals, self._bad_steps = throughput, intervals, bad_steps
        self._noise = noise
        self._pending: tuple[int, StepMetrics] | None = None
        self.last_loss = last_loss
        """Loss of the last recorded step whose update was taken."""

    def add(self, step: int, metrics: StepMetrics, state: TrainState) -> None:
        """Record the pending step, and keep this one, which the devices have just begun, pending.

        Raises:
            RunError, CheckpointError: as `flush` does.
        """
        self.flush(state)
        self._pending = step, metrics

    def flush(self, state: TrainState) -> None:
        """Wait for the pending step, if there is one, and record it.

        Args:
            state: the newest state, which is saved if the step was bad.

        Raises:
            RunError: the step was bad and stops the run, after its state is saved; or the run folder was moved.
            CheckpointError: the state cannot be saved.
        """
        pending, self._pending = self._pending, None
        if pending:
            self._record(*pending)
            self._bad_steps.check(*pending, state)

    def log_validation(self, step: int, loss: float) -> None:
        """Log the validation loss after a step."""
        self._log.write(step, {"val_loss": loss})

    def log_sets(self, step: int, losses: Mapping[str, float]) -> None:
        """Log the losses of further validation sets after a step, each under its name."""
        if losses:
            self._log.write(step, set_metrics(losses))

    def _record(self, step: int, metrics: StepMetrics) -> None:
        with self._timer.waiting("device"):
            # Blocks until the devices have finished the step.
            loss, is_taken = float(metrics.loss), bool(metrics.taken)
        self._timer.end_step()
        step_time_s = self._timer.step_time_s
        tokens_per_s = self._throughput.tokens_per_s(step_time_s)
        router = {name: float(value) for name, value in metrics.router.items()}
        rewards = {name: float(value) for name, value in metrics.preferences.items()}
        self._progress.advance(step, loss=loss, tokens_per_s=tokens_per_s, expert_peak=router.get("expert_peak"))
        if is_taken:
            self.last_loss = loss
            self._noise.add({name: float(value) for name, value in metrics.noise.items()})
        if self._intervals.logs(step) or not is_taken:
            self._log.write(
                step,
                {
                    "loss": loss,
                    "z_loss": None if metrics.z_loss is None else float(metrics.z_loss),
                    "grad_norm": float(metrics.grad_norm),
                    "lr": float(metrics.lr),
                    "tokens_per_s": tokens_per_s,
                    "step_time_s": step_time_s,
                    **self._timer.breakdown_s,
                    "mfu": self._throughput.mfu(step_time_s),
                    "peak_memory_bytes": peak_memory_bytes(),
                    **router,
                    "noise_scale": self._noise.sequences,
                    **rewards,
                    **{f"block.{name}": float(value) for name, value in metrics.block.items()},
                    "skipped": None if is_taken else 1,
                },
            )
