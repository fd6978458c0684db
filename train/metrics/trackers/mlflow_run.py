"""A run in MLflow, by the package `mlflow-skinny` or `mlflow`, at the place that MLFLOW_TRACKING_URI names.

The experiment is that of MLFLOW_EXPERIMENT_NAME, or trellax. Values that MLflow has are not sent again, and those that
it lacks of the lines in metrics.jsonl are.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from .tracker import Ended, RunFacts, Tracker, finite_values

_MOST_PARAMS, _MOST_METRICS, _MOST_LETTERS = 100, 1000, 500
"""The most that MLflow takes in one call, and of a value."""


class MlflowRun(Tracker):
    """A run in MLflow.

    Args:
        run_id: id of the run to go on with; None begins one.

    Raises:
        Exception: of mlflow: its server cannot be reached, or has no such run.
    """

    def __init__(self, facts: RunFacts, run_id: str | None) -> None:
        self._client = MlflowClient()
        self.id = run_id or self._begin(facts)
        self.place = f"run {self.id} at {self._client.tracking_uri}"
        self._there: dict[str, set[int]] = {}
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
            names = self._client.get_run(run_id).data.metrics
            self._there = {name: {old.step for old in self._client.get_metric_history(run_id, name)} for name in names}
        self._send([(line["step"], finite_values(line)) for line in facts.lines])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of one step."""
        self._send([(step, values)])

    def close(self, ended: Ended) -> None:
        """End the run."""
        self._client.set_terminated(self.id, "FINISHED" if ended == "whole" else "FAILED")

    def _begin(self, facts: RunFacts) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "trellax")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        run_id = self._client.create_run(experiment, run_name=facts.name).info.run_id
        params = [Param(key, str(value)[:_MOST_LETTERS]) for key, value in facts.hyperparameters.items()]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])
        return run_id

    def _send(self, steps: list[tuple[int, Mapping[str, Any]]]) -> None:
        now_ms, metrics = int(time.time() * 1000), []
        for step, values in steps:
            for name, value in values.items():
                if step not in self._there.setdefault(name, set()):
                    self._there[name].add(step)
                    metrics.append(Metric(name, value, now_ms, step))
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self.id, metrics=metrics[start : start + _MOST_METRICS])


def check_server() -> None:
    """Raise unless there is a place to log to.

    Raises:
        Exception: of mlflow: there is none.
    """
    MlflowClient().search_experiments(max_results=1)
