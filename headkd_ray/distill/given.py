"""RoIs that a teacher chose beforehand, made into what a step compares."""

from __future__ import annotations

import torch

from headkd_ray.detectors import DenseDetector, RoIs
from headkd_ray.distill.assistants import Insight
from headkd_ray.distill.scene import Scene
from headkd_ray.targets import SoftTargets


@torch.no_grad()
def given_rois(targets: SoftTargets, student: DenseDetector, scene: Scene) -> RoIs:
    """The targets' RoIs; all count as background, for nobody learns from labels at them.

    No anchor proposed them: their cells are those of the student's anchors that are nearest. Ground-truth boxes have none, as
    among the RoIs that a student proposes.
    """
    cells = student.head.nearest_cells(scene.outputs, targets.boxes.flatten(0, 1)).unflatten(0, targets.truth.shape)
    cells = cells.masked_fill(targets.truth.unsqueeze(-1), -1)
    image, place = targets.valid.nonzero(as_tuple=True)
    boxes = targets.boxes[image, place]
    background = torch.full_like(image, student.num_classes)
    return RoIs(boxes, image, cells[image, place], labels=background, targets=boxes)


def given_insight(targets: SoftTargets) -> Insight:
    """What the teacher said about :func:`given_rois`, row for row."""
    rows = targets.taps.transpose(1, 2)[targets.valid]  # (R, L, D)
    taps = list(rows.unbind(1))
    return Insight(taps, taps[-1])
