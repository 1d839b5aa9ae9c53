"""TF-HEAD's assistants: detection heads of other kinds that learn beside the student and teach it, without a teacher."""

from __future__ import annotations

from headkd_ray.job.detector_spec import FCOSHeadSpec, RetinaHeadSpec
from headkd_ray.job.module_specs import Spec
from headkd_ray.job.numbers import Weight
from headkd_ray.job.two_stage_specs import RoIHeadSpec


class FCOSAssistantSpec(Spec):
    """An FCOS head on the student's P3 to P7."""

    head: FCOSHeadSpec = FCOSHeadSpec()
    """The head."""
    gt_weight: Weight = 0.5
    """Weight of its ground-truth losses (class, box, centerness)."""
    ckd_weight: Weight = 1.0
    """Weight of the CKD term: its last classification conv teaches the student's, through one 1x1 conv for all levels."""


class RetinaAssistantSpec(Spec):
    """A RetinaNet head on the student's P3 to P7."""

    head: RetinaHeadSpec = RetinaHeadSpec()
    """The head."""
    gt_weight: Weight = 1.0
    """Weight of its ground-truth losses (class, box)."""
    ckd_weight: Weight = 1.0
    """Weight of the CKD term: its last classification conv teaches the student's, through one 1x1 conv for all levels."""


class RCNNAssistantSpec(Spec):
    """An R-CNN head on the student's P3 to P6, on the RoIs that the student proposes."""

    head: RoIHeadSpec = RoIHeadSpec()
    """The head; its sampler draws the RoIs."""
    gt_weight: Weight = 1.0
    """Weight of its ground-truth losses (class, box)."""
    ckd_weight: Weight = 1.3
    """Weight of the CKD term: its last fully connected layer teaches the student's last classification conv at the cell that
    proposed the RoI."""
    decouple: bool = True
    """One Linear per anchor of a cell between the two (the research branch's for a RetinaNet student), or one for all."""


class AssistantsSpec(Spec):
    """Which assistants there are: any subset; null = not this one, {} = this one with the research branch's weights."""

    fcos: FCOSAssistantSpec | None = None
    """FCOS assistant."""
    rcnn: RCNNAssistantSpec | None = None
    """R-CNN assistant."""
    retinanet: RetinaAssistantSpec | None = None
    """RetinaNet assistant."""
