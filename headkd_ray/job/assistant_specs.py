"""Define the keys of TF-HEAD's assistants: heads of other kinds that are trained with the student and distilled into it."""

from __future__ import annotations

from headkd_ray.job.detector_spec import FCOSHeadSpec, RetinaHeadSpec
from headkd_ray.job.module_specs import Spec
from headkd_ray.job.numbers import Weight
from headkd_ray.job.two_stage_specs import RoIHeadSpec


class FCOSAssistantSpec(Spec):
    """An FCOS head on the student's P3 to P7."""

    head: FCOSHeadSpec = FCOSHeadSpec()
    """Architecture of the head."""
    gt_weight: Weight = 0.5
    """Weight of its ground-truth losses (class, box, centerness)."""
    ckd_weight: Weight = 1.0
    """Weight of the CKD term: its last classification conv teaches the student's, through one 1x1 conv for all levels."""


class RetinaAssistantSpec(Spec):
    """A RetinaNet head on the student's P3 to P7."""

    head: RetinaHeadSpec = RetinaHeadSpec()
    """Architecture of the head."""
    gt_weight: Weight = 1.0
    """Weight of its ground-truth losses (class, box)."""
    ckd_weight: Weight = 1.0
    """Weight of the CKD term: its last classification conv teaches the student's, through one 1x1 conv for all levels."""


class RCNNAssistantSpec(Spec):
    """An R-CNN head on the student's P3 to P6, on the RoIs that the student proposes."""

    head: RoIHeadSpec = RoIHeadSpec()
    """Architecture of the head; its sampler draws the RoIs."""
    gt_weight: Weight = 1.0
    """Weight of its ground-truth losses (class, box)."""
    ckd_weight: Weight = 1.3
    """Weight of the CKD term: its last fully connected layer teaches the student's last classification conv at the cell that
    proposed the RoI."""
    decouple: bool = True
    """Whether CKD's Linear between the two layers is one per anchor of a cell (the research branch's for a RetinaNet student)
    or one for all anchors."""


class AssistantsSpec(Spec):
    """The assistants of a run, any subset: null = without this one, {} = this one with the research branch's weights."""

    fcos: FCOSAssistantSpec | None = None
    """The FCOS assistant."""
    rcnn: RCNNAssistantSpec | None = None
    """The R-CNN assistant."""
    retinanet: RetinaAssistantSpec | None = None
    """The RetinaNet assistant."""
