"""TF-HEAD: a student learns from assistants of other kinds, without a teacher (Wang et al., ECCV 2022; branch ``dev``).

    L = L_student + sum over assistants a of  w(t) (g_a L_a + c_a [t < stop] CKD_a)

CKD_a is the mean squared distance of the student's features, adapted, from the assistant's, which carry no gradient there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors import Detector
from headkd_ray.distill.assistants import Assistant
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.scene import observe
from headkd_ray.distill.trainee import Trainee, ckd_factor, warmup


class Member(NamedTuple):
    """An assistant and what its losses weigh."""

    assistant: Assistant
    ckd: CKD
    gt_weight: float
    ckd_weight: float


class TFHEAD(Trainee):
    """Method tf_head."""

    def __init__(self, student: Detector, members: Mapping[str, Member], warmup_steps: int, ckd_stop: int | None) -> None:
        """``ckd_stop``: optimizer step from which on CKD has weight 0; None = never."""
        super().__init__(student)
        self.assistants = nn.ModuleDict({name: member.assistant for name, member in members.items()})
        self.ckds = nn.ModuleDict({name: member.ckd for name, member in members.items()})
        self.members = dict(members)
        self.warmup_steps = warmup_steps
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
        losses, scene = observe(self.student, x, sizes, boxes, labels, generator)
        gt, ckd = warmup(step, self.warmup_steps), ckd_factor(step, self.warmup_steps, self.ckd_stop)
        for name, member in self.members.items():
            advice = member.assistant(scene)
            for part, loss in advice.losses.items():
                losses[f"loss_{name}_{part}"] = gt * member.gt_weight * loss
            imitation = member.ckd(scene.tap, advice.insight.lead, advice.rois(scene))
            losses[f"loss_{name}_ckd"] = ckd * member.ckd_weight * imitation
        return losses
