"""Tracking in Weights & Biases: ``log.wandb`` names the project; WANDB_MODE, WANDB_ENTITY and the like are the client's own."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import wandb
from PIL import Image

from headkd_ray.trackers.tracker import RunFacts, Tracker


class WandbTracker(Tracker):
    """A run of a W&B project. Steps are a metric of their own, because a resumed run repeats some, which W&B's own may not."""

    def __init__(self, place: str, facts: RunFacts, run_id: str | None) -> None:
        local = Path(facts.address)
        self.run = wandb.init(
            project=place,
            name=facts.name,
            id=run_id,
            resume="allow",
            config={**facts.job, "environment": dict(facts.environment), "run folder": facts.address},
            dir=os.environ.get("WANDB_DIR") or (local if local.is_dir() else None),
            settings=wandb.Settings(silent=True, console="off"),  # the console is ours
        )
        self.run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        return self.run.id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log({**metrics, "step": step})

    def show(self, picture: bytes, step: int) -> None:
        self.run.log({"samples": wandb.Image(Image.open(io.BytesIO(picture))), "step": step})

    def finish(self, metrics: Mapping[str, float], student: Path, picture: Path) -> None:
        self.run.summary.update({f"best/{name}": value for name, value in metrics.items()})
        self.run.log({"detections": wandb.Image(str(picture))})
        artifact = wandb.Artifact(f"student-{self.run.id}", type="model")
        artifact.add_dir(str(student))
        self.run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
