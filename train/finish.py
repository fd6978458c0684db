"""End a run: save its last state, validate it, and write the summary and the plot."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ..meshes import RunError
from ..meshes.processes.messages import is_first, text_of_first
from .evaluate import validate, validate_sets
from .metrics import NO_SCHEDULE, MetricsLog, NoLog, Summary, draw_loss, read_metrics, read_summary, write_summary
from .metrics.expert_load import explain_load
from .metrics.log import set_metrics
from .metrics.plateau import PLATEAU
from .metrics.summary import keep_throughput
from .run import Run
from .state import TrainState
from .stop import BUDGET, StopRequest


@dataclass(frozen=True, kw_only=True)
class StepsTaken:
    """The result of the loop: the last state, and the last training loss, None if the run has taken no step."""

    state: TrainState
    last_loss: float | None


def finish_run(run: Run, taken: StepsTaken, *, log: MetricsLog | NoLog, stop: StopRequest, start_s: float) -> Summary:
    """Save and validate the last state, write summary.json and loss.png, and return the summary.

    A run that a signal has stopped is saved and not validated.

    Raises:
        RunError: the validation loss is not finite, after all files are written; or the run folder was moved.
        CheckpointError: the last state cannot be saved.
        DataError: a file of the corpus is lost or changed; the state is saved.
    """
    folder, state, saver = run.config.run_folder, taken.state, run.saver
    step = int(state.step)
    saver.save(state)
    # Of many processes the first decides, since all of them validate or none does.
    ended = text_of_first(stop.signal_name) or (PLATEAU if run.plateau.is_reached else "")
    if ended == PLATEAU:
        run.say(str(run.plateau))
    val_loss = validate(state, run.compiled.evaluate, run.data) if ended in ("", BUDGET, PLATEAU) else None
    sets = {} if val_loss is None else validate_sets(state, run.compiled.evaluate, run.data)
    saver.checkpoints.wait()
    # If the folder was moved away, writing the files below would create it again.
    saver.folder.check()
    summary = _sum_up(run, taken, ended=ended or "done", val_loss=val_loss, start_s=start_s)
    summary = replace(summary, final_val_losses={**sets})
    if is_first():
        # A finished run that is started again has logged its last validation already.
        for losses in ({} if val_loss is None else {"val_loss": val_loss}, set_metrics(sets)):
            if losses and {"step": step, **losses} not in read_metrics(folder):
                log.write(step, losses)
        write_summary(summary)
        draw_loss(folder)
    saver.folder.check()
    if is_first() and (load := explain_load(read_metrics(folder), run.config.model)):
        run.say(load)
    check_last_validation(val_loss, step=step, folder=folder)
    return summary


def check_last_validation(loss: float | None, *, step: int, folder: Path) -> None:
    """Raise if the last validation loss is not finite, so that the saved parameters are useless; None passes.

    Raises:
        RunError: the loss is not finite.
    """
    if loss is None or math.isfinite(loss):
        return
    raise RunError(
        f"the validation loss after the last step, {step}, is {loss:.4g}: its update broke the parameters. They "
        f"are saved as step {step} in {folder}.",
        fix="start over with a lower --optimizer.learning_rate, --fresh and --force, which keeps what is there.",
    )


def _sum_up(run: Run, taken: StepsTaken, *, ended: str, val_loss: float | None, start_s: float) -> Summary:
    folder, schedule, step = run.config.run_folder, run.setup.schedule, int(taken.state.step)
    summary = Summary(
        ended=ended,
        steps=step,
        final_train_loss=taken.last_loss,
        final_val_loss=val_loss,
        tokens_per_s=run.throughput.tokens_per_s(run.timer.mean_step_time_s),
        wall_time_s=time.perf_counter() - start_s,
        mesh=str(run.setup.sizes),
        schedule=schedule.name if schedule.num_ranks > 1 else NO_SCHEDULE,
        folder=str(folder),
    )
    is_without_steps = step == run.intervals.first_step
    return keep_throughput(summary, read_summary(folder)) if is_without_steps else summary
