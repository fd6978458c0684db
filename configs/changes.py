"""Compare the config of a saved run with the one that is to resume it, and refuse changes that change the result.

Keys that only decide where and how fast a run computes may change: mesh, pipeline, checkpoints, logging. All others
change the numbers that come out.
"""

from collections.abc import Mapping
from typing import Any, Literal

from ..meshes import RunError
from .run_config import RunConfig, config_from_dict, config_keys

Changes = Literal["refuse", "accept"]
"""Whether a run may be resumed with a config that changes its result."""

_FREE_SECTIONS = {"mesh", "pipeline", "checkpoint"}
_FREE_KEYS = {
    "run.name",
    "run.folder",
    "run.fake_devices",
    "run.silence_s",
    "optimizer.zero",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.bad_step",
    "train.spike_ratio",
    "train.init_from",
    # The tokens of the corpus are compared instead, by their hash.
    "data.source",
    "data.paths",
    "data.token_dtype",
    "data.tokenizer",
}


def list_changes(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return the keys whose change would change the result, as `key: was this, is that`.

    Args:
        saved: the config of a save, as plain values; a key that it lacks had its default.
    """
    found: list[str] = []
    here, then = config.model_dump(mode="json"), config_from_dict(saved).model_dump(mode="json")
    for name in config_keys():
        section, _, key = name.partition(".")
        was, now = then[section][key], here[section][key]
        if was != now and name not in _FREE_KEYS and section not in _FREE_SECTIONS:
            found.append(f"{name}: was {was}, is {now}")
    return found


def check_changes(
    saved: Mapping[str, Any], config: RunConfig, *, was: str | None, corpus: str, changes: Changes, step: int
) -> None:
    """Check that a run is resumed with the config and corpus it was saved with, unless changes are accepted.

    Args:
        was: SHA-256 of the corpus that the save was trained on, None if that is not known.
        corpus: SHA-256 of the corpus now.
        step: the step of the save.

    Raises:
        RunError: with every key that changes the result.
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
