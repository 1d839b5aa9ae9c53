"""HEAD with a dense teacher: the assistant is a dense head like the teacher's, on the student's pyramid; no RoIs are needed.

    L = L_student + L_assistant + a w(t) sum over towers, levels of MSE(conv(A), T) + c w(t) sum over levels of MSE(conv(S), T)

T is what the teacher's towers make of its own P3 to P7, A the assistant's, S the student's last classification conv. The convs
are 1x1, one a tower for all levels. Modelled on the research branch's RepPoints pair, whose weights a and c are 1 (our keys'
defaults, the R-CNN pair's, are 2) and which also distils RepPoints' own point convs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headkd_ray.detectors import FCOS, FCOSHead, RetinaHead, RetinaNet
from headkd_ray.distill.ckd import level_errors
from headkd_ray.distill.trainee import Trainee, ckd_factor, warmup
from headkd_ray.job import DistillSpec


class DenseHEAD(Trainee):
    """Methods copy_only (no ``teacher``), akd (``akd`` given) and head (``ckd`` too) of a dense pair."""

    student: RetinaNet | FCOS

    def __init__(
        self,
        student: RetinaNet | FCOS,
        assistant: FCOSHead | RetinaHead,
        spec: DistillSpec,
        teacher: RetinaNet | FCOS | None = None,
        akd: nn.ModuleList | None = None,
        ckd: nn.Conv2d | None = None,
        ckd_stop: int | None = None,
    ) -> None:
        """``akd``: the 1x1 convs of the classification and of the box tower; ``ckd``: that of the student."""
        super().__init__(student, teacher)
        self.assistant = assistant
        self.spec = spec
        self.akd = akd
        self.ckd = ckd
        self.ckd_stop = ckd_stop

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        step: int,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        x = self.student.normalise(images, sizes)
        features = self.student.features(x)
        outputs = self.student.head(features)
        losses = self.student.head.losses(outputs, sizes, boxes, labels)
        assisted = self.assistant(features)
        for name, loss in self.assistant.losses(assisted, sizes, boxes, labels).items():
            losses[f"loss_assist_{name.removeprefix('loss_')}"] = self.spec.assistant_weight * loss
        if self._guest is None:
            return losses

        taught, taught_boxes = self._guest.towers(self._guest.view(images, sizes, x, self.student))
        weight = self.spec.akd_weight * warmup(step, self.spec.warmup_steps)
        if self.akd is not None:
            towers = ((assisted.taps, taught), (assisted.box_taps, taught_boxes))
            for i, (adapter, (own, theirs)) in enumerate(zip(self.akd, towers, strict=True), start=1):
                losses[f"loss_akd_{i}"] = weight * level_errors(adapter, own, theirs)
        if self.ckd is not None:
            factor = self.spec.ckd_weight * ckd_factor(step, self.spec.warmup_steps, self.ckd_stop)
            losses["loss_ckd"] = factor * level_errors(self.ckd, outputs.taps, taught)
        return losses
