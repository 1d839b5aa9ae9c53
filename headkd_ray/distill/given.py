"""RoIs that a teacher chose beforehand, made into what a step compares."""

from __future__ import annotations

import torch

from headkd_ray.detectors import DenseDetector, RoIs
from headkd_ray.detectors.matching import match
from headkd_ray.detectors.rois import Candidates, choose
from headkd_ray.detectors.sampling import Sample
from headkd_ray.distill.assistants import Insight
from headkd_ray.distill.scene import Scene
from headkd_ray.job import RoIHeadSpec
from headkd_ray.targets import SoftTargets


@torch.no_grad()
def given_rois(targets: SoftTargets, student: DenseDetector, scene: Scene, spec: RoIHeadSpec) -> RoIs:
    """The targets' RoIs, labelled by ``spec`` with what the student's ``scene`` knows of the truth.

    No anchor proposed them: their cells are those of the student's anchors that are nearest. Ground-truth boxes have none, as
    among the RoIs that a student proposes.
    """
    truth = scene.truth
    matched = match(targets.boxes, truth, spec.positive_iou, spec.positive_iou, valid=targets.valid)
    cells = student.head.nearest_cells(scene.outputs, targets.boxes.flatten(0, 1)).unflatten(0, matched.shape)
    own = torch.full_like(cells, -1)
    own[..., 3] = matched
    cells = torch.where(targets.truth.unsqueeze(-1), own, cells)
    pool = Candidates(targets.boxes, cells, matched, targets.valid)
    places = torch.arange(matched.shape[1], device=matched.device).expand(matched.shape)
    return choose(pool, Sample(places, targets.valid), truth, student.num_classes)


def given_insight(targets: SoftTargets) -> Insight:
    """What the teacher said about :func:`given_rois`, row for row."""
    rows = targets.taps.transpose(1, 2)[targets.valid]  # (R, L, D)
    taps = list(rows.unbind(1))
    return Insight(taps, taps[-1])
