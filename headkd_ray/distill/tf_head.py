"""TF-HEAD: a student learns from assistants of other kinds, without a teacher (Wang et al., ECCV 2022; branch ``dev``).

    L = L_student + sum over assistants a of  w(t) (g_a L_a + c_a [t < stop] CKD_a)

CKD_a is the mean squared distance of the student's features, adapted, from the assistant's, which carry no gradient there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors import FCOS, RetinaNet
from headkd_ray.distill.assistants import DenseAssistant, RoIAssistant, Scene
from headkd_ray.distill.trainee import Trainee, ckd_factor, warmup


class Weights(NamedTuple):
    """Of one assistant's losses."""

    gt: float
    ckd: float


class TFHEAD(Trainee):
    """Method tf_head."""

    student: RetinaNet | FCOS

    def __init__(
        self,
        student: RetinaNet | FCOS,
        assistants: Mapping[str, DenseAssistant | RoIAssistant],
        weights: Mapping[str, Weights],
        warmup_steps: int,
        ckd_stop: int | None,
    ) -> None:
        """``ckd_stop``: optimizer step from which on CKD has weight 0; None = never. ``weights`` has the assistants' names."""
        super().__init__(student)
        self.assistants = nn.ModuleDict(assistants)
        self.weights = dict(weights)
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
        features = self.student.features(self.student.normalise(images, sizes))
        outputs = self.student.head(features)
        losses = self.student.head.losses(outputs, sizes, boxes, labels)

        proposes = any(isinstance(assistant, RoIAssistant) for assistant in self.assistants.values())
        proposals = self.student.head.proposals(outputs, sizes) if proposes else None
        scene = Scene(features, outputs.taps, proposals, sizes, boxes, labels, generator)
        gt, ckd = warmup(step, self.warmup_steps), ckd_factor(step, self.warmup_steps, self.ckd_stop)
        for name, assistant in self.assistants.items():
            advice = assistant(scene)
            for part, loss in advice.losses.items():
                losses[f"loss_{name}_{part}"] = gt * self.weights[name].gt * loss
            losses[f"loss_{name}_ckd"] = ckd * self.weights[name].ckd * advice.ckd
        return losses
