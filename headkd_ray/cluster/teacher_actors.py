"""Teacher actors that hold the feature pyramids of the batches in flight and run the teacher's head on the student's RoIs.

Only the train worker knows the student's RoIs, in the middle of a step. So the expensive part, the teacher's pyramid, is
computed ahead in a separate process while the student trains on earlier batches; what remains within the step is to send the
RoIs and to receive the head's features.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from headkd_ray.cluster.teacher_process import actors_of, answer_of, set_up, within_memory
from headkd_ray.data.batch import Batch
from headkd_ray.detectors import PyramidDetector, RoIs
from headkd_ray.distill import FrozenTeacher, HeadFeatures
from headkd_ray.job import Job, PoolSpec
from headkd_ray.teacher.loading import teacher_of

AHEAD = 2
"""Number of batches whose features are computed ahead and held by a train worker and its teachers."""

Arrays = list[NDArray[Any]]


class TeacherActor:
    """A Ray actor that holds the frozen teacher and the feature pyramids of batches."""

    def __init__(self, job: dict[str, Any], classes: tuple[str, ...]) -> None:
        self.job = whole = Job.model_validate(job)
        assert whole.teacher is not None
        self.device = set_up(whole)
        teacher = teacher_of(whole, tuple(classes))
        assert isinstance(teacher, PyramidDetector)  # the job's own checks
        self.teacher = FrozenTeacher(teacher.to(self.device).to(memory_format=torch.channels_last))
        self.bf16 = whole.teacher.precision == "bf16"
        self.born = uuid.uuid4().hex
        self.held: dict[int, list[torch.Tensor]] = {}

    def look(self, number: int, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> None:
        """Compute and hold the features of a batch, (B, 3, H, W) RGB with unpadded (h, w) in ``sizes``, until ``answer``."""
        with within_memory(self.job), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.teacher.detector.normalise(*(torch.tensor(array, device=self.device) for array in (images, sizes)))
            self.held[number] = self.teacher.pyramid(x)

    def answer(self, number: int, rois: Sequence[tuple[Arrays, ...]]) -> tuple[str, list[Any] | None]:
        """Return this process's id and the taps of the batch's ``rois``, stage by stage, as arrays; None if it is not held.

        The batch's features are then released.
        """
        features = self.held.pop(number, None)
        if features is None:
            return self.born, None
        with within_memory(self.job), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            asked = [RoIs(*(torch.tensor(array, device=self.device) for array in stage)) for stage in rois]
            taps = self.teacher.head_features(features, asked).taps
        arrays = [_array(tap) if isinstance(tap, torch.Tensor) else [_array(level) for level in tap] for tap in taps]
        return self.born, arrays


@contextmanager
def teacher_actors(job: Job, classes: tuple[str, ...]) -> Iterator[list[Any]]:
    """Start the minimum number of teachers in the job's pool; they end with the context. One that dies is restarted."""
    assert job.teacher is not None
    pool = job.teacher.pool
    actors = actors_of(TeacherActor, job.run.name, pool, pool.actors[0], job.model_dump(mode="json"), classes)
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def with_teachers(batches: Iterator[Batch], actors: Sequence[Any], pool: PoolSpec) -> Iterator[Batch]:
    """Yield the batches, each with a ``TeacherHandle`` whose actor began to compute its features AHEAD batches before."""
    born: dict[int, set[str]] = {number: set() for number in range(len(actors))}
    coming: deque[tuple[Batch, TeacherHandle]] = deque()

    def first() -> Batch:
        batch, teacher = coming.popleft()
        return replace(batch, ask=teacher, teacher_restarts=sum(max(0, len(lives) - 1) for lives in born.values()))

    for number, batch in enumerate(batches):
        place = number % len(actors)
        teacher = TeacherHandle(actors[place], number, batch, pool, born[place])
        teacher.show()
        coming.append((batch, teacher))
        if len(coming) > AHEAD:
            yield first()
    while coming:
        yield first()


class TeacherHandle:
    """A handle for asking a teacher actor about one batch, which is on the CPU.

    ``born`` collects the ids of the processes that answered; a restarted actor has a new one.
    """

    def __init__(self, actor: Any, number: int, batch: Batch, pool: PoolSpec, born: set[str]) -> None:
        self.actor, self.number, self.batch, self.pool, self.born = actor, number, batch, pool, born
        self.shown: Any = None

    def show(self) -> None:
        """Start computing the batch's features in the actor."""
        self.shown = self.actor.look.remote(self.number, self.batch.images.numpy(), self.batch.sizes.numpy())

    def __call__(self, rois: Sequence[RoIs], device: torch.device) -> HeadFeatures:
        """Return the teacher's features of ``rois``, stage by stage, on ``device``. Raises ClusterError if none answers."""
        arrays = [tuple(tensor.cpu().numpy() for tensor in stage) for stage in rois]
        found = None
        while found is None:
            answer_of(self.shown, self.pool)  # raises what went wrong there
            who, found = answer_of(self.actor.answer.remote(self.number, arrays), self.pool)
            self.born.add(who)
            if found is None:  # the actor has died since, and its features with it
                self.show()
        taps = [
            _tensor(tap, device) if isinstance(tap, np.ndarray) else [_tensor(level, device) for level in tap] for tap in found
        ]
        return HeadFeatures(taps, taps[len(taps) // len(rois) - 1] if rois else taps[0])


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()


def _tensor(array: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    return torch.tensor(array, device=device)  # a copy, because arrays from Ray are read-only
