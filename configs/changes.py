"""What has changed between a saved run and the config that is to go on with it, and whether it matters.

What only says where and how fast a run computes may change freely; all else changes what comes out.
"""

from collections.abc import Mapping
from typing import Any, Literal

from ..meshes import RunError
from .run_config import RunConfig, config_from_dict, config_keys

Changes = Literal["refuse", "accept"]
"""What to do about a config that differs in what matters from the one a run was saved with."""

_FREE = {
    *("run.name", "run.folder", "run.fake_devices", "run.silence_s", "optimizer.zero"),
    *(
        "train.log_every",
        "train.eval_every",
        "train.eval_batches",
        "train.bad_step",
        "train.spike_ratio",
        "train.init_from",
    ),
    # The corpus itself is compared, by its hash.
    *("data.source", "data.paths", "data.token_dtype", "data.tokenizer"),
}
_FREE_SECTIONS = {"mesh", "pipeline", "checkpoint"}


def list_changes(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return the keys whose change would change the run, as `key: was this, is that`.

    Args:
        saved: the config of a save, as plain values; a key that it lacks had its default.
    """
    here, found = config.model_dump(mode="json"), []
    then = config_from_dict(saved).model_dump(mode="json")
    for name in config_keys():
        section, _, key = name.partition(".")
        was, now = then[section][key], here[section][key]
        if was != now and name not in _FREE and section not in _FREE_SECTIONS:
            found.append(f"{name}: was {was}, is {now}")
    return found


def check_changes(
    saved: Mapping[str, Any], config: RunConfig, *, was: str | None, corpus: str, changes: Changes, step: int
) -> None:
    """Refuse to go on with another run than was saved, unless that is accepted.

    Args:
        was: SHA-256 of the corpus it was trained on, `corpus` that of now.

    Raises:
        RunError: with every key that differs.
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
