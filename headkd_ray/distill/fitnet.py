"""FitNet baseline: the student's pyramid imitates a dense teacher's, level by level (the official README's homogeneous row)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headkd_ray.detectors import RetinaNet
from headkd_ray.detectors.losses import mean_squared_error
from headkd_ray.distill.trainee import Trainee
from headkd_ray.job import DistillSpec


class FitNet(Trainee):
    """L = L_student + weight * sum over P3 to P7 of MSE(1x1 conv(P_student), P_teacher); no warm-up. Fewer levels if the spec
    says so."""

    def __init__(self, student: RetinaNet, teacher: RetinaNet, spec: DistillSpec) -> None:
        super().__init__(student, teacher)
        self.spec = spec
        widths = (student.spec.neck.channels, teacher.spec.neck.channels)
        self.adapters = nn.ModuleList(nn.Conv2d(*widths, kernel_size=1) for _ in range(spec.fitnet_levels))

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        step: int,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        assert self._guest is not None
        x = self.student.normalise(images, sizes)
        features = self.student.features(x)
        losses = self.student.losses(features, sizes, boxes, labels, generator)
        taught = self._guest.features(self._guest.view(images, sizes, x, self.student))
        levels = zip(self.adapters, features, taught, strict=False)  # there is an adapter for each level that is imitated
        terms = [mean_squared_error(adapter(own), target) for adapter, own, target in levels]
        losses["loss_fitnet"] = self.spec.fitnet_weight * torch.stack(terms).sum()
        return losses
