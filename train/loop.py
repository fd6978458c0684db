"""The training loop: read a config, build everything, take the steps, leave a run folder behind.

The host never waits for the step it has just started: it looks at the step before, while the devices work.
"""

import math
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

from ..layers import flops_per_token
from ..meshes import ConfigError, build_mesh, mesh_sizes, use_fake_devices
from .batches import Batches
from .check import check_run
from .checkpoint import Checkpoints
from .config import RunConfig
from .data import Corpus, check_vocabulary, load_corpus
from .metrics import MetricsLog, Summary, draw_loss, peak_memory_bytes, read_metrics, write_summary
from .plan_warnings import warn_of_layout
from .progress import StepProgress
from .report import describe
from .run_weights import check_initial_weights, initial_state
from .speed import peak_flops_per_s
from .state import Setup, TrainState
from .step import StepMetrics, make_eval_step, make_train_step
from .tokenizer import keep_tokenizer


def prepare(config: RunConfig) -> Setup:
    """Return the run made ready on its mesh, every check passed, before any array is made.

    Raises:
        TrellaxError: the config does not fit itself or the devices.
    """
    if config.run.fake_devices:
        use_fake_devices(config.run.fake_devices)
    spec = check_run(config, num_devices=len(jax.devices()))
    setup = Setup(config, build_mesh(spec))
    _ = setup.model, setup.schedule
    return setup


def train(config: RunConfig, *, console: Console | None = None) -> Summary:
    """Train as the config says and return what came of it; talks on `console` (stderr if left out).

    Goes on from the newest checkpoint of the run folder unless `checkpoint.resume` is "never".

    Raises:
        TrellaxError: a mistake in the config, the corpus or the checkpoint; nothing was trained.
    """
    start_s = time.perf_counter()
    console = console or Console(file=sys.stderr)
    setup = prepare(config)
    check_initial_weights(setup)
    _open_folder(config)
    keep_tokenizer(config.data.tokenizer, config.run_folder)
    corpus = load_corpus(config.data, vocab_size=config.model.vocab_size, cache=config.run_folder)
    check_vocabulary(corpus, vocab_size=config.model.vocab_size)
    console.print(str(describe(setup)), highlight=False, soft_wrap=True)
    for warning in warn_of_layout(config):
        console.print(warning, highlight=False, soft_wrap=True)
    console.print(f"\ncorpus    {corpus.description}, sha256 {corpus.sha256[:12]}", highlight=False, soft_wrap=True)
    with Checkpoints(config.run_folder, keep=config.checkpoint.keep) as checkpoints:
        run = _Run(setup, corpus, checkpoints, console)
        run.take_steps()
        val_loss = run.validate()
        return run.finish(val_loss, start_s=start_s)


def _open_folder(config: RunConfig) -> None:
    folder = config.run_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be written: {error.strerror}.", fix="set run.folder to a place that can."
        ) from None


class _Run:
    """The steps of one run, and what it remembers between them."""

    def __init__(self, setup: Setup, corpus: Corpus, checkpoints: Checkpoints, console: Console) -> None:
        self.setup, self.config, self.checkpoints, self.console = setup, setup.config, checkpoints, console
        resumes = self.config.checkpoint.resume == "auto" and checkpoints.latest_step is not None
        self.state: TrainState = checkpoints.restore(setup) if resumes else initial_state(setup)
        self.first_step = int(self.state.step)
        if self.config.train.init_from and not resumes:
            console.print(f"weights   of {self.config.train.init_from}", highlight=False, soft_wrap=True)
        if resumes:
            steps = self.config.train.steps
            rest = (
                f"{steps - self.first_step} to go" if self.first_step < steps else f"train.steps={steps}: none to take"
            )
            console.print(f"resumed   at step {self.first_step} of {self.config.run_folder}, {rest}", highlight=False)
        self.train_batches, self.val_batches = (
            Batches(
                tokens,
                seq_len=self.config.data.seq_len,
                batch_size=self.config.train.batch_size,
                microbatches=self.config.pipeline.microbatches,
                seed=self.config.run.seed,
            )
            for tokens in (corpus.train, corpus.validation)
        )
        self.train_step = self._compile("train step", make_train_step(setup))
        self.eval_step = self._compile("validation", make_eval_step(setup))
        section, tokens = self.config.train, self.config.data.seq_len
        self.tokens_per_step = section.batch_size * tokens
        flops = flops_per_token(self.config.model, num_tokens=tokens, attention="causal").training
        self.mfu_per_token_per_s = flops / peak_flops_per_s(setup.mesh)
        # A run resumed at its end takes no step: its last loss is the one on record.
        lines = read_metrics(self.config.run_folder) if resumes else []
        self.last_loss: float | None = next((line["loss"] for line in reversed(lines) if "loss" in line), None)
        self.pace = _Pace(section.log_every)

    def take_steps(self) -> None:
        """Train to the last step, logging, validating and saving on the way."""
        steps, folder = self.config.train.steps, self.config.run_folder
        with MetricsLog(folder, resumed_step=self.first_step) as log, self._progress() as progress:
            waiting: tuple[int, StepMetrics] | None = None
            pace = self.pace
            pace.restart()
            for step in range(self.first_step, steps):
                self.state, metrics = self.train_step(self.state, self._place(self.train_batches[step]))
                if waiting:
                    self._log(log, progress, pace, *waiting)
                waiting = (step + 1, metrics)
                if self._is_due(self.config.train.eval_every, step + 1):
                    log.write(step + 1, {"val_loss": self.validate()})
                    pace.restart()
                if self._is_due(self.config.checkpoint.every, step + 1):
                    self.checkpoints.save(self.state, self.setup)
                    pace.restart()
            if waiting:
                self._log(log, progress, pace, *waiting)

    def validate(self) -> float:
        """Return the mean loss of the held-out batches, the same ones every time."""
        batches = range(self.config.train.eval_batches)
        losses = [self.eval_step(self.state, self._place(self.val_batches[index])) for index in batches]
        return float(np.mean(jax.device_get(losses)))

    def finish(self, val_loss: float, *, start_s: float) -> Summary:
        """Save, draw and sum up."""
        folder, steps = self.config.run_folder, int(self.state.step)
        if self.checkpoints.latest_step != steps:
            self.checkpoints.save(self.state, self.setup)
        with MetricsLog(folder, resumed_step=steps) as log:
            log.write(steps, {"val_loss": val_loss})
        summary = Summary(
            steps=steps,
            final_train_loss=self.last_loss,
            final_val_loss=val_loss,
            tokens_per_s=self.tokens_per_step / self.pace.mean_step_time_s,
            wall_time_s=time.perf_counter() - start_s,
            mesh=str(mesh_sizes(self.setup.mesh)),
            schedule=self.setup.schedule.name,
            folder=str(folder),
        )
        write_summary(summary)
        draw_loss(folder)
        return summary

    def _log(self, log: MetricsLog, progress: StepProgress, pace: "_Pace", step: int, metrics: StepMetrics) -> None:
        self.last_loss = loss = float(metrics.loss)
        pace.tick()
        progress.advance(step, loss=loss, tokens_per_s=self.tokens_per_step / pace.step_time_s)
        if step % self.config.train.log_every and step not in (self.first_step + 1, self.config.train.steps):
            return
        tokens_per_s = self.tokens_per_step / pace.step_time_s
        log.write(
            step,
            {
                "loss": loss,
                "grad_norm": float(metrics.grad_norm),
                "lr": float(metrics.lr),
                "tokens_per_s": tokens_per_s,
                "step_time_s": pace.step_time_s,
                "mfu": tokens_per_s * self.mfu_per_token_per_s,
                "peak_memory_bytes": peak_memory_bytes(),
            },
        )

    def _is_due(self, every: int, step: int) -> bool:
        # The end has its own validation and save.
        return every > 0 and step % every == 0 and step < self.config.train.steps

    def _place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        sharding = self.setup.batch_sharding
        return {name: jax.make_array_from_process_local_data(sharding, leaf) for name, leaf in batch.items()}

    def _compile(self, what: str, function: Any) -> Callable[..., Any]:
        batch = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.setup.batch_sharding)
            for name, leaf in self.train_batches[0].items()
        }
        start_s = time.perf_counter()
        compiled = function.lower(self.setup.shapes, batch).compile()
        self.console.print(f"compiled  {what} in {time.perf_counter() - start_s:.1f} s", highlight=False)
        return compiled

    def _progress(self) -> StepProgress:
        return StepProgress(self.console, first_step=self.first_step, steps=self.config.train.steps)


class _Pace:
    """Seconds per step, over the last `window` steps and over all, without pauses for validation and saving."""

    def __init__(self, window: int) -> None:
        self._recent_s: deque[float] = deque(maxlen=window)
        self._total_s, self._num_steps = 0.0, 0
        self.restart()

    def tick(self) -> None:
        now_s = time.perf_counter()
        self._recent_s.append(now_s - self._last_s)
        self._total_s += now_s - self._last_s
        self._num_steps += 1
        self._last_s = now_s

    def restart(self) -> None:
        self._last_s = time.perf_counter()

    @property
    def step_time_s(self) -> float:
        return sum(self._recent_s) / len(self._recent_s)

    @property
    def mean_step_time_s(self) -> float:
        return self._total_s / self._num_steps if self._num_steps else math.inf
