"""Tracking in MLflow: ``log.mlflow`` names the experiment, MLFLOW_TRACKING_URI the server."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from headkd_ray.trackers.tracker import RunFacts, Tracker

PARAM_LENGTH = 6000
"""The longest value of a parameter that a server takes."""
BATCH = 100
"""The most parameters that a server takes at once."""


class MLflowTracker(Tracker):
    """A run of an MLflow experiment."""

    def __init__(self, place: str, facts: RunFacts, run_id: str | None) -> None:
        self.client = MlflowClient()
        if run_id is not None:
            self._run_id = run_id
            self.client.update_run(run_id, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(place)
        number = self.client.create_experiment(place) if experiment is None else experiment.experiment_id
        self._run_id = self.client.create_run(number, run_name=facts.name).info.run_id
        params = [Param(mlflow_name(key), str(value)[:PARAM_LENGTH]) for key, value in facts.job.items()]
        for start in range(0, len(params), BATCH):
            self.client.log_batch(self._run_id, params=params[start : start + BATCH])
        tags = {"run folder": facts.address, **facts.environment}
        self.client.log_batch(self._run_id, tags=[RunTag(mlflow_name(key), value) for key, value in tags.items()])

    @property
    def run_id(self) -> str:
        return self._run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        batch = [Metric(mlflow_name(name), value, now, step) for name, value in metrics.items()]
        for start in range(0, len(batch), BATCH):
            self.client.log_batch(self._run_id, metrics=batch[start : start + BATCH])

    def show(self, picture: bytes, step: int) -> None:
        with TemporaryDirectory(prefix="headkd-tracked-") as folder:
            file = Path(folder) / f"step_{step:08d}.jpg"
            file.write_bytes(picture)
            self.client.log_artifact(self._run_id, str(file), "samples")

    def finish(self, metrics: Mapping[str, float], student: Path, picture: Path) -> None:
        self.log({f"best/{name}": value for name, value in metrics.items()}, 0)
        self.client.log_artifacts(self._run_id, str(student), "student")
        self.client.log_artifact(self._run_id, str(picture))

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


def mlflow_name(name: str) -> str:
    """Return ``name`` in the characters that MLflow takes: a-z, A-Z, 0-9 and ``_ - . : /`` and space.

    Others are written as their code points, so that different class names stay different.
    """
    return re.sub(r"[^a-zA-Z0-9_\-.:/ ]", lambda match: f"-{ord(match[0]):x}-", name)
