"""Train as a config says: set up the run, take the steps, and write the run folder.

`_loop` has the order of a step. The host never waits for the step it has just started; it records the previous one
while the devices work (`metrics/recorder.py`). Read `run.py` next for the parts of a run.
"""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any, get_args

from rich.console import Console

from ..configs.changes import Changes
from ..configs.run_config import RunConfig
from ..hub.saves.arrays import explain_failure
from ..hub.tokenizer_files import keep_tokenizer
from ..meshes import DataError, RunError
from ..meshes.arguments import check_choice, check_count
from ..meshes.processes.messages import first_does, is_first, require_agreement
from ..meshes.silent_stream import SilentStream
from ..meshes.terminal import terminal_width
from .checkpoints.checkpoints import Checkpoints
from .checkpoints.initial_weights import check_initial_weights
from .data.corpus import Corpus, check_vocabulary, load_corpus
from .data.prefetch import Prefetch
from .data.prepared import find_tokenizer
from .evaluate import validate, validate_sets
from .finish import StepsTaken, finish_run
from .metrics import MetricsLog, NoLog, Summary
from .metrics.progress import say as say_on
from .metrics.recorder import StepRecorder
from .metrics.trackers.open import check_trackers
from .prepare import prepare
from .processes.run_settings import short_hash
from .profile import StepProfile
from .report import describe_run, warn_of_layout
from .run import Run, build_run
from .run_folder import Start, open_run_folder
from .state import Setup, TrainState
from .stop import StopRequest
from .update.optimizer import check_rates
from .xla import prepare_backend


def train(
    config: RunConfig,
    *,
    console: Console | None = None,
    start: Start = "resume",
    changes: Changes = "refuse",
    profile_steps: int = 0,
) -> Summary:
    """Train as the config says and return the summary; messages go to `console` (stderr if left out).

    Training resumes from the newest save of the run folder. SIGTERM, SIGHUP or SIGINT stop it after the current step,
    which is saved; so do the end of `train.seconds` and a plateau (`train.patience`).

    >>> train(load_config("quickstart", "--train.steps 20")).steps
    20

    Args:
        start: whether to resume from the newest save, or to start over.
        changes: whether to resume if the config differs from the saved one in keys that change the result.
        profile_steps: number of steps to trace for a profiler, see `profile.py`.

    Raises:
        TrellaxError: config, corpus or saves have a mistake, or the run cannot continue; earlier saves are kept.
    """
    _check_values(start, changes, profile_steps)
    start_s = time.perf_counter()
    warning = prepare_backend()
    setup = check_start(config, start=start)
    console = _open_console(console, warning)
    profile = StepProfile(config.run_folder, num_steps=profile_steps, say=partial(say_on, console))
    return _train_in_folder(setup, console=console, start=start, changes=changes, profile=profile, start_s=start_s)


def check_start(config: RunConfig, *, start: Start = "resume") -> Setup:
    """Return the setup of a run after the checks that need neither its tokens nor its weights.

    Raises:
        TrellaxError: config, corpus, initial weights or trackers have a mistake.
    """
    setup = prepare(config, corpus="needed")
    check_rates(setup.config.optimizer, steps=setup.config.train.steps)
    check_initial_weights(setup, start=start)
    first_does(lambda: check_trackers(config.train.log_to))
    return setup


def _train_in_folder(
    setup: Setup, *, console: Console, start: Start, changes: Changes, profile: StepProfile, start_s: float
) -> Summary:
    """Lock the run folder, take the steps and finish the run in it."""
    config, say = setup.config, partial(say_on, console)
    kept = {"keep": config.checkpoint.keep, "keep_every": config.checkpoint.keep_every}
    checkpoints = Checkpoints(config.run_folder, **kept, say=say)
    with (
        StopRequest(seconds=config.train.seconds) as stop,
        open_run_folder(config.run_folder, start=start, say=say) as folder,
    ):
        try:
            corpus = _open_corpus(setup, say)
            with checkpoints:
                parts = {"corpus": corpus, "checkpoints": checkpoints, "folder": folder, "console": console}
                run, state = build_run(setup, **parts, profile=profile, changes=changes)
                with run.open_log() as log:
                    taken = take_steps(run, state, log=log, stop=stop)
                    return finish_run(run, taken, log=log, stop=stop, start_s=start_s)
        except OSError as error:
            raise _explain_os_error(error, config, checkpoints) from error


def take_steps(run: Run, state: TrainState, *, log: MetricsLog | NoLog, stop: StopRequest) -> StepsTaken:
    """Take steps until the last one, or until asked to stop.

    Raises:
        DataError: a file of the corpus is lost or changed; the state is saved, unless there are many processes.
        RunError: a loss is not finite or spikes, and the last good state is saved; or the run folder was moved.
        CheckpointError: a state cannot be saved.
    """
    prefetch = Prefetch(run.data.train_batch, end=run.intervals.steps)
    with run.open_progress() as progress, prefetch, closing(run.profile):
        recorder = run.make_recorder(log, progress)
        state = _loop(run, state, batches=prefetch, recorder=recorder, stop=stop)
    return StepsTaken(state=state, last_loss=recorder.last_loss)


def _loop(run: Run, state: TrainState, *, batches: Prefetch, recorder: StepRecorder, stop: StopRequest) -> TrainState:
    """Take the steps of a run, and record, validate and save between them; return the last state."""
    due, timer, profile = run.intervals, run.timer, run.profile
    profile.begin_after(due.first_step, steps=due.steps)
    timer.restart()
    try:
        for step in range(due.first_step + 1, due.steps + 1):
            if stop.is_due(step - 1) or run.plateau.is_reached:
                break
            if profile.begins_with(step):
                recorder.flush(state)
                profile.start(state)
                timer.restart()
            with timer.waiting("input"):
                batch = batches[step - 1]
            # Returns at once: the devices work on this step while the host records the one before.
            state, metrics = run.compiled.train(state, batch, run.setup.peak_rate)
            recorder.add(step, metrics, state)
            if not (due.validates(step) or due.saves(step) or profile.ends_with(step)):
                continue
            # All that follows waits for the devices, so the step is timed and logged first. The line must also be
            # written before the save: a run killed in between would resume after this step and never log it.
            recorder.flush(state)
            if profile.ends_with(step):
                profile.stop(state, run.compiled.train, num_devices=run.setup.mesh.devices.size)
            if due.validates(step):
                loss = validate(state, run.compiled.evaluate, run.data)
                recorder.log_validation(step, loss)
                recorder.log_sets(step, validate_sets(state, run.compiled.evaluate, run.data))
                run.plateau.add(loss)
            if due.saves(step):
                run.saver.save(state)
            timer.restart()
        recorder.flush(state)
    except DataError as error:
        recorder.flush(state)
        raise run.saver.save_before(error, state) from None
    return state


def _check_values(start: Start, changes: Changes, profile_steps: int) -> None:
    check_count("profile_steps", profile_steps, error=RunError, least=0)
    check_choice("start", start, get_args(Start), error=RunError)
    check_choice("changes", changes, get_args(Changes), error=RunError)


def _open_console(console: Console | None, warning: str) -> Console:
    """Return the console of a run, silent on every process but the first, with a first warning printed."""
    stream: Any = SilentStream(sys.stderr)
    console = console or Console(file=stream)
    console.quiet = not is_first()
    if warning:
        say_on(console, warning)
    return console


def _open_corpus(setup: Setup, say: Callable[[object], None]) -> Corpus:
    """Load the corpus of a run, and print the report of the run."""
    config = setup.config
    first_does(lambda: keep_tokenizer(find_tokenizer(config.data), config.run_folder))
    corpus = load_corpus(config.data, vocab_size=config.model.vocab_size, cache=config.run_folder)
    check_vocabulary(corpus, vocab_size=config.model.vocab_size)
    schedule = short_hash(str(setup.schedule))
    sets = {f"validation {name}": f"sha256 {own.sha256[:12]}" for name, own in corpus.sets}
    require_agreement("data", {"corpus": f"sha256 {corpus.sha256[:12]}", **sets, "schedule": schedule})
    say(describe_run(setup, width=terminal_width(sys.stderr)))
    for warning in warn_of_layout(config):
        say(warning)
    say(f"\ncorpus    {corpus.description}, sha256 {corpus.sha256[:12]}")
    for name, own in corpus.sets:
        say(f"validation {name}: {own.description}, sha256 {own.sha256[:12]}")
    return corpus


def _explain_os_error(error: OSError, config: RunConfig, checkpoints: Checkpoints) -> RunError:
    """Return the error of a run whose file the operating system refuses to read or write."""
    return RunError(
        f"{error.filename or config.run_folder} cannot be used: {explain_failure(error)}. {checkpoints.kept_text()}",
        fix="make room, or let it be written, then give the same command again.",
    )
