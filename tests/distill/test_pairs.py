"""Every student works with every teacher: all parts learn, the teacher does not, and each kind of pair keeps to its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headkd_ray.detectors import CascadeRCNN, Detector, TwoStageDetector, build_detector
from headkd_ray.distill import TrainingModel, build_training_model
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.ckd import CKD
from headkd_ray.errors import JobError
from headkd_ray.job import Job
from tests.detectors.micro import (
    SPECS,
    batch,
    cascade_spec,
    faster_rcnn_spec,
    fcos_spec,
    gfl_spec,
    liven,
    reppoints_spec,
    retinanet_spec,
    whole,
)

CLASSES = 3
STUDENTS = {kind: spec() for kind, spec in SPECS.items()}
TEACHERS = {
    "faster_rcnn": faster_rcnn_spec(fc_channels=20),
    "cascade_rcnn": cascade_spec(fc_channels=12),
    "retinanet": retinanet_spec(channels=12),
    "fcos": fcos_spec(channels=8),
    "reppoints": reppoints_spec(channels=8, point_channels=12),
    "gfl": gfl_spec(channels=8),
}
TAPS = {"faster_rcnn": 2, "cascade_rcnn": 6, "retinanet": 2, "fcos": 2, "reppoints": 5, "gfl": 2}
"""Number of AKD terms by kind of teacher."""
PAIRS = [
    (student, teacher)
    for student in STUDENTS
    for teacher in TEACHERS
    if "gfl" not in (student, teacher) or {student, teacher} <= {"gfl", "retinanet", "faster_rcnn"}
]
"""Every student with every teacher; GFL, whose head looks like RetinaNet's from outside, with one of each family."""


def teacher_of(kind: str) -> Detector:
    torch.manual_seed(11)
    teacher = build_detector(TEACHERS[kind], CLASSES)
    liven(teacher)
    return teacher


def model_of(student: str, teacher: str, method: str = "head", **distill: Any) -> TrainingModel:
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
    return build_training_model(job, CLASSES, teacher_of(teacher), steps_per_epoch=10).train()


def terms_of(model: TrainingModel) -> tuple[AKD, CKD]:
    _, akd, ckd = model.terms
    assert isinstance(akd, AKD) and isinstance(ckd, CKD)
    return akd, ckd


def step(model: TrainingModel, at: int = 5, **change: Tensor) -> dict[str, Tensor]:
    data = {**batch(), **change}
    return model(whole(data), at, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", ["copy_only", "akd", "head"])
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_pair_trains_all_its_parts_and_leaves_the_teacher(student: str, teacher: str, method: str) -> None:
    model = model_of(student, teacher, method)
    losses = step(model)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    terms = sum(name.startswith("loss_akd_") for name in losses)
    assert (terms, "loss_ckd" in losses) == (0 if method == "copy_only" else TAPS[teacher], method == "head")
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    if model.teacher is not None:
        assert all(p.grad is None for p in model.teacher.parameters())
        assert not [name for name in model.state_dict() if "teacher" in name]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_assistant_starts_as_the_teacher_s_head_and_ckd_trains_the_student_alone(student: str, teacher: str) -> None:
    model = model_of(student, teacher)
    heavy = model.teacher
    assert heavy is not None
    theirs = heavy.detection_head.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.assistants.assist.head.state_dict().items())
    losses = step(model)
    reached = torch.autograd.grad(losses["loss_ckd"], list(model.parameters()), retain_graph=True, allow_unused=True)
    names = [n for (n, _), g in zip(model.named_parameters(), reached, strict=True) if g is not None and g.abs().sum() > 0]
    parts = {".".join(name.split(".")[:2]) for name in names}
    own = "student.roi" if isinstance(model.student, TwoStageDetector) else "student.head"
    assert parts == {"student.backbone", "student.neck", own, "terms.2"}
    assert not [name for name in names if "_out." in name or "box_tower" in name]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_pair_bears_a_batch_without_objects(student: str, teacher: str) -> None:
    data, model = batch(), model_of(student, teacher)
    losses = step(model, boxes=torch.zeros_like(data["boxes"]), labels=torch.full_like(data["labels"], -1))
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_a_cascade_teacher_looks_at_what_each_stage_of_its_assistant_looks_at(student: str) -> None:
    model, data = model_of(student, "cascade_rcnn"), batch()
    assert isinstance(model.teacher, CascadeRCNN)
    akd, ckd = terms_of(model)
    losses = step(model)
    x = model.student.normalise(data["images"], data["sizes"])
    forward = model.run(whole(data), torch.Generator().manual_seed(3))
    stages = forward.comparison.assistant.stages
    features = model.teacher.features(x)
    pairs, number = zip(model.teacher.roi.stages, stages, strict=True), 0
    for stage, (rois, outputs) in pairs:
        for own, theirs in zip(outputs.taps, stage(features, rois.boxes, rois.image).taps, strict=True):
            adapted = akd.adapters[number](own)
            number += 1
            expected = 2 * (adapted - theirs).double().square().mean()
            torch.testing.assert_close(losses[f"loss_akd_{number}"].double(), expected, rtol=1e-5, atol=1e-8)
    assert number == 6
    assert not torch.equal(stages[0].rois.boxes, stages[1].rois.boxes)
    first = stages[0].rois
    lead = model.teacher.roi.stages[0](features, first.boxes, first.image).taps[-1]
    torch.testing.assert_close(losses["loss_ckd"], 2 * ckd.compare(forward.student.lead, lead, first))


@pytest.mark.parametrize("teacher", ["retinanet", "fcos", "reppoints"])
@pytest.mark.parametrize("student", ["retinanet", "fcos"])
def test_dense_pairs_are_the_formula(student: str, teacher: str) -> None:
    model = model_of(student, teacher, ckd_epochs=1)
    assert model.teacher is not None
    akd, ckd = terms_of(model)
    losses, data = step(model), batch()
    x = model.student.normalise(data["images"], data["sizes"])
    features = model.student.features(x)
    own, assisted = model.student.head(features).taps, model.assistants.assist.head(features).taps
    taught = model.teacher.head(model.teacher.features(x)).taps

    def distance(adapter: nn.Module, maps: list[Tensor], targets: list[Tensor]) -> Tensor:
        kernel, bias = adapter.weight[:, :, 0, 0].double(), adapter.bias.double()  # type: ignore[index, union-attr]
        total = torch.zeros((), dtype=torch.float64)
        for map_, target in zip(maps, targets, strict=True):
            adapted = torch.einsum("oc,bchw->bohw", kernel, map_.double()) + bias[:, None, None]  # type: ignore[index]
            total = total + (adapted - target).square().mean()
        return total

    expected = {"loss_ckd": 2 * distance(ckd.adapter, own[0], taught[0])}
    for i, (mine, theirs) in enumerate(zip(assisted, taught, strict=True)):
        expected[f"loss_akd_{i + 1}"] = 2 * distance(akd.adapters[i], mine, theirs)
    assert len(expected) == 1 + TAPS[teacher]
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-5, atol=0)
    assert step(model, at=10)["loss_ckd"] == 0 and step(model, at=10)["loss_akd_1"] == losses["loss_akd_1"]


@pytest.mark.parametrize("teacher", ["retinanet", "fcos"])
def test_a_two_stage_student_shows_a_dense_assistant_levels_of_the_teacher_s_size(teacher: str) -> None:
    """P3 to P7 are the student's own P3 to P6 and a pooled P7. AKD compares them with the teacher's cell by cell."""
    model, data = model_of("faster_rcnn", teacher), batch()
    forward = model.run(whole(data), torch.Generator().manual_seed(0))
    for level, (mine, theirs) in enumerate(zip(forward.student.levels, forward.comparison.teacher.taps[0], strict=True)):
        assert mine.shape[-2:] == theirs.shape[-2:]
        if level < 4:
            assert torch.equal(mine, forward.student.pyramid[level + 1])


def test_a_two_stage_student_and_its_assistant_see_the_same_rois() -> None:
    model, data = model_of("faster_rcnn", "faster_rcnn"), batch()
    forward = model.run(whole(data), torch.Generator().manual_seed(0))
    assert forward.student.rois is forward.comparison.assistant.stages[0].rois
    assert model.assistants.assist.head.strides == (4, 8, 16, 32)


def test_the_assistant_s_own_losses_can_warm_up_too() -> None:
    plain, warm = (model_of("retinanet", "fcos", warmup_steps=10, warm_assistant=warm) for warm in (False, True))
    for at, factor in ((0, 0.0), (5, 0.5), (10, 1.0)):
        for name, loss in step(plain, at).items():
            own = factor if name.startswith("loss_assist") else 1.0
            torch.testing.assert_close(step(warm, at)[name], own * loss)


def test_each_tower_may_have_a_ckd_term_on_another_conv_than_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """As RetinaNet from RepPoints: MSE(1x1 conv(the student's second conv of a tower), the teacher's last of the same)."""
    monkeypatch.setitem(STUDENTS, "retinanet", retinanet_spec(convs=3, channels=12))
    model = model_of("retinanet", "reppoints", ckd_towers=["cls", "box"], ckd_conv=2, ckd_weight=1.5)
    losses, data = step(model), batch()
    assert [name for name in losses if "ckd" in name] == ["loss_ckd", "loss_ckd_box"]
    x = model.student.normalise(data["images"], data["sizes"])
    assert model.teacher is not None
    taught = model.teacher.head(model.teacher.features(x)).taps
    head, features, terms = model.student.head, model.student.features(x), list(model.terms)[2:]
    for name, tower, term, targets in zip(
        ("loss_ckd", "loss_ckd_box"), (head.cls_tower, head.box_tower), terms, taught[:2], strict=True
    ):
        expected = torch.zeros(())
        for level, target in zip(features, targets, strict=True):
            second = tower[2](tower[0](level).relu()).relu()
            expected = expected + 1.5 * (term.adapter(second) - target).square().mean()
        torch.testing.assert_close(losses[name], expected, rtol=1e-5, atol=0)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_ckd_may_do_without_warm_up_and_bias() -> None:
    plain = model_of("faster_rcnn", "cascade_rcnn", warmup_steps=10)
    special = model_of("faster_rcnn", "cascade_rcnn", warmup_steps=10, warm_ckd=False, ckd_bias=False)
    assert terms_of(special)[1].adapter.bias is None and terms_of(plain)[1].adapter.bias is not None
    assert step(plain, 0)["loss_ckd"] == 0 and step(special, 0)["loss_ckd"] > 0
    assert step(special, 0)["loss_ckd"] == step(special, 10)["loss_ckd"]
    assert step(special, 0)["loss_akd_1"] == 0


@pytest.mark.parametrize("teacher", ["faster_rcnn", "cascade_rcnn"])
def test_a_two_stage_teacher_has_no_box_tower(teacher: str) -> None:
    with pytest.raises(JobError, match=f"distill.ckd_towers: a {teacher} teacher has no box tower to imitate; use "):
        model_of("retinanet", teacher, ckd_towers=["cls", "box"])


def test_an_rcnn_assistant_of_a_dense_teacher_is_refused() -> None:
    with pytest.raises(JobError, match="describes an R-CNN head"):
        model_of("retinanet", "fcos", assistant=faster_rcnn_spec().roi.model_dump())
