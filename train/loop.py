"""The training loop: read a config, build everything, take the steps, leave a run folder behind.

The host never waits for the step it has just started: it looks at the step before, while the devices work. Read
`run.py` next for what a run does between its steps.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from rich.console import Console

from ..configs.changes import Changes
from ..configs.check import CorpusFiles, check_run
from ..configs.run_config import RunConfig
from ..hub.saves.arrays import explain_failure
from ..hub.tokenizer_files import keep_tokenizer
from ..meshes import RunError, build_mesh, use_fake_devices
from ..meshes.arguments import check_choice, check_count
from ..meshes.build import visible_devices
from ..meshes.processes.messages import first_does, is_first, require_agreement
from ..meshes.terminal import terminal_width
from .checkpoints.checkpoints import Checkpoints
from .checkpoints.initial_weights import check_initial_weights
from .data.corpus import Corpus, check_vocabulary, load_corpus
from .metrics import Summary
from .outputs import SilentStream
from .plan_warnings import warn_of_layout
from .processes.facts import digest
from .profile import StepProfile
from .progress import say as say_on
from .report import describe
from .run import Run
from .run_folder import Start, open_run_folder
from .state import Setup
from .stop import StopRequest
from .xla import prepare_backend


def prepare(config: RunConfig, *, corpus: CorpusFiles = "later") -> Setup:
    """Return the run made ready on its mesh, every check passed, before any array is made.

    Args:
        corpus: whether the files of the corpus must be there.

    Raises:
        TrellaxError: the config does not fit itself or the devices.
    """
    if config.run.fake_devices:
        use_fake_devices(config.run.fake_devices)
    spec = check_run(config, num_devices=len(visible_devices()), corpus=corpus)
    setup = Setup(config, build_mesh(spec))
    _ = setup.model, setup.schedule
    return setup


def train(
    config: RunConfig,
    *,
    console: Console | None = None,
    start: Start = "resume",
    changes: Changes = "refuse",
    profile_steps: int = 0,
) -> Summary:
    """Train as the config says and return what came of it; talks on `console` (stderr if left out).

    Goes on from the newest save of the run folder. SIGTERM, SIGHUP or SIGINT end it after the step it is in, saved.

    Args:
        start: whether to go on from what is saved, or to start over.
        changes: whether a config may go on that differs in what matters from the one that was saved.
        profile_steps: steps to trace, see `profile.py`.

    Raises:
        TrellaxError: a mistake in config, corpus or saves, or a run that cannot go on; what was saved is still there.
    """
    _check_values(start, changes, profile_steps)
    start_s = time.perf_counter()
    warning = prepare_backend()
    setup = prepare(config, corpus="needed")
    check_initial_weights(setup, start=start)
    console = _open_console(console, warning)
    say = partial(say_on, console)
    kept = {"keep": config.checkpoint.keep, "keep_every": config.checkpoint.keep_every}
    checkpoints = Checkpoints(config.run_folder, **kept, say=say)
    with StopRequest() as stop, open_run_folder(config.run_folder, start=start, say=say) as held:
        try:
            corpus = _open_corpus(setup, say)
            with checkpoints:
                profile = StepProfile(config.run_folder, num_steps=profile_steps, say=say)
                run = Run(setup, corpus, checkpoints, held, console=console, changes=changes, profile=profile)
                with run.open_log() as log:
                    run.take_steps(stop, log)
                    return run.finish(stop, log, start_s=start_s)
        except OSError as error:
            raise _refused(error, config, checkpoints) from error


def _open_console(console: Console | None, warning: str) -> Console:
    """Return what the run talks on, one process of many, with the first thing said."""
    stream: Any = SilentStream(sys.stderr)
    console = console or Console(file=stream)
    console.quiet = not is_first()
    if warning:
        say_on(console, warning)
    return console


def _check_values(start: Start, changes: Changes, profile_steps: int) -> None:
    check_count("profile_steps", profile_steps, error=RunError, least=0)
    check_choice("start", start, get_args(Start), error=RunError)
    check_choice("changes", changes, get_args(Changes), error=RunError)


def _open_corpus(setup: Setup, say: Callable[[object], None]) -> Corpus:
    """Return the corpus of a run, and say what the run is."""
    config = setup.config
    first_does(lambda: keep_tokenizer(config.data.tokenizer, config.run_folder))
    corpus = load_corpus(config.data, vocab_size=config.model.vocab_size, cache=config.run_folder)
    check_vocabulary(corpus, vocab_size=config.model.vocab_size)
    require_agreement("data", {"corpus": f"sha256 {corpus.sha256[:12]}", "schedule": digest(str(setup.schedule))})
    say(describe(setup, width=terminal_width(sys.stderr)))
    for warning in warn_of_layout(config):
        say(warning)
    say(f"\ncorpus    {corpus.description}, sha256 {corpus.sha256[:12]}")
    return corpus


def _refused(error: OSError, config: RunConfig, checkpoints: Checkpoints) -> RunError:
    """What the system said about a file of the run, in a sentence."""
    return RunError(
        f"{error.filename or config.run_folder} cannot be used: {explain_failure(error)}. {checkpoints.kept_text()}",
        fix="make room, or let it be written, then give the same command again.",
    )
