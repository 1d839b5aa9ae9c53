"""HEAD: a dense student learns through an R-CNN assistant on its own pyramid (Wang et al., ECCV 2022, arXiv 2207.05345).

The student proposes RoIs; the assistant (trained, thrown away after) and the frozen teacher look at the same ones.

    L = L_student + L_assistant + 2 w(t) sum_l MSE(Lin_l(A_l), T_l) + 2 w(t) MSE(Lin_3(S), T_2')
                    assist, copy_only    akd                         head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headkd_ray.detectors import FCOS, Detector, Proposals, RetinaNet, RoIHead, RoIs
from headkd_ray.detectors.fcos_head import FCOSOutputs
from headkd_ray.detectors.matching import Truth
from headkd_ray.detectors.retina_head import RetinaOutputs
from headkd_ray.detectors.roi_head import Look, RoIOutputs
from headkd_ray.detectors.rois import sample_rois
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.trainee import Trainee, ckd_factor, warmup
from headkd_ray.job import DistillSpec

ASSISTANT_STRIDES = (8, 16, 32, 64)
"""The assistant pools from P3 to P6, one level coarser than the teacher's P2 to P5."""


class Trace(NamedTuple):
    """Everything a step computed on its way to the losses; for inspection."""

    features: list[Tensor]
    """P3 to P7, (B, channels, H, W)."""
    outputs: RetinaOutputs | FCOSOutputs
    proposals: Proposals
    rois: RoIs
    assisted: RoIOutputs
    """The assistant's view of the RoIs; its taps are A_l."""
    taught: list[Tensor]
    """T_l (R, width); empty without a teacher."""
    adapted: list[Tensor]
    """Lin_l(A_l); empty without AKD."""
    rows: Tensor | None
    """S (R', width); None without CKD."""


class HEAD(Trainee):
    """Methods assist (no teacher), copy_only (assistant's weights copied), akd (``akd`` given), head (``ckd`` too)."""

    student: RetinaNet | FCOS

    def __init__(
        self,
        student: RetinaNet | FCOS,
        assistant: RoIHead,
        spec: DistillSpec,
        teacher: Detector | None = None,
        akd: AKD | None = None,
        ckd: CKD | None = None,
        ckd_stop: int | None = None,
    ) -> None:
        """``teacher`` is needed by ``akd`` and ``ckd``, and only by them; CKD has weight 0 from step ``ckd_stop`` on."""
        super().__init__(student, teacher)
        self.spec = spec
        self.assistant = assistant
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
        teacher_x = self._guest.view(images, sizes, x, self.student) if self._guest else x
        return self.trace(x, teacher_x, sizes, boxes, labels, step, generator)[0]

    def trace(
        self,
        x: Tensor,
        teacher_x: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        step: int,
        generator: torch.Generator | None = None,
        pick: Callable[[Proposals], RoIs] | None = None,
        extents: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Trace]:
        """One step from normalised images ``x`` (B, 3, H, W) to weighted losses, and all that lies between.

        Arguments as in :meth:`Trainee.forward`; ``pick`` replaces :meth:`sample`, ``extents`` is :meth:`RetinaHead.losses`'s.
        """
        features = self.student.features(x)
        outputs = self.student.head(features)
        anchors_count = {} if extents is None else {"extents": extents}  # a head without anchors knows no such thing
        losses = self.student.head.losses(outputs, sizes, boxes, labels, **anchors_count)

        proposals = self.student.head.proposals(outputs, sizes)
        rois = pick(proposals) if pick else self.sample(proposals, boxes, labels, generator)

        assisted = self.assistant(features, rois.boxes, rois.image)
        for name, loss in self.assistant.losses([Look(rois, assisted)]).items():
            losses[f"loss_assist_{name}"] = self.spec.assistant_weight * loss

        weight = warmup(step, self.spec.warmup_steps)
        taught = self._guest.taps(teacher_x, rois.boxes, rois.image) if self._guest and (self.akd or self.ckd) else []
        adapted = self.akd(assisted.taps) if self.akd else []
        if self.akd:
            for i, loss in enumerate(self.akd.losses(adapted, taught), start=1):
                losses[f"loss_akd_{i}"] = self.spec.akd_weight * weight * loss
        rows = self.ckd(outputs.taps, rois) if self.ckd else None
        if self.ckd and rows is not None:
            factor = ckd_factor(step, self.spec.warmup_steps, self.ckd_stop)
            losses["loss_ckd"] = self.spec.ckd_weight * factor * self.ckd.loss(rows, taught[-1], rois)
        return losses, Trace(features, outputs, proposals, rois, assisted, taught, adapted, rows)

    def sample(self, proposals: Proposals, boxes: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> RoIs:
        """The RoIs of one step: ``proposals`` and ground truth, matched and sampled as the assistant's spec says."""
        return sample_rois(proposals, Truth.of(boxes, labels), self.assistant.spec, self.student.num_classes, generator)
