"""HEAD: a student learns through an assistant of the teacher's kind on its own pyramid (Wang et al., ECCV 2022,
arXiv 2207.05345).

The assistant (trained, thrown away after) and the frozen teacher look at the same RoIs or levels; a dense student is the one
that proposes the RoIs. With soft targets AKD and CKD look at the RoIs that these are for (``given.py``); the assistant learns
from labels at the student's all the same.

    L = L_student + a L_assistant + b w(t) sum_l distance(A_l, T_l) + c w(t) [t < stop] distance(S, T)
                    assist, copy_only   akd                           head

Of the paper's pair A_l and T_l are the fully connected layers, S the student's last classification conv at a RoI's anchor cell
and T the teacher's last fully connected layer; ``assistants.py`` and ``ckd.py`` say what they are for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headkd_ray.detectors import DenseDetector, Detector, RoIs
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.assistants import Advice, Assistant, Insight, RoIAssistant
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.given import given_insight, given_rois
from headkd_ray.distill.scene import Pick, Scene, observe
from headkd_ray.distill.trainee import Trainee, ckd_factor, warmup
from headkd_ray.job import DistillSpec
from headkd_ray.targets import SoftTargets

Ask = Callable[[Sequence[RoIs], torch.device], Insight]
"""From RoIs, stage by stage (none for a dense teacher), to what the teacher says about them, on a device."""


class Trace(NamedTuple):
    """What a step computed on its way to the losses; for inspection."""

    scene: Scene
    advice: Advice
    """The assistant's, at the RoIs that it is compared at."""
    taught: Insight | None
    """The teacher's; None without one."""


class HEAD(Trainee):
    """Methods assist (no teacher), copy_only (assistant's weights copied), akd (``akd`` given), head (``ckd`` too)."""

    def __init__(
        self,
        student: Detector,
        assistant: Assistant,
        spec: DistillSpec,
        teacher: Detector | None = None,
        akd: AKD | None = None,
        ckd: CKD | None = None,
        ckd_stop: int | None = None,
    ) -> None:
        """``akd`` and ``ckd`` need a ``teacher``, or its targets in every step; CKD has weight 0 from step ``ckd_stop`` on."""
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
        targets: SoftTargets | None = None,
        ask: Ask | None = None,
    ) -> dict[str, Tensor]:
        """As :meth:`Trainee.forward`. AKD and CKD compare with ``targets``, at their RoIs, if there are any; ``ask``, if given,
        answers for the teacher."""
        x = self.student.normalise(images, sizes)
        teacher_x = self._guest.view(images, sizes, x, self.student) if self._guest else x
        return self.trace(x, teacher_x, sizes, boxes, labels, step, generator, targets=targets, ask=ask)[0]

    def trace(
        self,
        x: Tensor,
        teacher_x: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        step: int,
        generator: torch.Generator | None = None,
        pick: Pick | None = None,
        targets: SoftTargets | None = None,
        ask: Ask | None = None,
    ) -> tuple[dict[str, Tensor], Trace]:
        """One step from normalised images ``x`` (B, 3, H, W) to weighted losses, and what lies between.

        Arguments as in :meth:`Trainee.forward`; ``pick`` as in :func:`observe`.
        """
        losses, scene = observe(self.student, x, sizes, boxes, labels, generator, pick)
        advice = self.assistant(scene)
        weight = warmup(step, self.spec.warmup_steps)
        gt_weight = self.spec.assistant_weight * (weight if self.spec.warm_assistant else 1.0)
        for name, loss in advice.losses.items():
            losses[f"loss_assist_{name}"] = gt_weight * loss
        if targets is not None:
            assert isinstance(self.student, DenseDetector) and isinstance(self.assistant, RoIAssistant)
            # Not for the assistant's own losses: RoIs that were chosen beforehand do not follow what the student gets wrong,
            # and cost AP there (docs/results.md).
            rois = given_rois(targets, self.student, scene)
            advice, taught = self.assistant.at(scene, rois), given_insight(targets)
        elif ask is not None:
            taught = ask([look.rois for look in advice.looks], x.device)
        elif self._guest is not None:
            taught = self._guest.insight(teacher_x, [look.rois for look in advice.looks])
        else:
            assert self.akd is None and self.ckd is None, "nobody answers for the teacher"
            return losses, Trace(scene, advice, None)
        if self.akd is not None:
            for i, loss in enumerate(self.akd(advice.insight.taps, taught.taps), start=1):
                losses[f"loss_akd_{i}"] = self.spec.akd_weight * weight * loss
        if self.ckd is not None:
            factor = ckd_factor(step, self.spec.warmup_steps, self.ckd_stop)
            losses["loss_ckd"] = self.spec.ckd_weight * factor * self.ckd(scene.tap, taught.lead, advice.rois(scene))
        return losses, Trace(scene, advice, taught)
