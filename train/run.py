"""One run between its first step and its last: what it does every step, every so many, and when something is wrong."""

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import jax
import numpy as np
from rich.console import Console

from ..configs.changes import Changes, check_changes
from ..configs.saved_config import read_saved_config
from ..hub.saves.seal import Seal
from ..layers import flops_per_token
from ..meshes import DataError, RunError, mesh_sizes
from ..meshes.processes.messages import is_first, require_one_program, text_of_first
from .bad_loss import check_last_validation, describe_bad_step, fix_bad_step
from .checkpoints.checkpoints import Checkpoints
from .checkpoints.initial_weights import initial_state
from .data.batches import Batches
from .data.corpus import Corpus, check_files
from .data.prefetch import Prefetch, place_batch
from .data.validation_batches import ValidationBatches
from .metrics import (
    NO_SCHEDULE,
    MetricsLog,
    NoLog,
    Summary,
    draw_loss,
    keep_speed,
    last_loss,
    peak_memory_bytes,
    read_metrics,
    read_summary,
    write_summary,
)
from .pace import Pace
from .profile import StepProfile
from .progress import StepProgress, say
from .run_folder import HeldFolder
from .speed import peak_flops_per_s, utilization
from .state import Setup, TrainState
from .step import StepMetrics, make_eval_step, make_train_step
from .stop import StopRequest
from .xla import compile_for

_MOST_BAD_STEPS = 10
"""Bad steps in a row that are left out; more are no accident of the data."""

_FEWEST_TIMED = 10
"""Fewest steps over which speed is a mean. The end of a step is seen while the next one runs: on devices that share the
host's cores it is seen late, and the last step, after which none runs, would seem to take no time."""


class Run:
    """The steps of one run, and what it remembers between them; resumes from what its checkpoints hold."""

    def __init__(
        self,
        setup: Setup,
        corpus: Corpus,
        checkpoints: Checkpoints,
        held: HeldFolder,
        *,
        console: Console,
        changes: Changes,
        profile: StepProfile,
    ) -> None:
        self.setup, self.config, self.checkpoints, self.console = setup, setup.config, checkpoints, console
        self.corpus, self.held = corpus, held
        seal = self._load_state(changes)
        self.first_step = int(self.state.step)
        batch_size = self.config.train.batch_size
        # Where batches had another size, the first one starts where the last one ended.
        seen = seal.data.get("sequences") if seal else None
        first_sequence = 0 if seen is None else seen - self.first_step * batch_size
        section, tokens = self.config.train, self.config.data.seq_len
        cut = {"seq_len": tokens, "batch_size": batch_size, "microbatches": self.config.pipeline.microbatches}
        seed = self.config.run.seed
        self.train_batches = Batches(corpus.train, **cut, seed=seed, first_sequence=first_sequence)
        self.val_batches = ValidationBatches(corpus.validation, **cut, most=section.eval_batches)
        self._say_short_validation()
        self.train_step = self._compile("train step", make_train_step(setup), setup.peak_rate_shape)
        self.eval_step = self._compile("validation", make_eval_step(setup))
        self.tokens_per_step = section.batch_size * tokens
        self.flops_per_token = flops_per_token(self.config.model, num_tokens=tokens, attention="causal").training
        self.peak_flops = peak_flops_per_s(setup.mesh)
        # A run resumed at its end takes no step: its last loss is the one on record.
        lines = read_metrics(self.config.run_folder) if seal else []
        self.last_loss: float | None = last_loss(lines, step=self.first_step)
        self.pace, self.profile = Pace(window=max(section.log_every, _FEWEST_TIMED)), profile
        self._bad_in_a_row = 0

    def open_log(self) -> MetricsLog | NoLog:
        """Return the record of the run; closed at its end, since what is removed before is written again."""
        if not is_first():
            return NoLog()
        return MetricsLog(self.config.run_folder, resumed_step=self.first_step, say=self._say)

    def take_steps(self, stop: StopRequest, log: MetricsLog | NoLog) -> None:
        """Train to the last step or until asked to stop, logging, validating and saving on the way.

        Raises:
            DataError: a file of the corpus is lost or changed; the state is saved, unless there are many processes.
            RunError: the loss is not finite or spikes; the last good state is saved.
        """
        self._ahead = Prefetch(self._make_batch, end=self.config.train.steps)
        with self._progress() as progress, self._ahead, closing(self.profile):
            look = _Look(self, log, progress)
            self.profile.begin_after(self.first_step, steps=self.config.train.steps)
            self.pace.restart()
            for step in range(self.first_step, self.config.train.steps):
                if stop.is_due(step):
                    break
                if self.profile.begins_with(step):
                    look.at_waiting()
                    self.profile.start(self.state)
                    self.pace.restart()
                batch = self._next_batch(step, look)
                self.state, metrics = self.train_step(self.state, batch, self.setup.peak_rate)
                look.at_waiting()
                look.waiting = (step + 1, metrics)
                self._do_what_is_due(step + 1, look, log)
            look.at_waiting()

    def _do_what_is_due(self, step: int, look: "_Look", log: MetricsLog | NoLog) -> None:
        """Do what comes every so many steps, after this one; its time belongs to no step."""
        validates, saves = (
            self._is_due(every, step) for every in (self.config.train.eval_every, self.config.checkpoint.every)
        )
        is_profiled = self.profile.ends_with(step - 1)
        if not (validates or saves or is_profiled):
            return
        # All of this waits for the step, whose time must be counted first. And a kill after the save must not lose the
        # line of this step.
        look.at_waiting()
        if is_profiled:
            self.profile.stop(self.state, self.train_step, num_devices=self.setup.mesh.devices.size)
        if validates:
            try:
                log.write(step, {"val_loss": self.validate()})
            except DataError as error:
                raise self._save_before(error) from None
        if saves:
            self.save()
        self.pace.restart()

    def validate(self) -> float:
        """Return the mean loss of the held-out sequences, the same ones every time.

        Raises:
            DataError: a file of the corpus is lost or changed.
        """
        losses = [self.eval_step(self.state, self._place_read(batch)) for batch in self.val_batches]
        return float(np.sum(jax.device_get(losses)))

    def save(self) -> None:
        """Start to save the state as it is, unless it is saved already.

        Raises:
            RunError: the run folder was moved or removed.
        """
        self.held.check()
        step = int(self.state.step)
        if step != self.checkpoints.last_step:
            sequences = self.train_batches.num_sequences(step)
            data = {"batches": step, "sequences": sequences, "corpus": self.corpus.sha256}
            self.checkpoints.save(self.state, self.setup, data=data)

    def finish(self, stop: StopRequest, log: MetricsLog | NoLog, *, start_s: float) -> Summary:
        """Save, draw and sum up.

        Raises:
            RunError: the validation loss is not finite; all is written first.
            DataError: a file of the corpus is lost or changed; the state is saved.
        """
        folder, steps = self.config.run_folder, int(self.state.step)
        self.save()
        val_loss = None if stop.signal_name else self.validate()
        self.checkpoints.wait()
        # What comes next would make a folder anew.
        self.held.check()
        summary = Summary(
            ended=stop.signal_name or "done",
            steps=steps,
            final_train_loss=self.last_loss,
            final_val_loss=val_loss,
            tokens_per_s=self.tokens_per_step / self.pace.mean_step_time_s,
            wall_time_s=time.perf_counter() - start_s,
            mesh=str(mesh_sizes(self.setup.mesh)),
            schedule=self.setup.schedule.name if self.setup.schedule.num_ranks > 1 else NO_SCHEDULE,
            folder=str(folder),
        )
        if steps == self.first_step:
            summary = keep_speed(summary, read_summary(folder))
        if is_first():
            # A run resumed at its end was validated before.
            if val_loss is not None and {"step": steps, "val_loss": val_loss} not in read_metrics(folder):
                log.write(steps, {"val_loss": val_loss})
            write_summary(summary)
            draw_loss(folder)
        self.held.check()
        check_last_validation(val_loss, step=steps, folder=folder)
        return summary

    def look_at(self, step: int, metrics: StepMetrics, log: MetricsLog | NoLog, progress: StepProgress) -> None:
        """Log a step that is done, and stop the run if it was bad.

        Raises:
            RunError: it was bad, and bad steps stop the run or were too many; the last good state is saved.
        """
        with self.pace.waiting("device"):
            loss, is_taken = float(metrics.loss), bool(metrics.taken)
        self.pace.tick()
        tokens_per_s = self.tokens_per_step / self.pace.step_time_s
        progress.advance(step, loss=loss, tokens_per_s=tokens_per_s)
        self._bad_in_a_row = 0 if is_taken else self._bad_in_a_row + 1
        if is_taken:
            self.last_loss = loss
        is_logged = step % self.config.train.log_every == 0 or step in (self.first_step + 1, self.config.train.steps)
        if is_logged or not is_taken:
            log.write(
                step,
                {
                    "loss": loss,
                    "grad_norm": float(metrics.grad_norm),
                    "lr": float(metrics.lr),
                    "tokens_per_s": tokens_per_s,
                    "step_time_s": self.pace.step_time_s,
                    **self.pace.parts_s,
                    "mfu": utilization(tokens_per_s, flops_per_token=self.flops_per_token, peak=self.peak_flops),
                    "peak_memory_bytes": peak_memory_bytes(),
                    "skipped": None if is_taken else 1,
                },
            )
        if not is_taken:
            self._stop_or_skip(step, metrics)

    def _say_short_validation(self) -> None:
        asked = self.config.train.eval_batches * self.config.train.batch_size
        if (found := self.val_batches.num_sequences) < asked:
            text = f"validation on all {found} held-out sequences: train.eval_batches asks for {asked}"
            say(self.console, text)

    def _stop_or_skip(self, step: int, metrics: StepMetrics) -> None:
        what = describe_bad_step(step, metrics, spike_ratio=self.config.train.spike_ratio)
        if self.config.train.bad_step == "skip" and self._bad_in_a_row <= _MOST_BAD_STEPS:
            say(self.console, f"{what}; the batch is left out")
            return
        self.save()
        self.checkpoints.wait()
        again = f", and {self._bad_in_a_row - 1} steps before it were bad too" if self._bad_in_a_row > 1 else ""
        raise RunError(
            f"{what}{again}. Its update was left out; the state before it is saved as step "
            f"{self.checkpoints.last_step} in {self.config.run_folder}.",
            fix=fix_bad_step(metrics),
        )

    def _make_batch(self, step: int) -> dict[str, jax.Array]:
        return self._place_read(self.train_batches[step])

    def _place_read(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        # After it was read: what changes later is no part of it.
        check_files(self.corpus)
        return place_batch(batch, self.setup.batch_sharding)

    def _next_batch(self, step: int, look: "_Look") -> dict[str, jax.Array]:
        try:
            with self.pace.waiting("input"):
                return self._ahead[step]
        except DataError as error:
            look.at_waiting()
            raise self._save_before(error) from None

    def _save_before(self, error: DataError) -> DataError:
        """Save what was trained on the corpus as it was, and return what then stops the run."""
        if jax.process_count() > 1:
            # The others are at this step or the next; a save would wait for them for ever.
            return error
        self.save()
        self.checkpoints.wait()
        return DataError(f"{error.problem} Step {self.checkpoints.last_step} is saved.", fix=error.fix)

    def _load_state(self, changes: Changes) -> Seal | None:
        """Set the state: that of the newest save, or a fresh one where nothing is saved."""
        found: list[Seal] = []

        def accept(seal: Seal) -> None:
            # A model that was never trained here has no run yet that could be changed.
            if not seal.has_params_alone:
                was, corpus = seal.data.get("corpus"), self.corpus.sha256
                saved = read_saved_config(seal, folder=self.checkpoints.folder / seal.step, say=self._say)
                check_changes(saved, self.config, was=was, corpus=corpus, changes=changes, step=seal.step)
            found.append(seal)

        # What the first process sees counts: over a network the others may see it later.
        if text_of_first("empty" if self.checkpoints.folder.is_empty else ""):
            self.state: TrainState = initial_state(self.setup)
            if self.config.train.init_from:
                say(self.console, f"weights   of {self.config.train.init_from}")
            return None
        self.state = self.checkpoints.restore(self.setup, accept=accept)
        step, steps = int(self.state.step), self.config.train.steps
        rest = f"{steps - step} to go" if step < steps else f"train.steps={steps}: none to take"
        say(self.console, f"resumed   at step {step} of {self.config.run_folder}, {rest}")
        return found[-1]

    def _is_due(self, every: int, step: int) -> bool:
        # The end has its own validation and save.
        return every > 0 and step % every == 0 and step < self.config.train.steps

    def _compile(self, what: str, function: Any, *rest: jax.ShapeDtypeStruct) -> Callable[..., Any]:
        batch = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.setup.batch_sharding)
            for name, leaf in self.train_batches[0].items()
        }
        start_s = time.perf_counter()
        platform = self.setup.mesh.devices.flat[0].platform
        lowered = function.lower(self.setup.shapes, batch, *rest)
        require_one_program(what, lowered)
        compiled = compile_for(lowered, platform=platform)
        say(self.console, f"compiled  {what} in {time.perf_counter() - start_s:.1f} s")
        return compiled

    def _say(self, text: str) -> None:
        say(self.console, text)

    def _progress(self) -> StepProgress:
        return StepProgress(self.console, first_step=self.first_step, steps=self.config.train.steps)


class _Look:
    """The step that the devices may still be at; it is looked at when the next one is under way."""

    def __init__(self, run: Run, log: MetricsLog | NoLog, progress: StepProgress) -> None:
        self._run, self._log, self._progress = run, log, progress
        self.waiting: tuple[int, StepMetrics] | None = None

    def at_waiting(self) -> None:
        """Look at the step that waits, once."""
        waiting, self.waiting = self.waiting, None
        if waiting:
            self._run.look_at(*waiting, self._log, self._progress)
