"""Open the trackers that `train.log_to` names, and keep the ids of their runs in the run folder, in trackers.json.

A tracker never stops a run: one that fails on the way is left out, and the next command sends what it lacks.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ....configs.sections import TrackerName
from ....meshes import ConfigError, RunError
from ....meshes.files.own_file import replace_file
from ....meshes.files.regular_file import read_bounded
from .tracker import Ended, RunFacts, Tracker

TRACKERS_FILE = "trackers.json"

_ID = re.compile(r"[\w-]{1,128}")
_MAX_FILE_BYTES = 1 << 16
_FIXES: dict[TrackerName, str] = {
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline and send the run later with `wandb sync`.",
    "mlflow": "set MLFLOW_TRACKING_URI to that of a server, or to file:mlruns with MLFLOW_ALLOW_FILE_STORE=true.",
}


def check_trackers(names: Iterable[TrackerName]) -> None:
    """Raise unless each tracker is installed and has a place to log to.

    Raises:
        ConfigError: one is not, or has none.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.log_to={name!r} needs the package {name}, which is not installed.",
                fix=f"pip install 'trellax[{name}]'.",
            )
        try:
            _check(name)
        except Exception as error:
            raise _cannot(name, error) from error


def open_trackers(names: Iterable[TrackerName], facts: RunFacts, *, say: Callable[[str], object]) -> "Trackers":
    """Begin a run in each tracker, or go on with the one whose id the run folder has.

    Raises:
        ConfigError: a tracker cannot begin it.
    """
    opened: dict[TrackerName, Tracker] = {}
    ids = _read_ids(Path(facts.folder))
    for name in names:
        try:
            opened[name] = _open(name, facts, ids.get(name))
        except Exception as error:
            raise _cannot(name, error) from error
        say(f"{name:9} {opened[name].place}")
    if opened:
        found = ids | {name: tracker.id for name, tracker in opened.items()}
        replace_file(Path(facts.folder) / TRACKERS_FILE, (json.dumps(found) + "\n").encode())
    return Trackers(opened, say=say)


class Trackers:
    """Several trackers as one."""

    def __init__(self, opened: Mapping[TrackerName, Tracker], *, say: Callable[[str], object]) -> None:
        self._opened, self._say = dict(opened), say

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of one step to all."""
        self._do(lambda tracker: tracker.write(step, values))

    def close(self, ended: Ended) -> None:
        """End the command in all."""
        self._do(lambda tracker: tracker.close(ended))

    def _do(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._opened.items()):
            try:
                act(tracker)
            # Whatever another program's server does, the run goes on.
            except Exception as error:
                del self._opened[name]
                self._say(f"{name} failed and gets nothing more of this command: {_first_line(error)}")


def _check(name: TrackerName) -> None:
    if name == "wandb":
        from .wandb_run import check_login

        check_login()
    else:
        from .mlflow_run import check_server

        check_server()


def _open(name: TrackerName, facts: RunFacts, run_id: str | None) -> Tracker:
    if name == "wandb":
        from .wandb_run import WandbRun

        return WandbRun(facts, run_id)
    from .mlflow_run import MlflowRun

    return MlflowRun(facts, run_id)


def _read_ids(folder: Path) -> dict[str, str]:
    """Return the ids of the runs by tracker, {} where there are none."""
    try:
        found = json.loads(read_bounded(folder / TRACKERS_FILE, max_bytes=_MAX_FILE_BYTES, error=RunError))
    except (OSError, ValueError, RecursionError):
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: own for name, own in pairs if isinstance(own, str) and _ID.fullmatch(own)}


def _cannot(name: TrackerName, error: Exception) -> ConfigError:
    return ConfigError(f"train.log_to={name!r} cannot log: {_first_line(error)}", fix=_FIXES[name])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")
