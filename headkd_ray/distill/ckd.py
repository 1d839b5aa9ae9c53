"""Cross knowledge distillation (CKD): the student's own head imitates the features of a head of another kind.

student  target   compared
maps     rows     the student's map at the anchor cell that proposed a RoI, with the RoI's row (as in the paper)
maps     maps     level by level
rows     rows     RoI by RoI
rows     maps     a RoI's row, with the target's map at the cell that proposed the RoI
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headkd_ray.detectors import DenseDetector, RoIs, TwoStageDetector
from headkd_ray.detectors.base import Losses
from headkd_ray.detectors.head_features import Tap
from headkd_ray.detectors.ops.fixed_size import constant, rows_that_count
from headkd_ray.detectors.ops.losses import mean_squared_error
from headkd_ray.distill.akd import adapter
from headkd_ray.distill.assistants import DenseAssistant
from headkd_ray.distill.distances import DISTANCES, Distance, adapted_distance, distance_of_counted
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.distill.terms import Parts, Term
from headkd_ray.job import Job
from headkd_ray.teacher.source import AnyTeacher

TOWERS = ("cls", "box")
"""The towers of dense heads by their names in ``distill.ckd_towers``, in the order of their taps."""


def read_cells(maps: Sequence[Tensor], image: Tensor, cells: Tensor) -> Tensor:
    """Read the features (R, C) of ``maps`` (B, C, H_l, W_l) at ``cells`` (R, 4: level, y, x, anchor) of ``image`` (R,).

    Several RoIs may read one cell. The lookup is an embedding because, unlike indexing, its backward pass sums repeated rows
    in a fixed order on CPU and GPU. Cells of -1 read any.
    """
    rows = [m.flatten(2).transpose(1, 2) for m in maps]
    table = torch.cat(rows, dim=1)
    starts = constant(list(accumulate((r.shape[1] for r in rows), initial=0)), cells)
    widths = constant([m.shape[3] for m in maps], cells)
    level, y, x, _ = cells.clamp(min=0).unbind(1)
    index = image * table.shape[1] + starts[level] + y * widths[level] + x
    return F.embedding(index, table.flatten(0, 1))


class CKD(Term):
    """The CKD loss: ``loss_ckd`` if a teacher is the target, ``loss_{assistant}_ckd`` if an assistant is.

    It compares the classification towers of dense heads or, with ``tap`` 1, their box towers (``loss_ckd_box``). It trains an
    ``adapter`` from the width of the student's feature to the target's: a 1x1 conv between maps, else a Linear. With
    ``anchors`` > 1 ("decouple") ``adapter`` holds one Linear for each anchor of a cell, side by side, and so has that many
    times the outputs. All are computed and one per row is kept, which avoids sorting the rows by anchor.
    """

    per_assistant = True

    def __init__(
        self,
        adapter: nn.Module,
        anchors: int = 1,
        assistant: str | None = None,
        weight: float = 1.0,
        warmup_steps: int = 0,
        stop: int | None = None,
        tap: int = 0,
        conv: int | None = None,
        distance: Distance = mean_squared_error,
    ) -> None:
        """``assistant`` is the name of the one that is the target; None = the teacher is.

        ``tap`` and ``conv`` are what :meth:`StudentForward.ckd_feature` takes.
        """
        super().__init__(weight, warmup_steps, stop)
        self.adapter = adapter
        self.anchors = anchors
        self.distance = distance
        self.assistant = assistant
        self.tap = tap
        self.conv = conv
        self.reads_teacher = "head" if assistant is None else "nothing"

    @classmethod
    def build_all(cls, parts: Parts, assistant: str) -> list[Term]:
        """Build a term for each of ``distill.ckd_towers``."""
        return [cls.build(parts, assistant, TOWERS.index(tower)) for tower in parts.job.distill.ckd_towers]

    @classmethod
    def problems(cls, job: Job, teacher: AnyTeacher | None) -> list[str]:
        if isinstance(teacher, TwoStageDetector) and "box" in job.distill.ckd_towers:
            return [f"distill.ckd_towers: a {teacher.spec.kind} teacher has no box tower to imitate; use [cls]"]
        return []

    @classmethod
    def build(cls, parts: Parts, assistant: str, tap: int = 0) -> CKD:
        student, plan, spec = parts.student, parts.plans[assistant], parts.job.distill
        helper = parts.assistants[assistant]
        target = helper.head if parts.teacher is None else parts.teacher.detection_head
        own, theirs, anchors = student.detection_head.lead_channels, target.lead_channels, 1
        maps = isinstance(student, DenseDetector) and isinstance(helper, DenseAssistant)
        if isinstance(student, DenseDetector) and not maps and plan.decouple:
            anchors = student.head.anchors.per_cell
        adapt = adapter(own, anchors * theirs, maps, spec.ckd_bias)
        warmup_steps = spec.warmup_steps if spec.warm_ckd else 0
        stop = None if spec.ckd_epochs is None else spec.ckd_epochs * parts.steps_per_epoch
        name = assistant if parts.teacher is None else None
        return cls(adapt, anchors, name, plan.ckd_weight, warmup_steps, stop, tap, spec.ckd_conv, DISTANCES[spec.distance])

    def distances(self, forward: StepForward) -> Losses:
        student = forward.student
        if self.assistant is None:
            output, features = forward.comparison
        else:
            output = forward.assistant(self.assistant)
            features = output.features
        target = features.taps[self.tap] if self.tap else features.lead
        name = "loss_ckd" if self.assistant is None else f"loss_{self.assistant}_ckd"
        own = student.ckd_feature(self.tap, self.conv)
        return {name + ("_box" if self.tap else ""): self.compare(own, target, output.rois(student))}

    def compare(self, own: Tap, target: Tap, rois: RoIs | None) -> Tensor:
        """Return the distance of the student's feature ``own``, adapted, from ``target``, which gets no gradient.

        ``rois`` are those whose rows either side has; None if both are maps. Where cells are read, RoIs that came from no cell
        (ground-truth boxes) are left out on both sides.
        """
        if isinstance(own, Tensor) == isinstance(target, Tensor):
            return adapted_distance(self.distance, self.adapter, own, target, None if rois is None else rois.counted)
        assert rois is not None
        if isinstance(target, Tensor):
            assert not isinstance(own, Tensor)
            counted, (target, image, cells) = rows_that_count(rois.from_proposal, target, rois.image, rois.cells)
            adapted = self.adapt(read_cells(own, image, cells), cells[:, 3])
            return distance_of_counted(self.distance, adapted, target, counted)
        assert isinstance(own, Tensor)
        counted, (own, image, cells) = rows_that_count(rois.from_proposal, own, rois.image, rois.cells)
        # The RPN's level i (P2 to P6) has half the stride of the dense head's level i (P3 to P7), so coordinates are halved.
        # The anchors are equally large: 8 cells of the one are 4 of the other.
        level, y, x, anchor = cells.unbind(1)
        cells = torch.stack([level, y // 2, x // 2, anchor], dim=1)
        return distance_of_counted(self.distance, self.adapter(own), read_cells(target, image, cells), counted)

    def rows(self, taps: Sequence[Tensor], rois: RoIs) -> Tensor:
        """Return S (R', width), the student's maps ``taps`` at the anchor cells of the ``rois`` that came from one."""
        kept = rois.from_proposal
        return read_cells(taps, rois.image[kept], rois.cells[kept])

    def adapt(self, rows: Tensor, anchor: Tensor) -> Tensor:
        """Adapt ``rows`` (R', width), whose RoIs came from ``anchor`` (R',) of their cells, to (R', target_width)."""
        adapted = self.adapter(rows).unflatten(1, (self.anchors, -1))
        if self.anchors == 1:
            return adapted.squeeze(1)
        return adapted.gather(1, anchor.clamp(min=0)[:, None, None].expand(-1, 1, adapted.shape[2])).squeeze(1)
