"""The evaluations of a training: when one is due, where it is made, and where its metrics go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from headkd_ray.engine.coco_metrics import CocoMetrics
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation import InterruptedEvaluationError
from headkd_ray.engine.evaluation_queue import EvaluationQueue
from headkd_ray.engine.log import Record, Sink
from headkd_ray.engine.step import Learner
from headkd_ray.engine.stored_detections import Store
from headkd_ray.engine.streams import Streams
from headkd_ray.engine.validation import validate
from headkd_ray.job import Job


@dataclass
class Evaluations:
    """Every rank has one. ``loop.fit`` explains the functions."""

    job: Job
    distributed: Distributed
    streams: Streams
    state: Learner
    steps_per_epoch: int
    sinks: tuple[Sink, ...]
    """Receive a record of each evaluation."""
    store: Store | None
    interrupted: Callable[[], bool]
    queue: EvaluationQueue | None
    last: Record = field(default_factory=dict)
    """Step and metrics of the latest evaluation; empty if there was none."""

    @property
    def beside(self) -> bool:
        """Whether evaluations are made elsewhere while training goes on."""
        return self.job.eval.placement == "task"

    @property
    def due(self) -> bool:
        """Whether the student of the present step is to be evaluated."""
        epoch, within_epoch = divmod(self.state.step, self.steps_per_epoch)
        return within_epoch == 0 and epoch > 0 and (epoch % self.job.eval.every_epochs == 0 or epoch == self.job.optim.epochs)

    @property
    def due_here(self) -> bool:
        """Whether the ranks themselves are to evaluate the student of the present step."""
        return self.due and not self.beside

    def here(self) -> CocoMetrics | None:
        """Evaluate the student on all ranks and take the metrics; return None if that was interrupted."""
        try:
            scored = validate(self.job, self.distributed, self.streams, self.state.student, self._keep_found, self.interrupted)
        except InterruptedEvaluationError:
            return None
        self._take(scored, self.state.step)
        return scored

    def take_finished(self) -> None:
        """Take the metrics of evaluations elsewhere that have ended; on rank 0, nothing on others."""
        if self.queue is not None:
            for step, scored in self.queue.finished():
                self._take(scored, step)

    def outstanding(self) -> bool:
        """Return whether evaluations elsewhere have not ended; a collective."""
        return self.beside and self.distributed.broadcast(self.queue is not None and self.queue.busy)

    def _take(self, scored: CocoMetrics, step: int) -> None:
        epoch = step // self.steps_per_epoch
        self.last = {"step": step, **scored.as_dict()}
        self.state.patience.see(scored.AP, epoch)
        steps = self.steps_per_epoch * self.job.optim.epochs
        for sink in self.sinks:
            sink({"step": step, "steps": steps, "epoch": epoch, "val": scored.as_dict()})

    def _keep_found(self, scored: CocoMetrics, found: list[dict[str, Any]]) -> None:
        if self.store is not None:
            self.store(found, self.state.step, not scored.AP < self.state.patience.best)
