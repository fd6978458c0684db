"""Compare the config of a save with the config that resumes it, and refuse changes that would change the result.

Keys that only affect where and how fast a run computes may change: mesh, pipeline, checkpoints, logging. All other keys
change the losses.
"""

from collections.abc import Mapping
from typing import Any, Literal

from ..meshes import RunError
from .run_config import RunConfig, config_from_dict, config_keys

Changes = Literal["refuse", "accept"]
"""What to do if the config changes the result of the run that it resumes."""

_FREE_SECTIONS = {"mesh", "pipeline", "checkpoint"}
_FREE_KEYS = {
    "run.name",
    "run.folder",
    "run.fake_devices",
    "run.silence_s",
    "train.shard",
    "train.offload",
    "train.seconds",
    "train.log_every",
    "train.log_to",
    "train.eval_every",
    "train.eval_batches",
    "train.patience",
    "train.noise_scale",
    "train.bad_step",
    "train.spike_ratio",
    "train.init_from",
    # The hash of the tokens is compared instead.
    "data.source",
    "data.paths",
    "data.text_field",
    "data.validation",
    "data.token_dtype",
    "data.tokenizer",
}


def list_changes(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return a line `key: was this, is that` for each changed key that changes the result.

    Args:
        saved: the config of a save as nested dicts; a missing key has its default.
    """
    found: list[str] = []
    here, then = config.model_dump(mode="json"), config_from_dict(saved).model_dump(mode="json")
    for name in config_keys():
        section, _, key = name.partition(".")
        if name in _FREE_KEYS or section in _FREE_SECTIONS:
            continue
        was, now = then[section][key], here[section][key]
        if was != now:
            found.append(f"{name}: was {was}, is {now}")
    return found


def check_changes(
    saved: Mapping[str, Any], config: RunConfig, *, was: str | None, corpus: str, changes: Changes, step: int
) -> None:
    """Raise if a run is resumed with another config or corpus than it was saved with, unless changes are accepted.

    Args:
        was: SHA-256 of the corpus that the save was trained on, None if it is unknown.
        corpus: SHA-256 of the corpus now.
        step: the step of the save.

    Raises:
        RunError: the config or the corpus changes the result; all such keys are listed.
    """
    found = list_changes(saved, config)
    if was and was != corpus:
        found.append(f"the corpus: was sha256 {was[:12]}, is {corpus[:12]}")
    if found and changes == "refuse":
        lines = "".join(f"\n  {line}" for line in found)
        raise RunError(
            f"{config.run_folder} was saved at step {step} with another config:{lines}",
            fix="set these back, start another run with --run.name, or go on with the change by --override.",
        )
