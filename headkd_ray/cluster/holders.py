"""Teachers that hold the features of the batches in flight and answer about RoIs that the student proposes.

The student's RoIs are known in the train worker alone, in the middle of a step. So the costly part, the teacher's pyramid, is
computed ahead, in a process of its own, while the student trains on earlier batches; what is left for the step is to send the
RoIs and to get the answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from headkd_ray.data.batch import Batch
from headkd_ray.detectors import RoIs
from headkd_ray.distill import Guest, Insight
from headkd_ray.engine.teacher import load_teacher
from headkd_ray.job import Job

AHEAD = 2
"""Batches whose features are computed ahead: what a train worker and its teachers hold."""

Arrays = list[NDArray[Any]]


class Holder:
    """One teacher process."""

    def __init__(self, job: dict[str, Any], classes: tuple[str, ...]) -> None:
        whole = Job.model_validate(job)
        assert whole.teacher is not None
        torch.set_num_threads(max(1, int(whole.teacher.pool.cpus)))
        torch.manual_seed(whole.run.seed)
        teacher = load_teacher(whole, tuple(classes))
        assert teacher is not None
        self.device = torch.device("cuda" if whole.teacher.pool.gpus else "cpu")
        self.guest = Guest(teacher.detector.to(self.device).to(memory_format=torch.channels_last))
        self.bf16 = whole.teacher.precision == "bf16"
        self.held: dict[int, list[torch.Tensor]] = {}

    def look(self, step: int, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> None:
        """Keep the features of a batch, (B, 3, H, W) RGB with unpadded (h, w) in ``sizes``, until it is asked about."""
        x = self.guest.detector.normalise(*(torch.tensor(array, device=self.device) for array in (images, sizes)))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            self.held[step] = self.guest.features(x)

    def answer(self, step: int, rois: Sequence[tuple[Arrays, ...]]) -> list[Any] | None:
        """The taps of the batch's ``rois``, stage by stage, as arrays; None if it is not held. It is forgotten then."""
        features = self.held.pop(step, None)
        if features is None:
            return None
        asked = [RoIs(*(torch.tensor(array, device=self.device) for array in stage)) for stage in rois]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            taps = self.guest.insight_of(features, asked).taps
        return [_array(tap) if isinstance(tap, torch.Tensor) else [_array(level) for level in tap] for tap in taps]


@contextmanager
def holders(job: Job, classes: tuple[str, ...]) -> Iterator[list[Any]]:
    """The fewest teacher processes of the job's pool; they end with the context. One that dies is started again."""
    assert job.teacher is not None
    pool = job.teacher.pool
    options = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "resources": pool.resources}
    remote = ray.remote(Holder).options(**options, max_restarts=-1, max_task_retries=-1)
    actors = [remote.remote(job.model_dump(mode="json"), classes) for _ in range(pool.actors[0])]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def held(batches: Iterator[Batch], actors: Sequence[Any]) -> Iterator[Batch]:
    """``batches``, each with the teacher to ask about it, which has been shown it AHEAD batches before."""
    lost = Lost()
    coming: deque[tuple[Batch, Asker]] = deque()

    def first() -> Batch:
        batch, asker = coming.popleft()
        return replace(batch, ask=asker, teacher_restarts=lost.count)

    for number, batch in enumerate(batches):
        asker = Asker(actors[number % len(actors)], batch, lost)
        asker.show()
        coming.append((batch, asker))
        if len(coming) > AHEAD:
            yield first()
    while coming:
        yield first()


@dataclass
class Lost:
    """Batches that a teacher had to be shown again, because it had died."""

    count: int = 0


@dataclass(frozen=True)
class Asker:
    """Asks a teacher about one batch."""

    actor: Any
    batch: Batch
    """On the CPU."""
    lost: Lost = field(default_factory=Lost)

    def show(self) -> None:
        """Start computing the features."""
        self.actor.look.remote(self.batch.step, self.batch.images.numpy(), self.batch.sizes.numpy())

    def __call__(self, rois: Sequence[RoIs]) -> Insight:
        """What the teacher makes of ``rois``, stage by stage, on their device."""
        arrays = [tuple(tensor.cpu().numpy() for tensor in stage) for stage in rois]
        found = ray.get(self.actor.answer.remote(self.batch.step, arrays))
        if found is None:
            self.lost.count += 1
            self.show()
            found = ray.get(self.actor.answer.remote(self.batch.step, arrays))
        device = rois[0].boxes.device if rois else torch.device("cpu")
        taps = [
            _tensor(tap, device) if isinstance(tap, np.ndarray) else [_tensor(level, device) for level in tap] for tap in found
        ]
        layers = len(taps) // len(rois) if rois else 1
        return Insight(taps, taps[layers - 1] if rois else taps[0])


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()


def _tensor(array: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    return torch.tensor(array, device=device)  # a copy: what Ray hands out is read-only
