"""Conversion of a teacher's soft targets, computed beforehand, into the RoIs and features that a training step compares."""

from __future__ import annotations

import torch

from headkd_ray.detectors import DenseDetector, RoIs
from headkd_ray.detectors.head_features import HeadFeatures
from headkd_ray.detectors.ops.fixed_size import fixed_size
from headkd_ray.detectors.ops.rois import marked, places
from headkd_ray.distill.student import StudentForward
from headkd_ray.soft_targets import SoftTargets


@torch.no_grad()
def chosen_rois(targets: SoftTargets, forward: StudentForward) -> RoIs:
    """Return the RoIs of ``targets``, all labelled as background because no loss reads labels at them.

    No anchor proposed them, so their cells are those of the student's nearest anchors. Ground-truth boxes have no cell, as
    among the RoIs that a student proposes.
    """
    student = forward.student
    assert isinstance(student, DenseDetector)  # the job's own checks
    cells = student.head.nearest_cells(forward.outputs, targets.boxes.flatten(0, 1)).unflatten(0, targets.truth.shape)
    cells = cells.masked_fill(targets.truth.unsqueeze(-1), -1)
    padded = fixed_size(cells)
    image, place = places(targets.valid, padded)
    boxes = targets.boxes[image, place]
    background = torch.full_like(image, student.num_classes)
    rois = RoIs(boxes, image, cells[image, place], labels=background, targets=boxes, weights=boxes.new_ones(len(boxes)))
    return marked(rois, targets.valid) if padded else rois


def chosen_features(targets: SoftTargets) -> HeadFeatures:
    """Return the teacher's features at :func:`chosen_rois`, row for row."""
    rows = targets.taps.transpose(1, 2)  # (B, K, L, D)
    rows = rows.flatten(0, 1) if fixed_size(rows) else rows[targets.valid]
    taps = list(rows.unbind(1))
    return HeadFeatures(taps, taps[-1])
