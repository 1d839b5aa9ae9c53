"""What a training step calls: a student, and in subclasses whoever helps it learn. Only ``student`` is exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headkd_ray.detectors import Detector
from headkd_ray.distill.teacher import Guest


class Trainee(nn.Module):
    """Supervised training of ``student`` alone; base of the distillation methods."""

    def __init__(self, student: Detector, teacher: Detector | None = None) -> None:
        super().__init__()
        self.student = student
        self._guest = Guest(teacher) if teacher is not None else None

    @property
    def teacher(self) -> Detector | None:
        """The frozen teacher; not in ``parameters()``, ``modules()`` or ``state_dict()``."""
        return self._guest.detector if self._guest else None

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        step: int,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses by name, float32 scalars; the total is their plain sum.

        ``images`` (B, 3, H, W) uint8 RGB; ``sizes`` (B, 2) unpadded (h, w); ``boxes`` (B, G, 4) pixels of the network input;
        ``labels`` (B, G) int64, -1 = padding; ``step`` the optimizer step from 0, for warm-ups; ``generator`` (on the
        images' device; None = torch's default) draws the RoIs.
        """
        features = self.student.features(self.student.normalise(images, sizes))
        return self.student.losses(features, sizes, boxes, labels, generator)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._guest:
            self._guest.apply(fn)
        return super()._apply(fn, recurse)


def warmup(step: int, steps: int) -> float:
    """w(t) = min(t / steps, 1): from 0 at step 0 to 1 from ``steps`` on; always 1 if ``steps`` is 0."""
    return min(step / steps, 1.0) if steps else 1.0


def ckd_factor(step: int, warmup_steps: int, stop: int | None) -> float:
    """Factor of a CKD weight at an optimizer step: the warm-up, and 0 from step ``stop`` on.

    A term with factor 0 stays part of the graph: DDP expects every parameter to get a gradient in every step.
    """
    return 0.0 if stop is not None and step >= stop else warmup(step, warmup_steps)
