"""One training step of a golden file's model, with every value that the file may hold recorded by its official name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headkd_ray.detectors import (
    DenseDetector,
    DenseHead,
    GroundTruth,
    Proposals,
    PyramidDetector,
    RoIHead,
    RoIs,
    StageOutput,
    TwoStageDetector,
)
from headkd_ray.detectors.base import DenseOutputs, Losses
from headkd_ray.detectors.head_features import Tap
from headkd_ray.detectors.ops.boxes import decode
from headkd_ray.detectors.rpn import RPN
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.assistant_loss import AssistantLoss
from headkd_ray.distill.assistants import RoIAssistant
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.distill.student import StudentForward
from headkd_ray.golden import official_names as names
from headkd_ray.golden.conventions import ALL, file_rois, own_losses, own_rois
from headkd_ray.golden.file import Golden
from headkd_ray.golden.pair_jobs import OfficialModel
from headkd_ray.golden.proposed import Proposed
from headkd_ray.job import RoIHeadSpec
from headkd_ray.teacher.frozen import FrozenTeacher, TeacherForward


@dataclass
class Recorded:
    """Our values of a training step."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    """Losses by the official code's names; with ``total`` once it is known."""
    notes: dict[str, str] = field(default_factory=dict)
    """Remarks on losses, by the same names."""
    features: list[Tensor] = field(default_factory=list)
    """The student's pyramid."""
    proposed: Proposed | None = None
    own_rois: RoIs | None = None
    """The RoIs that the student proposes, of which the file's are some or all."""
    rois: RoIs | None = None
    """The same as the file has them, at which everything with a row for each is computed."""
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    """Features (R, C) with a row for each of ``rois``, by official name; one name may stand for several."""
    cell_rows: dict[str, list[Tensor]] = field(default_factory=dict)
    """Values (R', ...) with a row for each of ``rois`` that came from a cell."""
    maps: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    """Feature maps (B, C, H, W) by level."""
    accuracies: dict[str, StageOutput] = field(default_factory=dict)
    """What the official code computes an accuracy of, by its name among the losses."""

    def add(self, name: str, tap: Tap) -> None:
        """Record a feature of all RoIs or of all levels."""
        for each in (name, f"{name}_detached"):
            if isinstance(tap, Tensor):
                self.rows.setdefault(each, []).append(tap)
            else:
                self.maps.setdefault(each, []).append(tap)
        if not isinstance(tap, Tensor):
            self.maps.setdefault(f"{name}_reshaped", []).append([level.permute(0, 2, 3, 1) for level in tap])


def training_step(
    golden: Golden, official: OfficialModel, teacher: PyramidDetector | None, x: Tensor, sizes: Tensor
) -> Recorded:
    """Compute the losses of a training step on normalised images ``x`` (B, 3, H, W) with unpadded (h, w) ``sizes`` (B, 2)."""
    return _Step(golden, official, teacher, x, sizes).run()


class _Step:
    """The step while it is computed; each method adds what it computes to ``record``."""

    def __init__(
        self, golden: Golden, official: OfficialModel, teacher: PyramidDetector | None, x: Tensor, sizes: Tensor
    ) -> None:
        self.golden = golden
        self.model = official.model.train()
        self.official = official.assistants
        self.teacher = teacher
        self.x = x
        self.truth = golden.truth(sizes)
        self.step = int(golden.tensor("step")) if golden.has("step") else 0
        self.record = Recorded()

    def run(self) -> Recorded:
        for assistant in self.model.assistants.values():
            if isinstance(assistant, RoIAssistant):
                assistant.sample = self._sample
                _take_all(assistant.head)
        student = self.model.student
        assert isinstance(student, DenseDetector | TwoStageDetector)
        outputs = self._dense(student) if isinstance(student, DenseDetector) else self._two_stage(student)
        answers = None if self.teacher is None else TeacherForward(FrozenTeacher(self.teacher), self.x)
        forward = StepForward(outputs, self.model.assistants, answers)  # type: ignore[arg-type]
        for term in self.model.terms:
            if isinstance(term, AssistantLoss):
                self._assistant(term, forward)
            elif isinstance(term, AKD):
                self._akd(term, forward)
            elif isinstance(term, CKD):
                self._ckd(term, forward)
        if self.record.rois is not None:
            self._cells(self.record.rois)
        return self.record

    def _dense(self, student: DenseDetector) -> StudentForward:
        forward, head = StudentForward.run(student, self.x, self.truth, None), student.head
        assert forward.outputs is not None
        outputs: DenseOutputs = forward.outputs
        wanted = self.golden.scalars("losses_json")
        has_suffix = any(name.endswith("_rpn") for name in wanted) if wanted else bool(self.official)
        self._own_losses(head, lambda: renamed(head.losses(outputs, self.truth), "loss_", "_rpn" if has_suffix else ""))
        best = [m.unflatten(1, (-1, student.num_classes)).amax(2).sigmoid().detach() for m in outputs.logits]
        self.record.features = forward.pyramid
        self.record.proposed = Proposed.of(
            head.proposals(outputs, self.truth.sizes),
            head.spec.proposals,
            best,
            head.box_maps(outputs),
            head.decode,
            head.anchors,
            self.truth.sizes,
        )
        return forward

    def _two_stage(self, student: TwoStageDetector) -> StudentForward:
        """Run the student as ``StudentForward.run`` does, but with every candidate sampled, at the RoIs of the file."""
        rpn, pyramid = student.rpn, student.features(self.x)
        outputs = rpn(pyramid)
        rpn.spec = rpn.spec.replace({"sampler": ALL})
        _take_all(student.roi)
        self._own_losses(rpn, lambda: renamed(rpn.losses(outputs, self.truth), "loss_"))
        proposals, rules = rpn.proposals(outputs, self.truth.sizes), rpn.spec.train_proposals
        best = [m.sigmoid().detach() for m in outputs.logits]
        to_boxes = partial(decode, clamp_shrink=rpn.spec.clamp_shrink)
        self.record.features = pyramid
        self.record.proposed = Proposed.of(proposals, rules, best, outputs.deltas, to_boxes, rpn.anchors, self.truth.sizes)
        rois = self._sample(proposals, self.truth, student.roi.stages[0].spec, student.num_classes)
        stages = student.roi.stage_outputs(pyramid, rois, self.truth)
        losses = student.roi.losses(stages)
        self.record.losses |= renamed(losses)
        self._accuracies(student.roi, stages, "")
        taps = [tap for stage in stages for tap in stage.outputs.taps]
        for name, tap in zip(names.feature_names(student.roi), taps, strict=True):
            self.record.add(name, tap)
        return StudentForward.of_stages(student, self.truth, losses, pyramid, stages)

    def _sample(
        self,
        proposals: Proposals,
        truth: GroundTruth,
        spec: RoIHeadSpec,
        num_classes: int,
        generator: torch.Generator | None = None,
    ) -> RoIs:
        """Return the RoIs that the file chose, with its boxes."""
        self.record.own_rois = own_rois(self.golden, proposals, truth, num_classes, spec.positive_iou)
        self.record.rois = file_rois(self.golden, self.record.own_rois)
        return self.record.rois

    def _own_losses(self, head: DenseHead[Any] | RPN, compute: Callable[[], Losses]) -> None:
        losses, notes = own_losses(self.golden, self.x, head, compute)
        self.record.losses |= losses
        self.record.notes |= notes

    def _assistant(self, term: AssistantLoss, forward: StepForward) -> None:
        official = self.official[term.assistant]
        head, suffix = self.model.assistants[term.assistant].head, names.assistant_suffix(official)

        def compute(forward: StepForward) -> Losses:
            return renamed(term(forward, self.step), f"loss_{term.assistant}_", suffix)

        assert isinstance(head, DenseHead | RoIHead)
        if isinstance(head, DenseHead):
            self._own_losses(head, lambda: compute(StepForward(forward.student, self.model.assistants)))  # type: ignore[arg-type]
        else:
            self.record.losses |= compute(forward)
            self._accuracies(head, forward.assistant(term.assistant).stages, suffix)
        for name, tap in zip(names.feature_names(head), forward.assistant(term.assistant).features.taps, strict=True):
            self.record.add(name, tap)
        if self.teacher is not None:
            taught = forward.comparison.teacher.taps
            for name, tap in zip(names.feature_names(self.teacher.detection_head), taught, strict=True):
                self.record.add(f"teacher_{name}", tap)

    def _accuracies(self, head: RoIHead, stages: Sequence[StageOutput], suffix: str) -> None:
        for number, stage in enumerate(stages):
            self.record.accuracies[(f"s{number}.acc" if len(head.stages) > 1 else "acc") + suffix] = stage

    def _akd(self, term: AKD, forward: StepForward) -> None:
        (assistant,) = self.model.assistants.values()
        head, taps = assistant.head, forward.comparison.assistant.features.taps
        assert isinstance(head, DenseHead | RoIHead)
        self.record.losses |= dict(zip(names.akd_losses(head), term(forward, self.step).values(), strict=True))
        for name, adapter, tap in zip(names.feature_names(head), term.adapters, taps, strict=True):
            adapted = adapter(tap) if isinstance(tap, Tensor) else [adapter(level) for level in tap]
            self._adapted(name, adapted)

    def _ckd(self, term: CKD, forward: StepForward) -> None:
        towers = sum(isinstance(other, CKD) for other in self.model.terms)
        assistant = None if term.assistant is None else self.official[term.assistant]
        (loss,) = term(forward, self.step).values()
        self.record.losses[names.ckd_loss(assistant, towers, term.tap)] = loss
        student = forward.student
        own = student.ckd_feature(term.tap, term.conv)
        if isinstance(own, Tensor):
            self.record.add("rcnn_bbox_adapted", term.adapter(own))
            return
        detector = student.student
        assert isinstance(detector, DenseDetector)
        name = names.feature_names(detector.head)[term.tap]
        self.record.add(name, own)
        output = forward.comparison.assistant if term.assistant is None else forward.assistant(term.assistant)
        rois = output.rois(student)
        if rois is None:
            self._adapted(name, [term.adapter(level) for level in own])
        else:
            rows = term.rows(own, rois)
            anchor = rois.cells[rois.from_proposal, 3]
            self.record.cell_rows |= {f"{name}_indexed": [rows], f"{name}_decoupled": [term.adapt(rows, anchor)]}

    def _adapted(self, name: str, tap: Tap) -> None:
        self.record.add(f"{name}_adapted", tap)
        if self.teacher is not None and not isinstance(tap, Tensor):
            self.record.add(name, tap)  # in the configs of RepPoints the adapted feature takes over the name

    def _cells(self, rois: RoIs) -> None:
        """Record whose the rows are, and those of all features of RoIs without ground-truth boxes."""
        kept = rois.from_proposal
        level, y, x, anchor = rois.cells[kept].unbind(1)
        self.record.rows["bbox_ids"] = [torch.cat([rois.image[:, None], rois.cells], dim=1)]
        self.record.cell_rows |= {
            "bbox_poses": [torch.stack([level, rois.image[kept], y, x], dim=1)],
            "anchor_ids": [anchor],
        }
        for name, taps in self.record.rows.items():
            self.record.cell_rows[f"{name}_filtered"] = [tap[kept] for tap in taps if len(tap) == len(kept)]


def renamed(losses: Losses, prefix: str = "", suffix: str = "") -> Losses:
    """Return ``losses``, whose names here start with ``prefix``, by their official names, which end with ``suffix``."""
    return {names.loss_name(name.removeprefix(prefix)) + suffix: loss for name, loss in losses.items()}


def _take_all(head: RoIHead) -> None:
    """Let each stage sample every candidate, as the files' samplers do."""
    for stage in head.stages:
        stage.spec = stage.spec.replace({"sampler": ALL})
