"""Every student with every teacher: all parts learn, the teacher does not, and each sort of pair keeps to its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headkd_ray.detectors import CascadeRCNN, Detector, TwoStageDetector, build_detector
from headkd_ray.distill import HEAD, build_trainee
from headkd_ray.errors import JobError
from headkd_ray.job import Job
from tests.detectors.micro import batch, cascade_spec, faster_rcnn_spec, fcos_spec, liven, reppoints_spec, retinanet_spec

CLASSES = 3
STUDENTS = {
    "retinanet": retinanet_spec(),
    "fcos": fcos_spec(),
    "reppoints": reppoints_spec(),
    "faster_rcnn": faster_rcnn_spec(),
    "cascade_rcnn": cascade_spec(),
}
TEACHERS = {
    "faster_rcnn": faster_rcnn_spec(fc_channels=20),
    "cascade_rcnn": cascade_spec(fc_channels=12),
    "retinanet": retinanet_spec(channels=12),
    "fcos": fcos_spec(channels=8),
    "reppoints": reppoints_spec(channels=8, point_channels=12),
}
TAPS = {"faster_rcnn": 2, "cascade_rcnn": 6, "retinanet": 2, "fcos": 2, "reppoints": 5}
"""AKD terms of a teacher."""


def teacher_of(kind: str) -> Detector:
    torch.manual_seed(11)
    teacher = build_detector(TEACHERS[kind], CLASSES)
    liven(teacher)
    return teacher


def trainee_of(student: str, teacher: str, method: str = "head", **distill: Any) -> HEAD:
    job = Job.model_validate(
        {
            "run": {"name": "test"},
            "method": method,
            "data": {"train": "t", "val": "v"},
            "student": STUDENTS[student].model_dump(),
            "teacher": {"checkpoint": "c"},
            "distill": {"warmup_steps": 0, **distill},
        }
    )
    torch.manual_seed(0)
    trainee = build_trainee(job, CLASSES, teacher_of(teacher), steps_per_epoch=10).train()
    assert isinstance(trainee, HEAD)
    return trainee


def step(trainee: HEAD, at: int = 5, **change: Tensor) -> dict[str, Tensor]:
    data = {**batch(), **change}
    return trainee(data["images"], data["sizes"], data["boxes"], data["labels"], at, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", ["copy_only", "akd", "head"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_pair_trains_all_its_parts_and_leaves_the_teacher(student: str, teacher: str, method: str) -> None:
    trainee = trainee_of(student, teacher, method)
    losses = step(trainee)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    terms = sum(name.startswith("loss_akd_") for name in losses)
    assert (terms, "loss_ckd" in losses) == (0 if method == "copy_only" else TAPS[teacher], method == "head")
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in trainee.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    if trainee.teacher is not None:
        assert all(p.grad is None for p in trainee.teacher.parameters())
        assert not [name for name in trainee.state_dict() if "teacher" in name]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_assistant_starts_as_the_teacher_s_head_and_ckd_trains_the_student_alone(student: str, teacher: str) -> None:
    trainee = trainee_of(student, teacher)
    heavy = trainee.teacher
    assert heavy is not None
    theirs = (heavy.roi if isinstance(heavy, TwoStageDetector) else heavy.head).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trainee.assistant.head.state_dict().items())
    losses = step(trainee)
    reached = torch.autograd.grad(losses["loss_ckd"], list(trainee.parameters()), retain_graph=True, allow_unused=True)
    names = [n for (n, _), g in zip(trainee.named_parameters(), reached, strict=True) if g is not None and g.abs().sum() > 0]
    parts = {".".join(name.split(".")[:2]) for name in names}
    own = "student.roi" if isinstance(trainee.student, TwoStageDetector) else "student.head"
    assert parts == {"student.backbone", "student.neck", own, "ckd.adapter"}
    assert not [name for name in names if "_out." in name or "box_tower" in name]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_pair_bears_a_batch_without_objects(student: str, teacher: str) -> None:
    data, trainee = batch(), trainee_of(student, teacher)
    losses = step(trainee, boxes=torch.zeros_like(data["boxes"]), labels=torch.full_like(data["labels"], -1))
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in trainee.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_a_cascade_teacher_looks_at_what_each_stage_of_its_assistant_looks_at(student: str) -> None:
    trainee, data = trainee_of(student, "cascade_rcnn"), batch()
    assert isinstance(trainee.teacher, CascadeRCNN) and trainee.akd is not None and trainee.ckd is not None
    losses = step(trainee)
    x = trainee.student.normalise(data["images"], data["sizes"])
    _, (scene, advice, _) = trainee.trace(
        x, x, data["sizes"], data["boxes"], data["labels"], 5, torch.Generator().manual_seed(3)
    )
    features = trainee.teacher.features(x)
    pairs, number = zip(trainee.teacher.roi.stages, advice.looks, strict=True), 0
    for stage, (rois, outputs) in pairs:
        for own, theirs in zip(outputs.taps, stage(features, rois.boxes, rois.image).taps, strict=True):
            adapted = trainee.akd.adapters[number](own)
            number += 1
            expected = 2 * (adapted - theirs).double().square().mean()
            torch.testing.assert_close(losses[f"loss_akd_{number}"].double(), expected, rtol=1e-5, atol=1e-8)
    assert number == 6
    assert not torch.equal(advice.looks[0].rois.boxes, advice.looks[1].rois.boxes)
    first = advice.looks[0].rois
    lead = trainee.teacher.roi.stages[0](features, first.boxes, first.image).taps[-1]
    torch.testing.assert_close(losses["loss_ckd"], 2 * trainee.ckd(scene.tap, lead, first))


@pytest.mark.parametrize("teacher", ["retinanet", "fcos", "reppoints"])
@pytest.mark.parametrize("student", ["retinanet", "fcos"])
def test_dense_pairs_are_the_formula(student: str, teacher: str) -> None:
    trainee = trainee_of(student, teacher, ckd_epochs=1)
    assert trainee.teacher is not None and trainee.akd is not None and trainee.ckd is not None
    losses, data = step(trainee), batch()
    x = trainee.student.normalise(data["images"], data["sizes"])
    features = trainee.student.features(x)
    own, assisted = trainee.student.head(features).taps, trainee.assistant.head(features).taps
    taught = trainee.teacher.head(trainee.teacher.features(x)).taps

    def distance(adapter: nn.Module, maps: list[Tensor], targets: list[Tensor]) -> Tensor:
        kernel, bias = adapter.weight[:, :, 0, 0].double(), adapter.bias.double()  # type: ignore[index, union-attr]
        total = torch.zeros((), dtype=torch.float64)
        for map_, target in zip(maps, targets, strict=True):
            adapted = torch.einsum("oc,bchw->bohw", kernel, map_.double()) + bias[:, None, None]  # type: ignore[index]
            total = total + (adapted - target).square().mean()
        return total

    expected = {"loss_ckd": 2 * distance(trainee.ckd.adapter, own[0], taught[0])}
    for i, (mine, theirs) in enumerate(zip(assisted, taught, strict=True)):
        expected[f"loss_akd_{i + 1}"] = 2 * distance(trainee.akd.adapters[i], mine, theirs)
    assert len(expected) == 1 + TAPS[teacher]
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-5, atol=0)
    assert step(trainee, at=10)["loss_ckd"] == 0 and step(trainee, at=10)["loss_akd_1"] == losses["loss_akd_1"]


@pytest.mark.parametrize("teacher", ["retinanet", "fcos"])
def test_a_two_stage_student_shows_a_dense_assistant_levels_of_the_teacher_s_size(teacher: str) -> None:
    """P3 to P7: its own P3 to P6 and a pooled P7. AKD compares them with the teacher's cell by cell."""
    trainee, data = trainee_of("faster_rcnn", teacher), batch()
    x = trainee.student.normalise(data["images"], data["sizes"])
    _, trace = trainee.trace(x, x, data["sizes"], data["boxes"], data["labels"], 0, torch.Generator().manual_seed(0))
    assert trace.taught is not None
    for level, (mine, theirs) in enumerate(zip(trace.scene.levels, trace.taught.taps[0], strict=True)):
        assert mine.shape[-2:] == theirs.shape[-2:]
        if level < 4:
            assert torch.equal(mine, trace.scene.features[level + 1])


def test_a_two_stage_student_and_its_assistant_see_the_same_rois() -> None:
    trainee, data = trainee_of("faster_rcnn", "faster_rcnn"), batch()
    x = trainee.student.normalise(data["images"], data["sizes"])
    _, trace = trainee.trace(x, x, data["sizes"], data["boxes"], data["labels"], 0, torch.Generator().manual_seed(0))
    assert trace.scene.own is trace.advice.looks[0].rois
    assert trainee.assistant.head.strides == (4, 8, 16, 32)


def test_the_assistant_s_own_losses_can_warm_up_too() -> None:
    plain, warm = (trainee_of("retinanet", "fcos", warmup_steps=10, warm_assistant=warm) for warm in (False, True))
    for at, factor in ((0, 0.0), (5, 0.5), (10, 1.0)):
        for name, loss in step(plain, at).items():
            own = factor if name.startswith("loss_assist") else 1.0
            torch.testing.assert_close(step(warm, at)[name], own * loss)


def test_an_rcnn_assistant_of_a_dense_teacher_is_refused() -> None:
    with pytest.raises(JobError, match="describes an R-CNN head"):
        trainee_of("retinanet", "fcos", assistant=faster_rcnn_spec().roi.model_dump())
