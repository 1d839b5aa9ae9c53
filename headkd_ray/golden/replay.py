"""Replay of a golden file's training step: load its state dicts with the mmdet loader, then compute losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from headkd_ray.detectors import (
    KINDS,
    DenseDetector,
    Detections,
    Detector,
    FasterRCNN,
    GroundTruth,
    Proposals,
    RetinaNet,
    RoIs,
    StageOutput,
    TwoStageDetector,
)
from headkd_ray.detectors.head_features import Tap
from headkd_ray.detectors.roi_head import BoxOutputs
from headkd_ray.detectors.weights import LoadedDetector
from headkd_ray.detectors.weights.mmdet import MMDetModel, load_mmdet_model
from headkd_ray.detectors.weights.mmdet_names import mmdet_names
from headkd_ray.distill import TrainingModel
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.assistant_loss import AssistantLoss
from headkd_ray.distill.assistants import RoIAssistant
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.methods import ASSIST
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.distill.student import StudentForward
from headkd_ray.errors import CheckpointError, DataError
from headkd_ray.golden.conventions import ALL, golden_rois, own_losses
from headkd_ray.golden.file import Golden
from headkd_ray.golden.proposed import Proposed
from headkd_ray.job import DistillSpec, RoIHeadSpec
from headkd_ray.teacher.frozen import FrozenTeacher, TeacherForward

_OWN_LOSSES: dict[type[Detector], dict[str, str]] = {
    RetinaNet: {"loss_cls": "loss_cls", "loss_box": "loss_bbox"},
    FasterRCNN: {
        "loss_rpn_cls": "loss_rpn_cls",
        "loss_rpn_box": "loss_rpn_bbox",
        "loss_roi_cls": "loss_cls",
        "loss_roi_box": "loss_bbox",
    },
}
"""{our name: the official one} of the losses of every kind of student that can be replayed."""
_HEAD_LOSSES = {
    "loss_cls": "loss_cls_rpn",
    "loss_box": "loss_bbox_rpn",
    "loss_assist_cls": "loss_cls",
    "loss_assist_box": "loss_bbox",
    "loss_akd_1": "loss_mimic_rcnn_aux",
    "loss_akd_2": "loss_mimic_rcnn",
    "loss_ckd": "loss_cross",
}


@dataclass
class Replay:
    """Our values of everything that a golden file may hold."""

    student: LoadedDetector
    teacher: LoadedDetector | None
    device: torch.device
    """Device on which the values were computed."""
    losses: dict[str, float] = field(default_factory=dict)
    """Losses by the official code's names, with ``total``."""
    notes: dict[str, str] = field(default_factory=dict)
    """Remarks on losses, by the same names."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of the total, by mmdet's parameter names."""
    features: list[Tensor] = field(default_factory=list)
    proposed: Proposed | None = None
    rois: RoIs | None = None
    roi_outputs: BoxOutputs | None = None
    teacher_taps: Sequence[Tap] = ()
    """The teacher's features T1, T2 of docs/method.md."""
    akd_adapted: list[Tensor] = field(default_factory=list)
    """The assistant's adapted features Lin1(A1), Lin2(A2) of docs/method.md."""
    ckd_rows: Tensor | None = None
    """The student's features S of docs/method.md."""
    ckd_adapted: Tensor | None = None
    """The student's adapted features Lin3(S) of docs/method.md."""
    evaluations: list[tuple[str, list[Tensor], Detections]] = field(default_factory=list)
    """A note, the pyramid and the detections in eval mode for each convention that could apply, the plain one first."""
    teacher_features: list[Tensor] = field(default_factory=list)
    teacher_detections: Detections | None = None

    def evaluate(self, note: str, x: Tensor, sizes: Tensor) -> None:
        """Add an evaluation of the student in its present state."""
        detector = self.student.detector.eval()
        with torch.no_grad():
            self.evaluations.append((note, detector.features(x), detector.detect(x, sizes)))


def replay(golden: Golden, device: torch.device | str = "cpu", precision: str = "fp32") -> Replay:
    """Load the models of a golden file and compute its training step again.

    Args:
        device: where to compute (on a GPU without TF32); the values of the replay are on the CPU.
        precision: fp32, or bf16 as in ``optim.precision``.

    Raises:
        CheckpointError, DataError: the state dicts are not of a model that can be replayed.
    """
    device = torch.device(device)
    with _exact(device), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return on_cpu(_replay(golden, device))


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Compute in true float32 on a GPU, where convolutions use TF32 by default."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def on_cpu(value: Any) -> Any:
    """Copy a nested value with all its tensors on the CPU, bfloat16 ones as float32; modules stay on their device."""
    if isinstance(value, Tensor):
        return value.cpu().float() if value.dtype == torch.bfloat16 else value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(on_cpu, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_cpu, value))
    if isinstance(value, (Replay, Proposed)):
        return replace(value, **{each.name: on_cpu(getattr(value, each.name)) for each in fields(value)})
    return value


def _replay(golden: Golden, device: torch.device) -> Replay:
    state, teacher_state = golden.state("student"), golden.state("teacher")
    student = load_mmdet_model(state, source=f"{golden.source}: student")
    teacher = load_mmdet_model(teacher_state, source=f"{golden.source}: teacher").loaded if teacher_state else None
    run = Replay(student.loaded, teacher, device)
    detector = student.loaded.detector
    if type(detector) not in _OWN_LOSSES:
        known = " and ".join(kind.spec.model_fields["kind"].default for kind in KINDS if kind.detector in _OWN_LOSSES)
        raise CheckpointError(f"{golden.source}: a step of a {detector.spec.kind} cannot be replayed, only those of {known}")
    model = _training_model(golden, student, teacher)
    for part in (detector, student.assistant, *student.adapters.values(), teacher.detector if teacher else None):
        if part is not None:
            part.to(device)
    x, sizes = golden.tensor("images").to(device), golden.tensor("image_sizes").long().to(device)

    run.evaluate("", x, sizes)
    detector.train()
    if model is not None:
        losses = _head_step(run, model.train(), teacher, golden, x, sizes)
    elif isinstance(detector, DenseDetector):
        losses = _dense_step(run, detector, golden, x, sizes)
    else:
        losses = _two_stage_step(run, detector, golden, x, sizes)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    run.losses = {name: float(loss.detach()) for name, loss in {**losses, "total": total}.items()}
    run.gradients = _gradients(student, mmdet_names(state))

    if any(isinstance(m, _BatchNorm) and m.training for m in detector.modules()):
        # The official values in eval mode may then have been taken after the step had updated the running statistics, or even
        # after a second forward pass in train mode, which recorded the pyramid.
        run.evaluate("after one update of the running statistics", x, sizes)
        with torch.no_grad():
            detector.train().features(x)
        run.evaluate("after two updates of the running statistics", x, sizes)
    if teacher is not None:
        with torch.no_grad():
            run.teacher_features = teacher.detector.eval().features(x)
        run.teacher_detections = teacher.detector.detect(x, sizes)
    return run


def _training_model(golden: Golden, student: MMDetModel, teacher: LoadedDetector | None) -> TrainingModel | None:
    """Build HEAD from the loaded parts, with its assistant at the RoIs that the file chose; None for a plain detector."""
    if student.assistant is None or not isinstance(student.loaded.detector, DenseDetector):
        return None
    layers, spec = student.assistant.spec.fcs, DistillSpec()
    akd = [a for number, a in student.adapters.items() if number < layers]
    ckd = [a for number, a in student.adapters.items() if number >= layers]
    if student.adapters and teacher is None:
        raise DataError(f"{golden.source}: has student/_distiller._adapts.*, but no teacher/... to distill from")
    if len(akd) not in (0, layers) or len(ckd) > 1 or (akd and layers != 2):
        raise DataError(
            f"{golden.source}: adapters {sorted(student.adapters)} do not fit HEAD with {layers} fully connected layers"
        )

    def sample(
        proposals: Proposals, truth: GroundTruth, roi: RoIHeadSpec, num_classes: int, generator: torch.Generator | None
    ) -> RoIs:
        return golden_rois(golden, proposals, truth, num_classes, roi.positive_iou)

    terms = [
        AssistantLoss(ASSIST, spec.assistant_weight),
        *([AKD(akd, spec.akd_weight, spec.warmup_steps)] if akd else []),
        *(CKD(adapter, weight=spec.ckd_weight, warmup_steps=spec.warmup_steps) for adapter in ckd),
    ]
    return TrainingModel(student.loaded.detector, {ASSIST: RoIAssistant(student.assistant, sample)}, terms)


def _head_step(
    run: Replay, model: TrainingModel, teacher: LoadedDetector | None, golden: Golden, x: Tensor, sizes: Tensor
) -> dict[str, Tensor]:
    student, truth = model.student, golden.truth(sizes)
    assert isinstance(student, DenseDetector)  # _training_model's condition
    answers = None if teacher is None else TeacherForward(FrozenTeacher(teacher.detector), x)
    forward = StepForward(StudentForward.run(student, x, truth, None), model.assistants, answers)  # type: ignore[arg-type]
    losses = model.losses(forward, int(golden.tensor("step")) if golden.has("step") else 0)
    outputs = forward.student.outputs
    assert outputs is not None  # a dense student's
    own, run.notes = own_losses(golden, x, _HEAD_LOSSES, student.head, lambda: student.head.losses(outputs, truth))
    best = [m.unflatten(1, (-1, student.num_classes)).amax(2).sigmoid().detach() for m in outputs.logits]
    proposals = student.head.proposals(outputs, sizes)
    run.proposed = Proposed.of(
        proposals, student.head.spec.proposals, best, student.head.box_maps(outputs), student.head.anchors, sizes
    )
    run.features, (run.rois, run.roi_outputs) = forward.student.pyramid, forward.assistant(ASSIST).stages[0]
    for term in model.terms:
        if isinstance(term, AKD):
            run.teacher_taps = forward.comparison.teacher.taps
            run.akd_adapted = [adapt(tap) for adapt, tap in zip(term.adapters, run.roi_outputs.taps, strict=True)]
        if isinstance(term, CKD):
            run.ckd_rows = term.rows(outputs.taps[0], run.rois)
            run.ckd_adapted = term.adapter(run.ckd_rows)
    return {_HEAD_LOSSES[name]: loss for name, loss in {**losses, **own}.items()}


def _dense_step(run: Replay, student: DenseDetector, golden: Golden, x: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    truth, names = golden.truth(sizes), _OWN_LOSSES[type(student)]
    run.features = student.features(x)
    outputs = student.head(run.features)
    losses, run.notes = own_losses(golden, x, names, student.head, lambda: student.head.losses(outputs, truth))
    return {names[name]: loss for name, loss in losses.items()}


def _two_stage_step(run: Replay, student: TwoStageDetector, golden: Golden, x: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    truth, names = golden.truth(sizes), _OWN_LOSSES[type(student)]
    run.features = student.features(x)
    outputs = student.rpn(run.features)
    student.rpn.spec = student.rpn.spec.replace({"sampler": ALL})
    losses, run.notes = own_losses(golden, x, names, student.rpn, lambda: student.rpn.losses(outputs, truth))
    proposals = student.rpn.proposals(outputs, sizes)
    scores = [m.sigmoid().detach() for m in outputs.logits]
    rules, anchors = student.rpn.spec.train_proposals, student.rpn.anchors
    run.proposed = Proposed.of(proposals, rules, scores, outputs.deltas, anchors, sizes)
    head = student.roi.stages[0]
    rois = golden_rois(golden, proposals, truth, student.num_classes, head.spec.positive_iou)
    run.rois, run.roi_outputs = rois, head(run.features, rois.boxes, rois.image)
    losses |= {f"loss_roi_{name}": loss for name, loss in student.roi.losses([StageOutput(rois, run.roi_outputs)]).items()}
    return {names[name]: loss for name, loss in losses.items()}


def _gradients(student: MMDetModel, names: dict[str, str]) -> dict[str, Tensor]:
    parameters = dict(student.loaded.detector.named_parameters())
    if student.assistant is not None:
        parameters |= {f"assistant.{name}": p for name, p in student.assistant.named_parameters()}
    for number, adapter in student.adapters.items():
        parameters |= {f"adapters.{number}.{name}": p for name, p in adapter.named_parameters()}
    gradients = {key: parameters[name].grad for key, name in names.items() if name in parameters}
    return {key: gradient for key, gradient in gradients.items() if gradient is not None}
