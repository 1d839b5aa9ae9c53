"""The training step, which training, calibration and the placement benchmark share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from headkd_ray.data.batch import Batch
from headkd_ray.data.rng import key_bits
from headkd_ray.detectors import Detector
from headkd_ray.distill import TrainingModel
from headkd_ray.engine.optim import build_optimizer
from headkd_ray.engine.patience import Patience
from headkd_ray.job import Job
from headkd_ray.teacher import TeacherSource


@dataclass
class Learner:
    """A training model with its optimizer, schedule and moving average: all state that training reads and changes."""

    step: int
    """Number of optimizer steps taken so far."""
    model: TrainingModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    ema: AveragedModel | None
    """Moving average of the student's weights."""
    ddp: DistributedDataParallel | None = None
    """Wraps ``model`` if several processes train it."""
    start: dict[str, str] | None = None
    """The detector that the student started from: its ``checkpoint`` and the ``fingerprint`` of its weights; None = fresh."""
    patience: Patience = field(default_factory=Patience)
    """Ends training early."""
    teacher: dict[str, str] | None = None
    """The job's teacher, likewise; None = it has none."""
    soft_teacher: TeacherSource | None = None
    """A teacher in this process that chooses its own RoIs and adds its soft targets to every batch."""

    @property
    def student(self) -> Detector:
        """The student to evaluate and export: the moving average if there is one."""
        student = self.model.student if self.ema is None else self.ema.module
        assert isinstance(student, Detector)
        return student


def build_learner(job: Job, model: TrainingModel, device: torch.device, global_batch: int, steps_per_epoch: int) -> Learner:
    """Build a learner at step 0 and move ``model`` to ``device``; the learning rate depends on ``global_batch`` (images per
    optimizer step) and ``steps_per_epoch`` (optimizer steps)."""
    model.to(device).to(memory_format=torch.channels_last)  # faster convolutions
    backbone = model.student.backbone_parameters()
    optimizer, scheduler = build_optimizer(job.optim, model.parameters(), global_batch, steps_per_epoch, backbone)
    ema = None
    if job.optim.ema is not None:
        ema = AveragedModel(model.student, multi_avg_fn=get_ema_multi_avg_fn(job.optim.ema), use_buffers=True)
    return Learner(0, model.train(), optimizer, scheduler, ema, patience=Patience(job.eval.patience))


def train_step(
    learner: Learner,
    job: Job,
    batches: Iterator[Batch],
    ranks: Sequence[int] = (0,),
    share: float = 1.0,
    note: Callable[[dict[str, Tensor], Batch], None] | None = None,
) -> None:
    """Take one optimizer step: a forward and a backward pass for each of ``ranks``, then the update.

    Args:
        batches: one is taken for each pass; they are on the model's device.
        ranks: the logical rank of each batch. The random numbers of a pass are a function of (seed, batch, rank).
        share: weight of each batch in the gradient, which is then averaged over the processes.
        note: called after each backward pass with the losses by name, including their ``total``, and the batch.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    for turn, rank in enumerate(ranks, start=1):
        batch = next(batches)
        if learner.ddp is not None:  # reduce gradients once per optimizer step
            learner.ddp.require_backward_grad_sync = turn == len(ranks)
        torch.manual_seed(key_bits("step", job.run.seed, batch.step, rank) % 2**63)
        losses = forward(learner, job, batch)
        total = torch.stack(list(losses.values())).sum()
        (total * (0.0 if batch.idle else share)).backward()
        if note is not None:
            note({**losses, "total": total}, batch)
    if job.optim.clip_norm is not None:
        clip_grad_norm_(learner.model.parameters(), job.optim.clip_norm)
    learner.optimizer.step()
    learner.scheduler.step()
    if learner.ema is not None:
        learner.ema.update_parameters(learner.model.student)
    learner.step += 1


def forward(learner: Learner, job: Job, batch: Batch) -> dict[str, Tensor]:
    """Return the weighted losses of ``batch`` by name, computed at the job's precision."""
    if job.optim.compile == "reduce-overhead":
        torch.compiler.cudagraph_mark_step_begin()  # the last pass is over: CUDA graphs may use its memory again
    if learner.soft_teacher is not None:
        batch = replace(batch, targets=learner.soft_teacher(batch))
    if batch.idle:
        learner.model.eval()  # a blank image must not enter BatchNorm's statistics
    model = learner.model if learner.ddp is None else learner.ddp
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=job.optim.precision == "bf16"):
        losses: dict[str, Tensor] = model(batch, learner.step)
    if batch.idle:
        learner.model.train()
    return losses
