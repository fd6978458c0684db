"""Run tasks of lm-evaluation-harness, given by their names or as YAML files of one's own, on a model in a folder."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ...meshes import DataError
from ...meshes.errors import printable, shown, suggest


def run_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Return the results of tasks as the harness gives them, by task and metric.

    >>> run_tasks("runs/quickstart", ["my_task.yaml"])["my_task"]["acc,none"]
    0.25

    Args:
        folder: run folder or Hugging Face folder.
        tasks: names of tasks of the harness, and paths of YAML files.
        num_fewshot: examples before each question, that of the task if left out.
        limit: first questions of each task alone.
        settings: mesh, batch_size, max_length and dtype of a `HarnessModel`.

    Raises:
        DataError: lm_eval is not installed, a task is unknown, or the harness refuses it.
        TrellaxError: the model cannot be read, or does not fit the mesh.
    """
    check_harness()
    import lm_eval
    from lm_eval.tasks import TaskManager

    from .harness_model import HarnessModel

    manager = TaskManager()
    found = [_find_task(task, manager) for task in tasks]
    model = HarnessModel(folder, **settings)
    asked = {"num_fewshot": num_fewshot, "limit": limit, "log_samples": False, "bootstrap_iters": 1000}
    return lm_eval.simple_evaluate(model=model, tasks=found, task_manager=manager, **asked)["results"]


def check_harness() -> None:
    """Raise unless lm-evaluation-harness can be imported.

    Raises:
        DataError: it cannot.
    """
    try:
        import_module("lm_eval.api.model")
    except ImportError as error:
        raise DataError(f"tasks need lm-evaluation-harness: {error}.", fix="pip install 'trellax[eval]'.") from None


def _find_task(task: str, manager: Any) -> Any:
    """Return the config of a YAML file, or the name of a task that the harness has."""
    if not task.endswith((".yaml", ".yml")):
        if task not in manager.all_tasks:
            known = suggest(task, manager.all_tasks)
            raise DataError(
                f"lm-evaluation-harness has no task {shown(task)}.{known}", fix="name another, or a .yaml file."
            )
        return task
    if not Path(task).is_file():
        raise DataError(f"{task}: there is no such file.", fix="name the YAML file of a task.")
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(str(Path(task).absolute()), resolve_func=True)
    except Exception as error:  # a task may run code of its own, which raises anything
        raise DataError(f"{task} is no task: {printable(str(error), limit=300)}.", fix="correct it.") from None
